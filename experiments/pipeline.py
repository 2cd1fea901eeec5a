"""What a training step costs, and how much of that is to bring it its batch."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.benchmarks import timing
from experiments.comparison import Method
from experiments.training import Augment, State, Step, compiled, fetching

EFFORT = timing.Effort(repeats=10, budget=3.0, compiles=1)
ALONE = "alone"


def measure(
    console: Console,
    methods: Mapping[str, Method],
    start: tuple[Any, Any],
    examples: tuple[jax.Array, jax.Array],
    batches: np.ndarray,
    augment: Augment | None = None,
    *,
    title: str = "",
    starts: Mapping[str, tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Time steps of each method with the data's way, and the first's on one given batch.

    Args:
      console: Where to say it.
      methods: By name; the first should have the cheapest step.
      start: The first parameters and network state.
      examples: All training images and labels.
      batches: Indices of some steps' examples, `(steps, batch_size)`.
      augment: What is done to each batch's images.
      title: Stands before what is said.
      starts: Of those methods that start elsewhere.

    Returns:
      Seconds per step, each the median of interleaved samples, and the pipeline's share of the
      first method's step; below zero, that is the samples' scatter.
    """
    first, method = next(iter(methods.items()))
    ready = tuple(array[batches[0]] for array in examples)
    starts = {**dict.fromkeys(methods, start), **(starts or {})}
    turns = itertools.cycle(enumerate(batches.astype(np.int32)))

    def fetched() -> tuple[Any, ...]:
        number, batch = next(turns)
        return (*examples, batch, np.int32(number))

    calls = {
        name: _steps(
            fetching(method.step, augment), method, starts[name], fetched, (method.step, augment)
        )
        for name, method in methods.items()
    }
    calls[ALONE] = _steps(method.step, method, starts[first], lambda: ready, (method.step, None))
    samples = {name: timing.planned(call, EFFORT) for name, call in calls.items()}
    times = timing.interleaved(samples)
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    alone = seconds.pop(ALONE)
    console.print(
        f"{title}A step of {first}: {1e3 * seconds[first]:.2f} ms; on a batch that is there "
        f"already: {1e3 * alone:.2f} ms",
        highlight=False,
    )
    return {
        "seconds_per_step": seconds,
        "pipeline": {
            "entrant": first,
            "seconds_with": seconds[first],
            "seconds_without": alone,
            "share": 1 - alone / seconds[first],
        },
    }


def _steps(
    step: Callable[..., tuple[State, jax.Array]],
    method: Method,
    start: tuple[Any, Any],
    batch: Callable[[], tuple[Any, ...]],
    key: tuple[Step, Augment | None],
) -> Callable[[], State]:
    """A compiled step that is called over and over; each call takes the next."""
    params, model_state = jax.tree.map(jnp.copy, start)  # the step donates its buffers
    state = State(params, model_state, method.optimizer.init(params))
    program, _ = compiled(key, step, state, *batch())

    def call() -> State:
        nonlocal state
        state, _ = program(state, *batch())
        return state

    return call
