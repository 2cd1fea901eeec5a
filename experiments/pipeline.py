"""What a training step costs, and how much of that is fetching its batch."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import report
from experiments.benchmarks import timing
from experiments.contest import Entrant, Task
from experiments.training import State, compiled, fetching, shuffled_batches

EFFORT = timing.Effort(repeats=10, budget=3.0, compiles=1)
ALONE = "alone"


def measure(
    console: Console,
    title: str,
    task: Task,
    entrants: Sequence[Entrant],
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Time steps that fetch their batches, and steps of the first entrant on one given batch.

    Args:
      console: Where to print.
      title: Stands before what is printed.
      task: Its training images are fetched.
      entrants: Their steps are timed. The first should have the cheapest step.
      batch_size: Images of a batch.
      seed: Of the first weights and of the batches.

    Returns:
      Seconds per step, by entrant: medians of interleaved samples. The number of cores that could
      be used. And the part of the first entrant's step that fetching takes. Scatter of the samples
      can make it negative.
    """
    examples = tuple(map(jnp.asarray, task.parts.train))
    count = len(examples[1])
    batches = shuffled_batches(seed, count, batch_size, count // batch_size)
    ready = tuple(array[batches[0]] for array in examples)
    turns = itertools.cycle(enumerate(batches))

    def fetched() -> tuple[Any, ...]:
        number, batch = next(turns)
        return (*examples, batch, np.int32(number))

    def steps(entrant: Entrant, batch: Callable[[], tuple[Any, ...]]) -> Callable[[], State]:
        """A compiled step. Each call takes the next step."""
        optimizer, step = entrant.at(entrant.rates[0])
        augment = task.augment if batch is fetched else None
        params, model_state = (entrant.task or task).start(seed)
        state = State(params, model_state, optimizer.init(params))
        state = jax.tree.map(jnp.copy, state)  # the step donates its buffers, each once
        function = fetching(step, augment) if batch is fetched else step
        program, _ = compiled((step, augment), function, state, *batch())

        def call() -> State:
            nonlocal state
            state, _ = program(state, *batch())
            return state

        return call

    calls = {entrant.name: steps(entrant, fetched) for entrant in entrants}
    calls[ALONE] = steps(entrants[0], lambda: ready)
    times = timing.interleaved({name: timing.planned(call, EFFORT) for name, call in calls.items()})
    seconds = {name: float(np.median(values)) for name, values in times.items()}
    first, alone = entrants[0].name, seconds.pop(ALONE)
    console.print(
        f"{title}A step of {first}: {1e3 * seconds[first]:.2f} ms; on a batch that is there "
        f"already: {1e3 * alone:.2f} ms",
        highlight=False,
    )
    return {
        "seconds_per_step": seconds,
        "cores": report.cores(),
        "pipeline": {
            "entrant": first,
            "seconds_with": seconds[first],
            "seconds_without": alone,
            "share": 1 - alone / seconds[first],
        },
    }
