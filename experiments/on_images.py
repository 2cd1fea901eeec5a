"""What the experiments that learn from a data set of images share."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments import data, options
from experiments.contest import Effort
from experiments.data import Dataset, Split
from experiments.experiment import Contests


@dataclass(frozen=True)
class OnImages(Contests):
    """Contests that learn from a data set of images."""

    dataset: data.AnyName | None = None
    """The data set: digits for smoke, CIFAR-10 for the other presets."""
    measured: int | None = None
    """The training loss is measured on the first so many training images."""
    data_dir: Path | None = None
    """Folder of the data set's official files."""
    download: bool = False
    """Fetch the data set if it is not found, into --data-dir or the cache."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "measured")

    def prepared(self, dataset: Dataset) -> Dataset:
        """The data set as the experiment uses it."""
        return dataset

    def load(self, console: Console) -> Dataset:
        """The data set, `prepared`.

        Raises:
          DataError: If there is no such data set, or its files are bad.
        """
        assert self.dataset
        dataset = data.load(self.dataset, self.data_dir, self.download)
        console.print(f"Data: {dataset}", highlight=False, soft_wrap=True)
        return self.prepared(dataset)


@dataclass(frozen=True)
class Contest(OnImages):
    """Contests in which all learn from the same images for as many epochs."""

    epochs: float | None = None
    """Epochs of each run."""
    tuning_epochs: float | None = None
    """Epochs of each tuning run."""
    batch_size: int = 32
    """Images of a batch."""
    extensions: int = 0
    """While an optimizer's best rate is at the edge of those tried, try one more beyond it, half a
    decade away, up to so many times."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "batch_size")
        options.require(self, options.COUNT, "extensions")
        options.require(self, options.LENGTH, "epochs", "tuning_epochs")

    def effort(self, title: str, train: Split) -> Effort:
        """How much is done for each entrant of a contest."""
        assert self.epochs and self.tuning_epochs and self.seeds and self.measured
        per_epoch = len(train.labels) // self.batch_size
        return Effort(
            max(1, round(self.epochs * per_epoch)),
            max(1, round(self.tuning_epochs * per_epoch)),
            self.seeds,
            self.seed,
            self.batch_size,
            self.measured,
            self.extensions,
        )
