"""Functions of many arrays, computed on several of them in one array, and so compiled once."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.linalg import devices


def batched(function: Callable[..., jax.Array], *arguments: Sequence[jax.Array]) -> list[jax.Array]:
    """A function of small arrays, (B, ...), computed on those of one shape in one array.

    Small operations take as long to compile as large ones. Products, sums and joins take less.
    """
    groups: dict[object, list[int]] = {}
    for i, each in enumerate(zip(*arguments, strict=True)):
        kinds = tuple((a.shape[1:], a.dtype, devices.varying(a)) for a in each)
        groups.setdefault(kinds, []).append(i)
    results: dict[int, jax.Array] = {}
    for members in groups.values():
        joined = (jnp.concatenate([each[i] for i in members]) for each in arguments)
        ends = np.cumsum([len(arguments[0][i]) for i in members])[:-1]
        results |= zip(members, jnp.split(function(*joined), ends), strict=True)
    return [results[i] for i in range(len(results))]


JOINED = 1 << 16
"""The largest number of entries of an array that `each` copies beside others."""


def each(function: Callable[..., jax.Array], *arguments: Sequence[jax.Array]) -> list[jax.Array]:
    """`batched`, for arrays without an axis in front, whose results are (1, ...)."""
    whole = [tuple(array[None] for array in some) for some in zip(*arguments, strict=True)]
    small = [i for i, (first, *_) in enumerate(whole) if first.size <= JOINED]
    found = batched(function, *zip(*(whole[i] for i in small), strict=True)) if small else []
    results = dict(zip(small, found, strict=True))
    return [results[i] if i in results else function(*some) for i, some in enumerate(whole)]


def batched_by_shape(
    function: Callable[..., Sequence[jax.Array]], arguments: Sequence[Sequence[jax.Array]]
) -> list[list[jax.Array]]:
    """Calls a function of arrays (B, ...) once for all argument lists of the same shapes.

    Each call is compiled anew, so fewer calls compile faster.

    Returns:
      For each list of arguments its own results.
    """
    groups: dict[object, list[int]] = {}
    for i, (first, *_) in enumerate(arguments):
        key = first.shape[1:], first.dtype, devices.varying(first)
        groups.setdefault(key, []).append(i)
    results: dict[int, list[jax.Array]] = {}
    for members in groups.values():
        stacks = map(jnp.concatenate, zip(*(arguments[i] for i in members), strict=True))
        ends = np.cumsum([len(arguments[i][0]) for i in members])[:-1]
        parts = zip(*(jnp.split(result, ends) for result in function(*stacks)), strict=True)
        results |= dict(zip(members, map(list, parts), strict=True))
    return [results[i] for i in range(len(arguments))]
