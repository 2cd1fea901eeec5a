"""What the experiments that train networks share: options, sessions, and how a contest runs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from rich.console import Console

from experiments import contest, options, parallel, pipeline, report, stored
from experiments.checkpoints import ResumeError, Session, check_tensorboard
from experiments.contest import Effort, Entrant, Task
from experiments.data import Dataset, Split
from experiments.page import publish
from experiments.runs import Runs


@dataclass(frozen=True)
class Experiment:
    """Options of every experiment that trains."""

    seed: int = 0
    """Seed of the initial weights and of the batches."""
    output: Path = Path("results")
    """Folder for the results."""
    resume: bool = False
    """Go on where an earlier call with the same settings and --output was stopped. Training runs
    that it finished are not run again."""
    checkpoint_seconds: float = 30.0
    """Save the state of the training run every so many seconds. It is saved at the end of one of
    the 75 parts of the run."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too, into the folder tensorboard. Needs tensorboardX."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.SEED, "seed")
        options.require(self, options.NOT_NEGATIVE, "checkpoint_seconds")
        if self.tensorboard:
            check_tensorboard()

    def session(self, dataset: Dataset, shared: bool = False) -> Session:
        """Begin a session, or go on with an earlier one.

        Args:
          dataset: What is learnt from.
          shared: As in `Session`.

        Raises:
          ResumeError: If the earlier session had other settings, other data or another environment.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        return Session(
            self.output,
            stored.identity(asdict(self), dataset.digest(), report.environment()),
            resume=self.resume,
            seconds=self.checkpoint_seconds,
            tensorboard=self.tensorboard,
            shared=shared,
        )


class _Part(NamedTuple):
    """A contest of an experiment."""

    prefix: str
    """Stands before the names of its runs, if there are other contests."""
    task: Task
    entrants: Sequence[Entrant]
    effort: Effort

    def racing(self) -> list[Entrant]:
        """Those of which not only the step is timed."""
        return [entrant for entrant in self.entrants if entrant.role != "timed"]


@dataclass(frozen=True)
class Contests(Experiment, ABC):
    """An experiment that tunes optimizers with equal effort and then compares them.

    Each such experiment declares its name, its presets, the `contests` that it holds, and the
    `effort` of each.
    """

    name: ClassVar[str]
    """Its name on the command line. `experiments.pages` has a module of this name."""
    presets: ClassVar[options.Presets]
    preset: options.Preset = "cpu"
    """smoke for tests; cpu for minutes of two cores, long for hours; paper for a GPU, with the
    source's settings. The preset sets the options below that are not given."""
    tries: int | None = None
    """Number of tuning runs of each optimizer. They take the first of its learning rates."""
    seeds: int | None = None
    """Number of runs of each optimizer at its best rate. Tuning runs have the seed --seed, these
    runs the seeds after it."""
    processes: int = 1
    """Share the training runs out to so many processes, each with its part of the cores. A small
    network's step is no faster on two cores than on one. All seconds are then those on a part of
    the cores."""

    only_finished: bool = False
    """Train nothing: make the page from the training runs that an earlier call with the same
    settings and --output finished, and say which are missing."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "tries", "seeds", "processes")

    def require_rates(self, *optimizers: str) -> None:
        """Refuse learning rates of these optimizers that are bad, or fewer than the tuning runs.

        Raises:
          ValueError: If there are any; the message names the option.
        """
        tries = self.tries or self.presets[self.preset]["tries"]
        fields = (f"{name}_rates" for name in optimizers)
        given = [field for field in fields if getattr(self, field) is not None]
        options.require_rates(self, tries, *given)

    def filled(self) -> Self:
        """The settings. Options that were not given have the preset's values."""
        return options.filled(self, self.presets)

    def rates(self, optimizer: str) -> tuple[float, ...]:
        """The learning rates that are tried for an optimizer."""
        return getattr(self, f"{optimizer}_rates")[: self.tries]

    @abstractmethod
    def load(self, console: Console) -> Dataset:
        """The data that all contests have in common.

        Args:
          console: Where to print what they are.

        Raises:
          DataError: If there are none, or their files are bad.
        """

    @abstractmethod
    def contests(self, dataset: Dataset) -> Mapping[str, tuple[Task, Sequence[Entrant]]]:
        """The contests by title: what is learnt, and who takes part.

        Args:
          dataset: What `load` returned.
        """

    @abstractmethod
    def effort(self, title: str, train: Split) -> Effort:
        """How much is done for each entrant of a contest.

        Args:
          title: The contest's.
          train: What it trains on.
        """

    def run(self) -> None:
        """Tune, train, draw, and judge the source's claims.

        Raises:
          DataError: If there is no such data set, or its files are bad.
          ResumeError: If an earlier session cannot be resumed.
        """
        console, settings = Console(), self.filled()
        dataset = settings.load(console)
        if self.only_finished:
            settings = replace(settings, resume=True)
        elif self.processes > 1:
            # It says whether there is one to resume, or begins it; and steps are timed while the
            # processes do not work.
            with settings._begun(console, dataset, settings._parts(dataset)):
                pass
            settings = replace(settings, resume=True)
            parallel.run(_hold_share, settings, settings.processes)
        results = settings.hold(console, dataset)
        publish(self.name, self, settings, results, console)

    def hold(self, console: Console, dataset: Dataset, shared: bool = False) -> dict[str, Any]:
        """Time a step of each entrant, and hold all contests.

        Args:
          console: Where to draw the progress.
          dataset: What `load` returned.
          shared: As in `Session`.

        Returns:
          The summary of the data set. For each contest, what `pipeline.measure` and
          `contest.hold` return. Of those of which nothing is finished, the runs that are.

        Raises:
          DataError: If a batch has more images than there are.
          ResumeError: If no contest is finished, and there are to be only finished runs.
        """
        parts = self._parts(dataset)
        with self._begun(console, dataset, parts, shared) as (session, times, converted):
            costs = []
            for title, part in parts.items():
                costs += part.effort.costs(part.racing(), times[title]["seconds_per_step"])
            with Runs(console, session, costs, self.only_finished) as runs:
                results = {
                    title: times[title]
                    | {"converted": converted.get(title, {})}
                    | contest.hold(runs, part.prefix, part.task, part.racing(), part.effort)
                    for title, part in parts.items()
                }
        done = {title: result for title, result in results.items() if "entrants" in result}
        if not done:
            raise ResumeError(
                f"in {self.output} no contest is finished, to make a page of: go on with --resume"
            )
        others = {title: result for title, result in results.items() if title not in done}
        return {
            "dataset": dataset.summary(),
            "contests": done,
            "unfinished": [*others],
            "begun": {
                t: {k: other[k] for k in ("begun", "converted")} for t, other in others.items()
            },
        }

    def _parts(self, dataset: Dataset) -> dict[str, _Part]:
        """The contests by title. Those with larger batches than there are images are refused."""
        contests, parts = self.contests(dataset), {}
        for title, (task, entrants) in contests.items():
            effort = self.effort(title, task.parts.train)
            replace(dataset, train=task.parts.train).check_batch_size(effort.batch_size)
            prefix = f"{title}: " * (len(contests) > 1)
            parts[title] = _Part(prefix, task, [e.with_cached_steps() for e in entrants], effort)
        return parts

    @contextmanager
    def _begun(
        self, console: Console, dataset: Dataset, parts: Mapping[str, _Part], shared: bool = False
    ) -> Iterator[tuple[Session, dict[str, Any], dict[str, Any]]]:
        """A session, what a step takes in each contest, and the runs whose seconds were multiplied.

        Steps are timed once, before the training, by as many processes at once as will train.
        """

        def measure() -> dict[str, Any]:
            if self.processes > 1:
                return parallel.at_once(_times, self, self.processes)[0]
            return self._measured(console, parts)

        with self.session(dataset, shared) as session:
            times, converted = session.once("times", measure), {}
            if self.resume:
                digest, settings = dataset.digest(), asdict(self)
                prefixes = {title: part.prefix for title, part in parts.items()}
                known, converted = stored.runs(self.output, digest, settings, prefixes, times)
                session.know(known)
            yield session, times, converted

    def _measured(self, console: Console, parts: Mapping[str, _Part]) -> dict[str, Any]:
        """What a step takes in each contest."""
        return {
            title: pipeline.measure(
                console,
                part.prefix,
                part.task,
                [entrant for entrant in part.entrants if entrant.role != "variant"],
                part.effort.batch_size,
                self.seed,
            )
            for title, part in parts.items()
        }


def _times(settings: Contests, number: int) -> dict[str, Any]:
    """What a step takes in each contest, in one of several processes. The first one prints."""
    console = Console(quiet=True)
    parts = settings._parts(settings.load(console))
    return settings._measured(console if number else Console(), parts)


def _hold_share(settings: Contests, number: int) -> None:
    """Make the runs that no other process makes. The first process draws the progress."""
    console = Console(quiet=number > 0)
    settings.hold(console, settings.load(console), shared=True)
