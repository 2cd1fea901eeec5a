"""Functions of many arrays, computed on several of them in one array, and so compiled once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.linalg import devices


def batched(function: Callable[..., Any], *arguments: Sequence[jax.Array]) -> list[Any]:
    """A function of arrays (B, ...), computed on those of one shape in one array.

    Small operations take as long to compile as large ones. Products, sums and joins take less.

    Args:
      function: of arrays with an axis B in front, which it treats alike along that axis. It returns
        such an array, or a tree of them.
      *arguments: for each argument, those of all calls.

    Returns:
      Each call's result.
    """
    groups: dict[object, list[int]] = {}
    for i, each in enumerate(zip(*arguments, strict=True)):
        kinds = tuple((a.shape[1:], a.dtype, devices.varying(a)) for a in each)
        groups.setdefault(kinds, []).append(i)
    results: dict[int, Any] = {}
    for members in groups.values():
        joined = (jnp.concatenate([each[i] for i in members]) for each in arguments)
        ends = np.cumsum([len(arguments[0][i]) for i in members])[:-1]
        leaves, tree = jax.tree.flatten(function(*joined))
        parts = zip(*(jnp.split(leaf, ends) for leaf in leaves), strict=True)
        results |= zip(members, (tree.unflatten(part) for part in parts), strict=True)
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
