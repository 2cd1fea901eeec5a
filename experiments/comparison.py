"""Several optimizers train the same network, from the same start over the same batches."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from experiments.checkpoints import Session
from experiments.classification import Metric
from experiments.training import Augment, History, State, Step, train

MANY = 12  # bars


class Method(NamedTuple):
    """An optimizer at work."""

    label: str
    optimizer: optax.GradientTransformation
    step: Step


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
    """A new bar, which shows how far a run is and how it goes."""
    task = progress.add_task(label, total=steps, done="", status="")

    def show(history: History) -> None:
        progress.update(task, completed=history.steps, done=f"{history.steps:>6,}/{steps:,} steps")
        if history.steps:
            loss, rate = history.batch_loss.value[-1], history.steps / history.train_seconds
            progress.update(task, status=f"loss {loss:.4f}, {rate:.0f} steps/s")

    return show


class Runs(ExitStack):
    """Training runs one after another, with live progress of each and of all together."""

    def __init__(self, console: Console, session: Session, number: int, cost: float):
        """Begin to draw.

        Args:
          console: Where to.
          session: Keeps each run's checkpoints and metrics, and knows what was done before.
          number: How many runs there will be; if they are many, the finished ones' bars go.
          cost: What all their steps together will cost: steps, or an estimate of seconds.
        """
        super().__init__()
        self._console, self._session, self._number = console, session, number
        self._progress = self.enter_context(progress_bars(console))
        self._whole = self._progress.add_task(
            "all", total=cost, done=f"     0/{number} runs", status=""
        )
        self._finished, self._cost = 0, 0.0

    def train(
        self,
        method: Method,
        start: tuple[Any, Any],
        examples: tuple[jax.Array, jax.Array],
        batches: np.ndarray,
        metrics: Mapping[str, Metric],
        at_end: Mapping[str, Metric] | None = None,
        *,
        augment: Augment | None = None,
        cost: float = 1.0,
    ) -> History:
        """Train by one method, or go on with what an earlier session left of it.

        Args:
          method: How; its label differs from the other runs'.
          start: The first parameters and network state.
          examples: All training images and labels.
          batches: Indices of each step's examples, `(steps, batch_size)`.
          metrics: What is evaluated now and then; off the clock.
          at_end: What is evaluated in the end.
          augment: What is done to each batch's images.
          cost: Of a step.

        Returns:
          How the training went.
        """
        label, steps = method.label, len(batches)
        run, show = self._session.run(self._finished, label), bar(self._progress, label, steps)
        its_bar = self._progress.task_ids[-1]
        history, state = run.history(), State(*start, method.optimizer.init(start[0]))
        if 0 < history.steps < steps:
            state = run.state(state)
            self._console.print(f"{label}: resumed after {history.steps:,} steps")
        elif history.steps:
            self._console.print(f"{label}: finished before")

        def on_chunk(state: State, history: History) -> None:
            show(history)
            self._progress.update(self._whole, completed=self._cost + cost * history.steps)
            run.keep(state, history, finished=history.steps == steps)

        _, history = train(
            method.step,
            state,
            examples,
            batches,
            metrics,
            on_chunk,
            at_end=at_end,
            history=history,
            augment=augment,
        )
        self._finished, self._cost = self._finished + 1, self._cost + cost * steps
        self._progress.update(self._whole, done=f"{self._finished:>6}/{self._number} runs")
        if self._number > MANY:
            self._progress.update(its_bar, visible=False)
        return history
