"""Five optimizers train a fully-connected network.

Paeedeh and Ghiasi-Shirazi, section 5.3, Fig. 5.
The page is `experiments.pages.mlp`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optax

import cqjax
from experiments import options
from experiments.classification import cross_entropy, initialise
from experiments.contest import Entrant, Task, held_out
from experiments.data import Dataset
from experiments.models import MLP
from experiments.on_images import Contest
from experiments.training import capturing_step, gradient_step

SOURCE = ("sgd", "nesterov", "adam", "csgd")  # who takes part in the source
LONG = (*SOURCE, "csgd_default")
EVERYONE = ("sgd", "nesterov", "adam", "muon", "csgd", "csgd_default")
DAMPING = {"raw": 1e-3, "normalised": 1e-2}  # the paper's lambda
MOMENTUM = 0.95  # Nesterov's, in section 5.4


@dataclass(frozen=True)
class Mlp(Contest):
    """Train the paper's network of eight hidden layers, and judge what the paper says of it.

    Each optimizer is tuned at the same number of rates, by validation loss. Then, at each of
    several seeds, all start from the same weights and see the same batches. The last tenth of the
    training images is for validation. Muon's step takes far too long on a CPU: the preset cpu only
    times it. The results are README.md, losses.png and results.json. During the run, the metrics
    go to metrics.jsonl.
    """

    name = "mlp"
    presets = options.presets(
        dataset=("digits", "cifar10", "cifar10"),
        measured=(500, 5000, 45_000),
        width=(16, None, None),
        depth=(2, 8, 8),
        epochs=(2.0, 2.0, 100.0, 5.0),
        tuning_epochs=(0.5, 1.0, 5.0),
        tries=(2, 5, 5),
        seeds=(2, 5, 3, 3),
        inputs=(("raw",), ("raw",), ("raw", "normalised")),
        optimizers=(SOURCE, SOURCE, EVERYONE, LONG),
    )
    inputs: tuple[Literal["raw", "normalised"], ...] | None = None
    """raw: pixels in [0, 1], with damping 1e-3. normalised: each feature has mean 0 and standard
    deviation 1, with damping 1e-2."""
    optimizers: (
        tuple[Literal["sgd", "nesterov", "adam", "muon", "csgd", "csgd_default"], ...] | None
    ) = None
    """Who takes part: SGD, C-SGD and others. csgd has the paper's damping, csgd_default the
    damping and the bound that `cqjax.csgd` has by default."""
    width: int | None = None
    """Neurons of a hidden layer. By default the preset's, or 800, and 1600 for CIFAR-100."""
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
    csgd_default_rates: tuple[float, ...] = (0.1, 0.03, 0.3, 0.01, 1.0)
    """Learning rates to try for C-SGD with its defaults."""
    output: Path = Path("results/mlp")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "width", "depth")
        options.require_distinct(self, "optimizers", "sgd", "csgd")
        options.require_distinct(self, "inputs")
        self.require_rates(*(EVERYONE if self.optimizers is None else self.optimizers))

    def contests(self, dataset: Dataset) -> dict[str, tuple[Task, list[Entrant]]]:
        """A contest for each kind of inputs: what is learnt, and who takes part.

        Args:
          dataset: The data set.

        Returns:
          The same network with each kind of inputs, and the optimizers. If Muon takes no part, its
          step is timed.
        """
        assert self.inputs and self.depth
        width = self.width or (1600 if self.dataset == "cifar100" else 800)
        model, contests = MLP(width, self.depth, dataset.classes), {}
        for inputs in self.inputs:
            parts = held_out(dataset if inputs == "raw" else dataset.normalised())
            task = Task(parts, model, lambda seed: initialise(model, seed, dataset.train.images))
            contests[inputs] = task, self._entrants(model, DAMPING[inputs])
        return contests

    def _entrants(self, model: MLP, damping: float) -> list[Entrant]:
        loss_fn = cross_entropy(model)

        def plain(optimizer: Callable[[float], Any]) -> Any:
            def at(rate: float) -> Any:
                rule = optimizer(rate)
                return rule, gradient_step(loss_fn, rule)

            return at

        def ours(**options: Any) -> Any:
            def at(rate: float) -> Any:
                optimizer = cqjax.csgd(rate, **options)
                return optimizer, capturing_step(loss_fn, optimizer)

            return at

        def nesterov(rate: float) -> Any:
            return optax.sgd(rate, MOMENTUM, nesterov=True)

        paper = ours(damping=damping, relative_damping=0.0, max_change=None)
        everyone = {
            "sgd": Entrant("SGD", plain(optax.sgd), self.rates("sgd")),
            "nesterov": Entrant("Nesterov", plain(nesterov), self.rates("nesterov")),
            "adam": Entrant("Adam", plain(optax.adam), self.rates("adam")),
            "muon": Entrant("Muon", plain(optax.contrib.muon), self.rates("muon"), "other"),
            "csgd": Entrant("C-SGD", paper, self.rates("csgd"), "ours"),
            "csgd_default": Entrant(
                "C-SGD, default damping", ours(), self.rates("csgd_default"), "ours"
            ),
        }
        names = self.optimizers or ()
        timed = [] if "muon" in names else [everyone["muon"]._replace(role="timed")]
        return [everyone[name] for name in names] + timed
