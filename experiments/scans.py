"""Small runs as one compiled program each, with `lax.scan` over the steps."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax import lax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import cqjax


def descend(
    differentiate: Callable[..., tuple[jax.Array, Any, cqjax.Captures]],
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Any,
    measure: Callable[[Any], Any],
    *,
    every: int = 1,
) -> tuple[Any, Any]:
    """Take steps of an optimizer.

    Args:
      differentiate: What `cqjax.value_and_grad` returns.
      optimizer: The optimizer. It may use captures.
      params: The first parameters.
      batches: Further arguments of the loss, stacked along a first axis of steps.
      measure: Takes parameters to what is measured.
      every: Steps between measurements. The first measurement is before the first step.

    Returns:
      The last parameters, and all measurements.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        _, grads, captures = differentiate(params, *batch)
        updates, state = optimizer.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), None

    def chunk(carry: tuple[Any, Any], batches: Any) -> tuple[tuple[Any, Any], Any]:
        return lax.scan(step, carry, batches)[0], measure(carry[0])

    chunks = jax.tree.map(lambda batch: batch.reshape(-1, every, *batch.shape[1:]), batches)
    (params, _), measured = lax.scan(chunk, (params, optimizer.init(params)), chunks)
    return params, measured


class Timed(NamedTuple):
    """A result and the seconds that it took."""

    result: Any
    seconds: float
    compile_seconds: float


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    """The function, compiled for such arguments, and the seconds that compiling took."""
    started = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - started


def timed(function: Callable[..., Any], *args: Any) -> Timed:
    """Compile a function, call it, and time both."""
    program, compile_seconds = compiled(function, *args)
    started = time.perf_counter()
    result = jax.block_until_ready(program(*args))
    return Timed(jax.device_get(result), time.perf_counter() - started, compile_seconds)


def stages(console: Console, names: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield the names one by one, with live progress and an estimate of the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=", ".join(name))
            yield name
            progress.advance(task)
