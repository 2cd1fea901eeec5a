"""The fully-connected network of seed 000, section 5.3, trained by five optimizers (Figure 5)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optax
from rich.console import Console

import cqjax
from experiments import data, options
from experiments.classification import cross_entropy, initialise
from experiments.contest import Entrant, Task, held_out
from experiments.experiment import Contest
from experiments.models import MLP
from experiments.page import publish
from experiments.pages import mlp as pages
from experiments.training import capturing_step, gradient_step

EVERYONE = ("sgd", "nesterov", "adam", "muon", "csgd")
PRESETS: dict[options.Preset, dict[str, Any]] = {
    "smoke": {
        **{"dataset": "digits", "measured": 500, "width": 16, "depth": 2},
        **{"epochs": 2.0, "tuning_epochs": 0.5, "tries": 2, "seeds": 2},
        **{"inputs": ("raw",), "optimizers": ("sgd", "nesterov", "adam", "csgd")},
    },
    "cpu": {
        **{"dataset": "cifar10", "measured": 5000, "depth": 8},
        **{"epochs": 2.0, "tuning_epochs": 1.0, "tries": 5, "seeds": 5},
        **{"inputs": ("raw",), "optimizers": ("sgd", "nesterov", "adam", "csgd")},
    },
    "paper": {
        **{"dataset": "cifar10", "measured": 45_000, "depth": 8},
        **{"epochs": 100.0, "tuning_epochs": 5.0, "tries": 5, "seeds": 3},
        **{"inputs": ("raw", "normalised"), "optimizers": EVERYONE},
    },
}
DAMPING = {"raw": 1e-3, "normalised": 1e-2}  # the paper's lambda
MOMENTUM = 0.95  # Nesterov's, in section 5.4


@dataclass(frozen=True)
class Mlp(Contest):
    """Train the paper's network of eight hidden layers, and judge what the paper says of it.

    Each optimizer is tuned at equally many rates, by validation loss; then all start from the same
    weights and see the same batches, at each of several seeds. The last tenth of the training
    images are for validation. Results are README.md, losses.png and results.json; while it runs,
    the metrics go to metrics.jsonl. Muon's step takes far too long on a CPU: the preset cpu only
    times it.
    """

    inputs: tuple[Literal["raw", "normalised"], ...] | None = None
    """raw is in [0, 1], with damping 1e-3; normalised has each feature's mean and standard
    deviation taken out, with damping 1e-2."""
    optimizers: tuple[Literal["sgd", "nesterov", "adam", "muon", "csgd"], ...] | None = None
    """Who takes part: SGD, C-SGD and others."""
    width: int | None = None
    """Neurons of a hidden layer; by the preset, or 800, and 1600 for CIFAR-100."""
    depth: int | None = None
    """Number of hidden layers."""
    sgd_rates: tuple[float, ...] = (0.005, 0.01, 0.002, 0.02, 0.001)
    """Learning rates to try for SGD."""
    nesterov_rates: tuple[float, ...] = (3e-4, 1e-3, 1e-4, 3e-3, 3e-5)
    """Learning rates to try for SGD with Nesterov's momentum."""
    adam_rates: tuple[float, ...] = (1e-5, 3e-5, 3e-6, 1e-4, 1e-6)
    """Learning rates to try for Adam."""
    muon_rates: tuple[float, ...] = (1e-3, 3e-4, 3e-3, 1e-4, 1e-2)
    """Learning rates to try for Muon."""
    csgd_rates: tuple[float, ...] = (0.05, 0.02, 0.1, 0.01, 0.2)
    """Learning rates to try for C-SGD."""
    output: Path = Path("results/mlp")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "width", "depth")
        names = EVERYONE if self.optimizers is None else self.optimizers
        if not {"csgd", "sgd"} <= set(names) or len(set(names)) < len(names):
            raise ValueError(f"--optimizers must have sgd and csgd, and none twice, got {names}")
        if self.inputs is not None and not 0 < len(self.inputs) == len(set(self.inputs)):
            raise ValueError(f"--inputs must have at least one, and none twice, got {self.inputs}")
        tries = self.tries or PRESETS[self.preset]["tries"]
        options.require_rates(self, tries, *(f"{name}_rates" for name in names))

    def run(self) -> None:
        """Tune, train, draw, and judge the source's claims.

        Raises:
          DataError: If there is no such data set, or its files are bad.
          ResumeError: If it cannot go on from what there is.
        """
        console, settings = Console(), options.filled(self, PRESETS)
        assert settings.dataset and settings.inputs and settings.optimizers and settings.depth
        dataset = data.load(settings.dataset, self.data_dir, self.download)
        console.print(f"Data: {dataset}", highlight=False, soft_wrap=True)
        width = settings.width or (1600 if settings.dataset == "cifar100" else 800)
        model = MLP(width, settings.depth, dataset.classes)
        contests = {}
        for inputs in settings.inputs:
            parts = held_out(dataset if inputs == "raw" else dataset.normalised())
            task = Task(parts, model, lambda seed: initialise(model, seed, dataset.train.images))
            contests[inputs] = task, _entrants(settings, model, inputs, settings.optimizers)
        absent = set(EVERYONE) - set(settings.optimizers)
        timed = _entrants(settings, model, settings.inputs[0], absent & {"muon"})
        results = settings.hold(console, dataset, contests, timed)
        publish("mlp", self, settings, pages, results, console)


def _entrants(settings: Mlp, model: MLP, inputs: str, names: Iterable[str]) -> list[Entrant]:
    loss_fn, tries = cross_entropy(model), settings.tries

    def plain(optimizer: Any) -> Any:
        return optimizer, gradient_step(loss_fn, optimizer)

    def ours(rate: float) -> Any:
        optimizer = cqjax.csgd(rate, damping=DAMPING[inputs])
        return optimizer, capturing_step(loss_fn, optimizer)

    everyone = {
        "sgd": Entrant("SGD", lambda rate: plain(optax.sgd(rate)), settings.sgd_rates[:tries]),
        "nesterov": Entrant(
            "Nesterov",
            lambda rate: plain(optax.sgd(rate, MOMENTUM, nesterov=True)),
            settings.nesterov_rates[:tries],
        ),
        "adam": Entrant("Adam", lambda rate: plain(optax.adam(rate)), settings.adam_rates[:tries]),
        "muon": Entrant(
            "Muon",
            lambda rate: plain(optax.contrib.muon(rate)),
            settings.muon_rates[:tries],
            "other",
        ),
        "csgd": Entrant("C-SGD", ours, settings.csgd_rates[:tries], "ours"),
    }
    return [everyone[name] for name in names]
