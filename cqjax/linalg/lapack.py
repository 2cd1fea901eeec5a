"""LAPACK's functions of many matrices, in calls that a CPU survives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# jaxlib 0.10 hands parts of a larger batch to XLA's thread pool, and waits for them in a thread of
# that same pool. If as many such calls run at once as the pool has threads, all of them wait for
# ever. jaxlib 0.11.2 no longer does this.
_ONE_CALL = 1 << 19
"""The largest B m³ of B matrices (m, m) that a CPU takes in one call."""


def in_calls(function: Callable[[jax.Array], Any], matrix: jax.Array) -> Any:
    """A function of matrices (B, m, m): of all at once, or on CPUs one by one if they are large."""
    if len(matrix) == 1 or len(matrix) * matrix.shape[-1] ** 3 <= _ONE_CALL:
        return function(matrix)
    one_by_one = functools.partial(lax.map, function)
    return lax.platform_dependent(matrix, cpu=one_by_one, default=function)
