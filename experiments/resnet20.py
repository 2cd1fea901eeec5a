"""ResNet-20 with and without batch normalisation (seed 000, section 5.4, Figures 6 and 7)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from experiments import data, options, resnet20_entrants
from experiments.experiment import Contest
from experiments.page import publish
from experiments.pages import resnet20 as pages
from experiments.resnet20_entrants import NAMES, VARIANTS, Variant

PRESETS: dict[options.Preset, dict[str, Any]] = {
    "smoke": {
        **{"dataset": "digits", "measured": 200, "depth": 8, "width": 2, "shrink": 1},
        **{"epochs": 2.0, "tuning_epochs": 0.5, "tries": 2, "seeds": 1, "evaluated": 100},
        **{"optimizers": ("sgd",), "variants": ("inputs", "momentum-first")},
    },
    "cpu": {
        **{"dataset": "cifar10", "measured": 1000, "depth": 20, "width": 8, "shrink": 2},
        **{"epochs": 1.0, "tuning_epochs": 0.2, "tries": 3, "seeds": 3, "evaluated": 1000},
        **{"optimizers": tuple(NAMES), "variants": tuple(VARIANTS)},
    },
    "paper": {
        **{"dataset": "cifar10", "measured": 10_000, "depth": 20, "width": 16, "shrink": 1},
        **{"epochs": 80.0, "tuning_epochs": 5.0, "tries": 3, "seeds": 3, "evaluated": 10_000},
        **{"optimizers": tuple(NAMES), "variants": tuple(VARIANTS)},
    },
}


@dataclass(frozen=True)
class Resnet20(Contest):
    """Does consequentialism do for ResNet-20 what batch normalisation does?

    SGD with momentum, Nesterov's and Adam train it with batch normalisation and without; their C-
    forms train it without. Each is tuned at equally many rates, by validation loss; then all start
    from the same kernels and see the same batches, at each of several seeds. C-SGD is tuned with
    single settings changed, too. Results are README.md, three figures and results.json; while it
    runs, the metrics go to metrics.jsonl.
    """

    batch_size: int = 128
    """Images of a batch."""
    optimizers: tuple[Literal["sgd", "nesterov", "adam"], ...] | None = None
    """Who takes part, each in its three forms."""
    variants: tuple[Variant, ...] | None = None
    """Settings of C-SGD that are changed, one at a time."""
    depth: int | None = None
    """Number of layers, 6n + 2."""
    width: int | None = None
    """Channels of the first stage; the paper's network has 16."""
    shrink: Literal[1, 2, 4] | None = None
    """Average so many by so many pixels of each image; 1 leaves it alone."""
    evaluated: int | None = None
    """Validate and test on the first so many of the images for that."""
    damping: float = 0.03
    """The C- forms' damping."""
    momentum: float = 0.95
    """SGD's and Nesterov's, in all forms."""
    momentum_first: bool = False
    """C-SGD accumulates gradients, not updates."""
    inputs: float = 1.0
    """The pixels' largest magnitude, for the plain forms."""
    our_inputs: float = 0.5
    """The pixels' largest magnitude, for the C- forms."""
    last_layer: float = 0.1
    """The last layer's rate, for the C- forms, in units of the other layers'."""
    branches: float = 1.0
    """What the last kernel of each block is multiplied by at first, for all forms."""
    sgd_rates: tuple[float, ...] = (0.0001, 0.001, 0.00001)
    """Learning rates to try for SGD without batch normalisation."""
    sgd_bn_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for SGD with batch normalisation."""
    csgd_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for C-SGD."""
    nesterov_rates: tuple[float, ...] = (0.0001, 0.001, 0.00001)
    """Learning rates to try for Nesterov without batch normalisation."""
    nesterov_bn_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for Nesterov with batch normalisation."""
    cnesterov_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for C-Nesterov."""
    adam_rates: tuple[float, ...] = (0.001, 0.0003, 0.003)
    """Learning rates to try for Adam without batch normalisation."""
    adam_bn_rates: tuple[float, ...] = (0.003, 0.001, 0.01)
    """Learning rates to try for Adam with batch normalisation."""
    cadam_rates: tuple[float, ...] = (0.001, 0.0003, 0.003)
    """Learning rates to try for C-Adam."""
    output: Path = Path("results/resnet20")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "width", "evaluated")
        options.require(self, options.POSITIVE, "damping", "inputs", "our_inputs", "last_layer")
        options.require(self, options.POSITIVE, "branches")
        options.require(self, options.FRACTION, "momentum")
        if self.depth is not None and (self.depth < 8 or self.depth % 6 != 2):
            raise ValueError(f"--depth must be 6n + 2, 8 or more, got {self.depth}")
        names = tuple(NAMES) if self.optimizers is None else self.optimizers
        if "sgd" not in names or len(set(names)) < len(names):
            raise ValueError(f"--optimizers must have sgd, and none twice, got {names}")
        rates = [f"{form}_rates" for name in names for form in (name, f"{name}_bn", f"c{name}")]
        options.require_rates(self, self.tries or PRESETS[self.preset]["tries"], *rates)

    def run(self) -> None:
        """Tune, train, draw, and judge the source's claims.

        Raises:
          DataError: If there is no such data set, or its files are bad.
          ResumeError: If it cannot go on from what there is.
        """
        console, settings = Console(), options.filled(self, PRESETS)
        assert settings.dataset and settings.depth
        dataset = data.load(settings.dataset, self.data_dir, self.download)
        console.print(f"Data: {dataset}", highlight=False, soft_wrap=True)
        contest = resnet20_entrants.contest(settings, dataset)
        results = settings.hold(console, dataset, {f"ResNet-{settings.depth}": contest})
        publish("resnet20", self, settings, pages, results, console)
