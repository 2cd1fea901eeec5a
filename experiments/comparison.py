"""Several optimizers train the same network, from the same start over the same batches."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from experiments.classification import Metric
from experiments.training import History, State, Step, train


class Method(NamedTuple):
    """An optimizer at work."""

    label: str
    optimizer: optax.GradientTransformation
    step: Step


def compare(
    console: Console,
    methods: Sequence[Method],
    start: tuple[Any, Any],
    examples: tuple[jax.Array, jax.Array],
    batches: np.ndarray,
    metrics: Mapping[str, Metric],
) -> list[tuple[State, History]]:
    """Train by each method, with a live progress bar.

    Args:
      console: Where to draw.
      methods: What to compare.
      start: The first parameters and network state.
      examples: All training images and labels.
      batches: Indices of each step's examples, `(steps, batch_size)`.
      metrics: What is evaluated now and then; off the clock.

    Returns:
      For each method the last state, and how the training went.
    """
    runs, steps = [], len(batches)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:>6,}/{task.total:,} steps"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    ) as progress:
        whole = progress.add_task("all", total=len(methods) * steps, status="")
        for label, optimizer, step in methods:
            task, before = progress.add_task(label, total=steps, status=""), len(runs) * steps

            def on_progress(
                done: int, seconds: float, loss: float, task: TaskID = task, before: int = before
            ) -> None:
                status = f"loss {loss:.4f}, {done / seconds:.0f} steps/s"
                progress.update(task, completed=done, status=status)
                progress.update(whole, completed=before + done)

            state = State(*start, optimizer.init(start[0]))
            runs.append(train(step, state, examples, batches, metrics, on_progress))
    return runs
