"""Compile programs with empty caches, and sample in turns how long they take."""

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from experiments.training import State, Step

PERIOD = 10  # steps of a sample: the period of update_every=10
PHASES = ("trace", "lower", "compile")
FEWEST = 3  # samples, however long they take
RATE = 1e-6  # so small that the batch is never fitted, since denormal numbers are slow on CPUs

NOT_LAUNCHED = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


class Effort(NamedTuple):
    """How much is measured."""

    repeats: int
    """Number of samples of each thing."""
    budget: float
    """A thing that has taken so many seconds gets no more samples, if it has a few."""
    compiles: int
    """How often each step is compiled."""


class Program(NamedTuple):
    """A compiled function, how long compiling took, and what it needs."""

    call: Callable[..., Any]
    compile_seconds: float
    """The median time of tracing, lowering and compiling."""
    processor_seconds: Mapping[str, float]
    """The medians of what the processor spent on each of the three, on all cores."""
    temporary_bytes: int | None
    """Memory beside arguments and results; None where it is not known."""
    entry_instructions: int | None
    """See `entry_instructions`."""


def compiled(
    function: Callable[..., Any], *args: Any, donate: Sequence[int] = (), compiles: int = 1
) -> Program:
    """Trace and compile a function for some arguments, with all of JAX's caches empty."""

    def compile_() -> tuple[jax.stages.Compiled, float, list[float]]:
        jax.clear_caches()
        started, clock = time.perf_counter(), [time.process_time()]
        traced = jax.jit(function, donate_argnums=donate).trace(*args)
        clock.append(time.process_time())
        lowered = traced.lower()
        clock.append(time.process_time())
        program = lowered.compile()
        clock.append(time.process_time())
        return program, time.perf_counter() - started, list(np.diff(clock))

    programs, seconds, spent = zip(*(compile_() for _ in range(compiles)), strict=True)
    program = programs[-1]
    medians = map(float, np.median(spent, axis=0))
    memory = program.memory_analysis()
    return Program(
        program,
        float(np.median(seconds)),
        dict(zip(PHASES, medians, strict=True)),
        memory and memory.temp_size_in_bytes,
        entry_instructions(program.as_text() or ""),
    )


def entry_instructions(hlo: str) -> int:
    """Count a compiled module's top-level instructions that do something: fusions, calls, ...

    On a GPU the count stands in for the number of kernels that a run launches. Instructions in
    command buffers are counted one by one. A loop or a condition counts as one.
    """
    bodies = re.findall(r"^(ENTRY )?%?([\w.-]+) .*\{\n((?:  .*\n)*)\}", hlo, re.MULTILINE)
    computations = {name: body for _, name, body in bodies}

    def count(body: str) -> int:
        total = 0
        for line in body.splitlines():
            found = re.search(r" = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", line)
            buffer = re.search(r"to_apply=%?(command_buffer[\w.-]*)", line)
            if buffer:
                total += count(computations[buffer[1]])
            elif found and found[1] not in NOT_LAUNCHED and not found[1].endswith("-done"):
                total += 1
        return total

    return sum(count(body) for entry, _, body in bodies if entry)


class Training:
    """Training steps on one batch. Each call takes the next step."""

    def __init__(
        self,
        step: Step,
        init: Callable[[Any], Any],
        start: tuple[Any, Any],
        batch: tuple[jax.Array, jax.Array],
        compiles: int = 1,
    ):
        params, model_state = jax.tree.map(jnp.copy, start)  # the step donates its buffers
        self.state, self._batch = State(params, model_state, init(params)), batch
        self.program = compiled(step, self.state, *batch, donate=(0,), compiles=compiles)
        self.loss: Any = None

    def __call__(self) -> State:
        """Take a step."""
        self.state, self.loss = self.program.call(self.state, *self._batch)
        return self.state


class Sample(NamedTuple):
    """What is timed, and how often."""

    call: Callable[[], Any]
    times: int
    """Calls in a row that make a sample."""
    number: int
    """Number of samples."""


def planned(call: Callable[[], Any], effort: Effort, whole: bool = False) -> Sample:
    """Warm up, and see how many samples of `PERIOD` calls there is time for.

    Args:
      call: What is timed.
      effort: How much is measured.
      whole: Whether a sample must have `PERIOD` calls. If not, it is one call where calls are slow.
    """
    seconds_of(call)
    seconds, times = seconds_of(call), PERIOD
    if FEWEST * times * seconds > effort.budget and not whole:
        times = 1
    number = max(FEWEST, int(effort.budget / (times * seconds)))
    return Sample(call, times, min(number, effort.repeats))


def seconds_of(call: Callable[[], Any], times: int = 1) -> float:
    """Mean seconds of several calls in a row."""
    started = time.perf_counter()
    for _ in range(times - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - started) / times


def interleaved(samples: Mapping[str, Sample], description: str = "") -> dict[str, np.ndarray]:
    """Take one sample of each, in random order, then the next of each, and so on.

    Args:
      samples: What to time. What has fewer samples takes part in the first turns only.
      description: Stands beside the progress bar. Without it, there is no bar.

    Returns:
      Seconds of a call, for each sample.
    """
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    shuffle = random.Random(0)
    turns = max(sample.number for sample in samples.values())
    for turn in track(range(turns), description=description, disable=not description):
        for name in shuffle.sample(list(samples), len(samples)):
            if turn < samples[name].number:
                seconds[name].append(seconds_of(samples[name].call, samples[name].times))
    return {name: np.array(values) for name, values in seconds.items()}


def summary(values: np.ndarray) -> dict[str, Any]:
    """Median, quartiles and number."""
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "quartiles": [low, high], "samples": len(values)}


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0].strip()
