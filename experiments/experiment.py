"""What all experiments that train have in common: options, a session, and the results' file."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import metrics, options, report
from experiments.checkpoints import Session
from experiments.data import Dataset

PERIPHERAL = (  # options that no number depends on, since the data themselves are compared
    "dataset",
    "data_dir",
    "download",
    "output",
    "resume",
    "checkpoint_seconds",
    "tensorboard",
)
ENVIRONMENT = ("versions", "device", "cpu", "cpu_count")  # what has to stay the same in one result


@dataclass(frozen=True)
class Experiment:
    """Options of every experiment that trains."""

    seed: int = 0
    """Seed of the initial weights and of the batches."""
    output: Path = Path("results")
    """Folder for the results."""
    resume: bool = False
    """Go on where an earlier call with the same settings and --output was stopped; training runs
    that it finished are not run again."""
    checkpoint_seconds: float = 30.0
    """Save the training run's state every so many seconds: at the end of the next of the 75 chunks
    of its steps."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too, into the folder tensorboard; needs tensorboardX."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.NOT_NEGATIVE, "checkpoint_seconds")
        if self.tensorboard:
            metrics.check_tensorboard()

    def session(self, dataset: Dataset) -> Session:
        """Begin it, or go on with an earlier one.

        Raises:
          ResumeError: If the earlier one had other settings, other data or another environment.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in asdict(self).items() if k not in PERIPHERAL}
        environment = {k: v for k, v in report.environment().items() if k in ENVIRONMENT}
        return Session(
            self.output,
            {**settings, "data": dataset.digest(), **environment},
            resume=self.resume,
            seconds=self.checkpoint_seconds,
            tensorboard=self.tensorboard,
        )

    def write(
        self, console: Console, figure: str, dataset: Dataset, measured: int, results: Any
    ) -> None:
        """Write results.json, and say where everything is.

        Args:
          console: Where to say it.
          figure: The figure's file.
          dataset: The data set.
          measured: How many training images the training loss is that of.
          results: What the experiment found.
        """
        report.write_json(
            self.output / "results.json",
            {
                "experiment": type(self).__name__.lower(),
                "dataset": dataset.summary() | {"images_for_training_loss": measured},
                "settings": asdict(self),
                "environment": report.environment(),
                "results": results,
            },
        )
        written = f"Written: {self.output}/{figure} and {self.output}/results.json"
        console.print(written, highlight=False, soft_wrap=True)
