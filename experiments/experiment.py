"""What all experiments that train have in common: options, a session, and the results' file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from experiments import contest, data, metrics, options, pipeline, report
from experiments.checkpoints import Session
from experiments.comparison import Runs
from experiments.contest import Effort, Entrant, Task
from experiments.data import Dataset
from experiments.training import shuffled_batches

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


@dataclass(frozen=True)
class Contest(Experiment):
    """Options of the experiments that tune optimizers alike and then compare them."""

    preset: options.Preset = "cpu"
    """smoke for tests; cpu for two cores; paper for a GPU, with the source's settings. It sets
    what is not given below."""
    dataset: data.AnyName | None = None
    """The data; digits for smoke, CIFAR-10 for the others."""
    epochs: float | None = None
    """Of each run."""
    tuning_epochs: float | None = None
    """Of each tuning run."""
    tries: int | None = None
    """Tuning runs of each optimizer, at the first so many of its learning rates."""
    seeds: int | None = None
    """Runs of each optimizer at its best rate; they have the seeds after --seed, tuning's."""
    batch_size: int = 32
    """Images of a batch."""
    measured: int | None = None
    """The training loss is that of the first so many training images."""
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
        options.require(self, options.AT_LEAST_ONE, "tries", "seeds", "batch_size", "measured")
        options.require(self, options.POSITIVE, "epochs", "tuning_epochs")

    def hold(
        self,
        console: Console,
        dataset: Dataset,
        contests: Mapping[str, tuple[Task, Sequence[Entrant]]],
        absent: Sequence[Entrant] = (),
    ) -> dict[str, Any]:
        """Time a step of everyone, and hold contests.

        Args:
          console: Where to draw the progress.
          dataset: The data set.
          contests: By title.
          absent: Entrants whose step is timed, and who take no part.

        Returns:
          What `pipeline.measure` and `contest.hold` return for each contest, and the data's name.

        Raises:
          DataError: If a batch is more than all training images.
        """
        assert self.epochs and self.tuning_epochs and self.seeds and self.measured
        contests = {
            title: (task, [entrant.remembering() for entrant in entrants])
            for title, (task, entrants) in contests.items()
        }
        train = next(iter(contests.values()))[0].parts.train
        replace(dataset, train=train).check_batch_size(self.batch_size)
        per_epoch = len(train.labels) // self.batch_size
        effort = Effort(
            max(1, round(self.epochs * per_epoch)),
            max(1, round(self.tuning_epochs * per_epoch)),
            self.seeds,
            self.seed,
            self.batch_size,
            self.measured,
        )
        timings = {
            title: self._timing(
                console, f"{title}: " * (len(contests) > 1), task, [*entrants, *absent]
            )
            for title, (task, entrants) in contests.items()
        }
        number = sum(effort.runs(entrants) for _, entrants in contests.values())
        cost = sum(
            effort.cost(entrants, timings[title]["seconds_per_step"])
            for title, (_, entrants) in contests.items()
        )
        with self.session(dataset) as session, Runs(console, session, number, cost) as runs:
            held = {
                title: timings[title]
                | contest.hold(
                    runs,
                    f"{title}: " * (len(contests) > 1),
                    task,
                    entrants,
                    effort,
                    timings[title]["seconds_per_step"],
                )
                for title, (task, entrants) in contests.items()
            }
        return {"dataset": dataset.summary(), "contests": held}

    def _timing(
        self, console: Console, title: str, task: Task, entrants: Sequence[Entrant]
    ) -> dict[str, Any]:
        """Time a step of each entrant but the variants."""
        images, labels = task.parts.train
        per_epoch = len(labels) // self.batch_size
        timed = [entrant for entrant in entrants if entrant.role != "variant"]
        return pipeline.measure(
            console,
            {entrant.name: entrant.method(entrant.rates[0], "") for entrant in timed},
            task.start(self.seed),
            (jnp.asarray(images), jnp.asarray(labels)),
            shuffled_batches(self.seed, len(labels), self.batch_size, per_epoch),
            task.augment and task.augment(self.seed),
            title=title,
            starts={e.name: e.task.start(self.seed) for e in timed if e.task},
        )
