"""Training runs one after another, with live progress and checkpoints."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from experiments.checkpoints import Session
from experiments.classification import Metric
from experiments.history import History
from experiments.training import Augment, State, Step, train

MANY = 12  # runs: if there are more, the bars of finished ones disappear


def progress_bars(console: Console) -> Progress:
    """Live progress of training runs, with an estimate of the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(min_width=7)),
        console=console,
        speed_estimate_period=120,
    )


def bar(progress: Progress, label: str, steps: int) -> Callable[[History], None]:
    """Add the bar of a training run. The function that is returned updates it."""
    task = progress.add_task(label, total=steps, done="", status="")

    def show(history: History) -> None:
        progress.update(task, completed=history.steps, done=f"{history.steps:>6,}/{steps:,} steps")
        if history.steps:
            loss, rate = history.batch_loss.value[-1], history.steps / history.train_seconds
            progress.update(task, status=f"loss {loss:.4f}, {rate:.0f} steps/s")

    return show


class UnfinishedError(Exception):
    """A training run is not finished, and is not to be gone on with."""


class Runs(ExitStack):
    """Training runs one after another, with live progress of each and of all together."""

    def __init__(
        self,
        console: Console,
        session: Session,
        costs: Sequence[float],
        only_finished: bool = False,
    ):
        """Begin to draw.

        Args:
          console: Where to draw.
          session: Keeps each run's checkpoints and metrics, and knows what was done before. It
            ends with the runs.
          costs: What each run will cost, in order: its steps, or an estimate of its seconds.
          only_finished: Train nothing: there are only the runs that were finished before.
        """
        super().__init__()
        self._console, self._session = console, self.enter_context(session)
        self._costs, self._spent = [*costs], 0.0
        self._progress = self.enter_context(progress_bars(console))
        self._number = self._finished = 0
        self._only_finished = only_finished
        done = f"     0/{len(costs)} runs"
        self._whole = self._progress.add_task("all", total=sum(costs), done=done, status="")

    def expect_another(self) -> None:
        """One more run like the last one comes next, which was not foreseen."""
        self._costs.insert(self._number, self._costs[self._number - 1])
        self._progress.update(self._whole, total=sum(self._costs))

    def several(self, runs: Sequence[Callable[[], History]]) -> list[History | None]:
        """Training runs of which none needs another's history. Each calls `train` once.

        Of those that are not finished, and not to be gone on with, there is None.

        Of several processes each makes those that no other has begun, the longest first, and then
        waits for the others'.
        """
        first, order = self._number, [*range(len(runs))]
        found: dict[int, History | None] = {}
        if self._session.shared:
            order.sort(key=lambda i: -self._costs[first + i])
        for waiting in (False, True):
            for i in order:
                if i not in found and (waiting or self._session.claims(first + i)):
                    self._number, found[i] = first + i, None
                    with contextlib.suppress(UnfinishedError):
                        found[i] = runs[i]()
        self._number = first + len(runs)
        return [found[i] for i in range(len(runs))]

    def train(
        self,
        label: str,
        optimizer: optax.GradientTransformation,
        step: Step,
        start: tuple[Any, Any],
        examples: tuple[jax.Array, jax.Array],
        batches: np.ndarray,
        metrics: Mapping[str, Metric],
        at_end: Mapping[str, Metric] | None = None,
        *,
        augment: Augment | None = None,
    ) -> History:
        """Train by one optimizer, or go on where an earlier session stopped.

        Args:
          label: The run's name, which no other run has.
          optimizer: The optimizer.
          step: Its training step.
          start: The first parameters and network state.
          examples: All training images and labels.
          batches: Indices of each step's examples, `(steps, batch_size)`.
          metrics: They are evaluated during the run, and their time does not count.
          at_end: Metrics that are evaluated after the last step only.
          augment: What is done to each batch's images.

        Returns:
          How the training went.

        Raises:
          UnfinishedError: If it is not finished, and there are to be only finished runs.
        """
        steps, number = len(batches), self._number
        cost = self._costs[number]
        run = self._session.run(number, label, steps)
        history, state = run.history(), State(*start, optimizer.init(start[0]))
        if self._only_finished and history.steps < steps:
            raise UnfinishedError(label)
        show = bar(self._progress, label, steps)
        its_bar = self._progress.task_ids[-1]
        if 0 < history.steps < steps:
            state = run.state(state)
            self._console.print(f"{label}: resumed after {history.steps:,} steps")
        elif history.steps:
            self._console.print(f"{label}: finished before")

        def on_chunk(state: State, history: History) -> None:
            show(history)
            spent = self._spent + cost * history.steps / steps
            self._progress.update(self._whole, completed=spent)
            run.keep(state, history, finished=history.steps == steps)

        _, history = train(
            step,
            state,
            examples,
            batches,
            metrics,
            on_chunk,
            at_end=at_end,
            history=history,
            augment=augment,
        )
        self._number = number + 1
        self._finished += 1
        self._spent += cost
        self._progress.update(self._whole, done=f"{self._finished:>6}/{len(self._costs)} runs")
        if not self._console.is_terminal:  # which would show the bars
            left = self._progress.tasks[self._whole].time_remaining
            about = ""
            if left is not None and not self._session.shared:  # others work at the same time
                about = f", about {left / 60:.0f} minutes are left"
            done = f"{self._finished} of {len(self._costs)} runs are finished{about}"
            self._console.print(f"{label}: {done}", highlight=False)
        if len(self._costs) > MANY:
            self._progress.update(its_bar, visible=False)
        return history
