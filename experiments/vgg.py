"""VGG networks trained by SGD, LARS, LSALR and back-matching (seed 004, section 4)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from experiments import data, options, vgg_entrants
from experiments.experiment import Contest
from experiments.page import publish
from experiments.pages import vgg as pages

PRESETS: dict[options.Preset, dict[str, Any]] = {
    "smoke": {
        **{"dataset": "digits", "train_images": 600, "measured": 200, "evaluated": 100},
        **{"epochs": 2.5, "tuning_epochs": 1.25, "tries": 2, "seeds": 1},
        **{"depths": (11,), "width": 2, "shrink": 1, "lars_rates": (2.0, 1.0)},
    },
    "cpu": {
        **{"dataset": "cifar10", "train_images": 5700, "measured": 1000, "evaluated": 1000},
        **{"epochs": 5.0, "tuning_epochs": 2.5, "tries": 3, "seeds": 3},
        **{"depths": (11, 13, 16, 19), "width": 8, "shrink": 2, "lars_rates": (10.0, 5.0, 20.0)},
    },
    "paper": {
        **{"dataset": "cifar10", "measured": 10_000, "evaluated": 10_000},
        **{"epochs": 300.0, "tuning_epochs": 150.0, "tries": 4, "seeds": 5},
        **{"depths": (11, 13, 16, 19), "width": 64, "shrink": 1},
        **{"lars_rates": (2.0, 1.0, 5.0, 10.0)},
    },
}
OURS = {  # the paper's rate first, and its weight decay
    "cifar100": {"back_matching_rates": (0.1, 0.05, 0.2, 0.02), "our_weight_decay": 5e-3},
    "cifar10": {"back_matching_rates": (2e-3, 1e-3, 5e-3, 1e-2), "our_weight_decay": 1e-4},
}


@dataclass(frozen=True)
class Vgg(Contest):
    """Train VGG networks by SGD, LARS, LSALR and back-matching, and judge what the paper says.

    Nesterov's momentum is in all four, and their rates fall to a fifth after each fifth of a run.
    Each is tuned at equally many rates, by validation loss; then all start from the same weights
    and see the same batches, flipped and rotated alike, at each of several seeds. One more contest
    has the settings of the paper's Figure 3: the same rate and weight decay for SGD and
    back-matching. Results are README.md, two figures and results.json; while it runs, the metrics
    go to metrics.jsonl. The preset cpu has narrow networks, small images and few of them.
    """

    batch_size: int = 128
    """Images of a batch."""
    depths: tuple[Literal[11, 13, 16, 19], ...] | None = None
    """The networks; the first is that of Figure 3."""
    width: int | None = None
    """Channels of the first stage; the paper's networks have 64."""
    shrink: Literal[1, 2, 4] | None = None
    """Average so many by so many pixels of each image; 1 leaves it alone."""
    train_images: int | None = None
    """Train and validate on the first so many training images; on all, if preset and this say
    nothing."""
    evaluated: int | None = None
    """Validate and test on the first so many of the images for that."""
    flip: bool = True
    """Mirror half of the images of a batch."""
    degrees: float = 15.0
    """Rotate each image of a batch by up to so many degrees, to either side."""
    momentum: float = 0.9
    """Everyone's, in Nesterov's form."""
    weight_decay: float = 5e-4
    """That of SGD, LARS and LSALR."""
    our_weight_decay: float | None = None
    """Back-matching's; by the data set, the paper's: 5e-3 for CIFAR-100, 1e-4 for others."""
    trust_coefficient: float = 1e-3
    """LARS multiplies its rates by it; the paper's formula has none, that is 1."""
    sgd_rates: tuple[float, ...] = (0.1, 0.05, 0.02, 0.2)
    """Learning rates to try for SGD."""
    lars_rates: tuple[float, ...] | None = None
    """Learning rates to try for LARS; the paper tried 1, 2, 5 and 10."""
    lsalr_rates: tuple[float, ...] = (0.1, 0.05, 0.006, 0.2, 1.0)
    """Learning rates to try for LSALR."""
    back_matching_rates: tuple[float, ...] | None = None
    """Learning rates to try for back-matching, times 64 / --width; by the data set."""
    output: Path = Path("results/vgg")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "width", "evaluated")
        if self.train_images is not None and self.train_images < 2:
            raise ValueError(f"--train-images must be at least 2, got {self.train_images}")
        options.require(self, options.NOT_NEGATIVE, "degrees", "weight_decay", "our_weight_decay")
        options.require(self, options.POSITIVE, "trust_coefficient")
        options.require(self, options.FRACTION, "momentum")
        if self.depths is not None and not 0 < len(self.depths) == len(set(self.depths)):
            raise ValueError(f"--depths must have at least one, and none twice, got {self.depths}")
        names = ("sgd_rates", "lars_rates", "lsalr_rates", "back_matching_rates")
        given = [name for name in names if getattr(self, name) is not None]
        options.require_rates(self, self.tries or PRESETS[self.preset]["tries"], *given)

    def run(self) -> None:
        """Tune, train, draw, and judge the source's claims.

        Raises:
          DataError: If there is no such data set, or its files are bad.
          ResumeError: If it cannot go on from what there is.
        """
        console, preset = Console(), PRESETS[self.preset]
        ours = OURS.get(self.dataset or preset["dataset"], OURS["cifar10"])
        settings = options.filled(self, {self.preset: preset | ours})
        assert settings.dataset
        dataset = data.load(settings.dataset, self.data_dir, self.download)
        console.print(f"Data: {dataset}", highlight=False, soft_wrap=True)
        dataset = vgg_entrants.prepared(settings, dataset)
        results = settings.hold(console, dataset, vgg_entrants.contests(settings, dataset))
        publish("vgg", self, settings, pages, results, console)
