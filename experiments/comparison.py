"""Several optimizers train the same network, from the same start over the same batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.checkpoints import Session
from experiments.classification import Metric
from experiments.training import History, State, Step, train


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
        TextColumn("{task.completed:>6,}/{task.total:,} steps"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def bar(progress: Progress, label: str, steps: int) -> Callable[[History], None]:
    """A new bar, which shows how far a run is and how it goes."""
    task = progress.add_task(label, total=steps, status="")

    def show(history: History) -> None:
        if history.steps:
            loss, rate = history.batch_loss.value[-1], history.steps / history.train_seconds
            status = f"loss {loss:.4f}, {rate:.0f} steps/s"
            progress.update(task, completed=history.steps, status=status)

    return show


def compare(
    console: Console,
    session: Session,
    methods: Sequence[Method],
    start: tuple[Any, Any],
    examples: tuple[jax.Array, jax.Array],
    batches: np.ndarray,
    metrics: Mapping[str, Metric],
    at_end: Mapping[str, Metric] | None = None,
) -> list[History]:
    """Train by each method, with live progress bars.

    Args:
      console: Where to draw.
      session: Keeps each run's checkpoints and metrics, and knows what was done before.
      methods: What to compare; their labels differ.
      start: The first parameters and network state.
      examples: All training images and labels.
      batches: Indices of each step's examples, `(steps, batch_size)`.
      metrics: What is evaluated now and then; off the clock.
      at_end: What is evaluated in the end.

    Returns:
      How the training went, for each method.
    """
    histories, steps = [], len(batches)
    with progress_bars(console) as progress:
        whole = progress.add_task("all", total=len(methods) * steps, status="")
        for number, (label, optimizer, step) in enumerate(methods):
            run, show = session.run(number, label), bar(progress, label, steps)
            history, state = run.history(), State(*start, optimizer.init(start[0]))
            if 0 < history.steps < steps:
                state = run.state(state)
                console.print(f"{label}: resumed after {history.steps:,} steps")
            elif history.steps:
                console.print(f"{label}: finished before")

            def on_chunk(
                state: State, history: History, number: int = number, run=run, show=show
            ) -> None:
                show(history)
                progress.update(whole, completed=number * steps + history.steps)
                run.keep(state, history, finished=history.steps == steps)

            _, history = train(
                step, state, examples, batches, metrics, on_chunk, at_end=at_end, history=history
            )
            histories.append(history)
    return histories
