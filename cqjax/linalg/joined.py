"""Functions of many arrays, computed on several of them in one array, and so compiled once.

Small operations take as long to compile as large ones. Products, sums and joins take less.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.linalg import devices


class Results(NamedTuple):
    """The results of one function for several calls, one after the other.

    Attributes:
      labels: the calls' names.
      sizes: how long the result of each is.
      result: an array, (sum of the sizes, ...), or a tree of them.
    """

    labels: tuple[Hashable, ...]
    sizes: tuple[int, ...]
    result: Any


def calls(function: Callable[[Any], Any], trees: Mapping[Any, Any]) -> list[Results]:
    """A function of arrays (B, ...), computed on those of the same shapes in one array.

    Args:
      function: of a tree of arrays with an axis B in front, which it treats alike along that axis.
        It returns such an array, or a tree of them.
      trees: its argument in each call, by a name for the call.

    Returns:
      The results of the calls that were computed together.
    """
    groups: dict[tuple[Any, object], dict[Hashable, list[jax.Array]]] = {}
    for label, tree in trees.items():
        leaves, kind = jax.tree.flatten(tree)
        kinds = tuple((leaf.shape[1:], leaf.dtype, devices.varying(leaf)) for leaf in leaves)
        groups.setdefault((kind, kinds), {})[label] = leaves
    results = []
    for (kind, _), members in groups.items():
        stacks = map(jnp.concatenate, zip(*members.values(), strict=True))
        sizes = tuple(len(leaves[0]) for leaves in members.values())
        results.append(Results(tuple(members), sizes, function(kind.unflatten(stacks))))
    return results


def split(results: Iterable[Results]) -> dict[Any, Any]:
    """Each call's result, by its name."""
    each: dict[Any, Any] = {}
    for labels, sizes, result in results:
        leaves, tree = jax.tree.flatten(result)
        parts = zip(*(jnp.split(leaf, np.cumsum(sizes)[:-1]) for leaf in leaves), strict=True)
        each |= zip(labels, map(tree.unflatten, parts), strict=True)
    return each


def batched(function: Callable[..., Any], *arguments: Sequence[jax.Array]) -> list[Any]:
    """The results of a function as for `calls`, for several lists of its arguments."""
    found = split(
        calls(lambda some: function(*some), dict(enumerate(zip(*arguments, strict=True))))
    )
    return [found[i] for i in range(len(found))]


JOINED = 1 << 16
"""The largest number of entries of an array that `each` copies beside others."""


def each(function: Callable[[Any], Any], trees: Mapping[Any, Any]) -> list[Results]:
    """`calls`, for arrays without an axis in front, whose results are (1, ...)."""
    whole = {label: jax.tree.map(lambda leaf: leaf[None], tree) for label, tree in trees.items()}
    large = {label: tree for label, tree in whole.items() if jax.tree.leaves(tree)[0].size > JOINED}
    small = {label: tree for label, tree in whole.items() if label not in large}
    alone = [Results((label,), (1,), function(tree)) for label, tree in large.items()]
    return calls(function, small) + alone
