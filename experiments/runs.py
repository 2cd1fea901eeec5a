"""Training runs one after another, with live progress and checkpoints."""

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
from experiments.training import Augment, History, State, Step, train

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


class Runs(ExitStack):
    """Training runs one after another, with live progress of each and of all together."""

    def __init__(self, console: Console, session: Session, costs: Sequence[float]):
        """Begin to draw.

        Args:
          console: Where to draw.
          session: Keeps each run's checkpoints and metrics, and knows what was done before. It
            ends with the runs.
          costs: What each run will cost, in order: its steps, or an estimate of its seconds.
        """
        super().__init__()
        self._console, self._session = console, self.enter_context(session)
        self._costs = [*costs]
        self._progress, self._finished = self.enter_context(progress_bars(console)), 0
        done = f"     0/{len(costs)} runs"
        self._whole = self._progress.add_task("all", total=sum(costs), done=done, status="")

    def expect_another(self) -> None:
        """One more run like the last one comes next, which was not foreseen."""
        self._costs.insert(self._finished, self._costs[self._finished - 1])
        self._progress.update(self._whole, total=sum(self._costs))

    def several(self, runs: Sequence[Callable[[], History]]) -> list[History]:
        """Training runs of which none needs another's history. Each calls `train` once.

        Of several processes each makes its own share first, and then waits for the others'.
        """
        first, found = self._finished, {}
        for i in sorted(range(len(runs)), key=lambda i: not self._session.owns(first + i)):
            self._finished = first + i
            found[i] = runs[i]()
        self._finished = first + len(runs)
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
        """
        steps, number = len(batches), self._finished
        done, cost = sum(self._costs[:number]), self._costs[number]
        show = bar(self._progress, label, steps)
        run = self._session.run(number, label, steps)
        its_bar = self._progress.task_ids[-1]
        history, state = run.history(), State(*start, optimizer.init(start[0]))
        if 0 < history.steps < steps:
            state = run.state(state)
            self._console.print(f"{label}: resumed after {history.steps:,} steps")
        elif history.steps:
            self._console.print(f"{label}: finished before")

        def on_chunk(state: State, history: History) -> None:
            show(history)
            self._progress.update(self._whole, completed=done + cost * history.steps / steps)
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
        self._finished += 1
        self._progress.update(self._whole, done=f"{self._finished:>6}/{len(self._costs)} runs")
        if len(self._costs) > MANY:
            self._progress.update(its_bar, visible=False)
        return history
