"""Runs of small networks as one program: steps by `lax.scan`, to be mapped over seeds and rates."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import lax

import cqjax


def descend(
    differentiate: Callable[..., tuple[jax.Array, Any, cqjax.Captures]],
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Any = (),
    *,
    steps: int | None = None,
    measure: Callable[[Any, jax.Array], Any],
) -> tuple[Any, Any]:
    """Take steps of an optimizer, each with what was captured.

    Args:
      differentiate: What `cqjax.value_and_grad` returns.
      optimizer: With captures or without.
      params: Where to start.
      batches: Further arguments of the loss, stacked along a first axis of steps.
      steps: How many, if there are no batches.
      measure: Takes the parameters before a step and their loss to what is wanted of them.

    Returns:
      The last parameters, and all that was measured.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], Any]:
        params, state = carry
        loss, grads, captures = differentiate(params, *batch)
        updates, state = optimizer.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), measure(params, loss)

    (params, _), measured = lax.scan(step, (params, optimizer.init(params)), batches, steps)
    return params, measured


class Timed(NamedTuple):
    """A result and the seconds that it took."""

    result: Any
    seconds: float
    compile_seconds: float


def timed(function: Callable[..., Any], *args: Any) -> Timed:
    """Compile a function, call it, and time both."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    ready = time.perf_counter()
    result = jax.block_until_ready(compiled(*args))
    return Timed(jax.device_get(result), time.perf_counter() - ready, ready - started)
