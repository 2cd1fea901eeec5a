"""Which of a loss's arguments and constants are the batch, and its size."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.linalg import devices
from cqjax.program import jaxprs
from cqjax.program.steps import Constants, Program

PyTree = Any


class Aside:
    """A pytree among a loss's arguments whose arrays are no batch: a module's state, say."""


def shared_size(arguments: PyTree, loss: Sequence[Any]) -> int | None:
    """The leading dimension that all arrays among the arguments share; None if they do not.

    Within `jax.shard_map`, times the number of devices over which these vary and the loss does not,
    since the loss is their mean then.

    Args:
      arguments: the arguments.
      loss: the loss's abstract value; empty to count the examples, whatever the loss is.
    """
    leaves = jax.tree.leaves(arguments, is_leaf=lambda node: isinstance(node, Aside))
    arrays = [leaf for leaf in leaves if _may_be_batch(leaf)]
    sizes = {leaf.shape[0] for leaf in arrays}
    # Where the loss varies too, it is each device's own mean, and N is one device's.
    over = devices.varying(arrays).difference(*map(jaxprs.varying, loss))
    return sizes.pop() * devices.number(over) if len(sizes) == 1 else None


def described(args: tuple, kwargs: Mapping[str, Any]) -> str:
    """The arrays that may have a row for each example, with their shapes: the first six."""
    args = tuple(arg for arg in args if not isinstance(arg, Aside))
    found = [
        f"{name}{jax.tree_util.keystr(keys)} {leaf.shape}"
        for name, tree in (("args", args), ("kwargs", kwargs))
        for keys, leaf in jax.tree.leaves_with_path(tree)
        if _may_be_batch(leaf)
    ]
    more = [f"{len(found) - 6} more"] if len(found) > 6 else []
    return ", ".join(found[:6] + more) or "there are no arrays among them"


def of_batch(
    program: Program,
    constants: Constants,
    parameters: int,
    arguments: PyTree,
    examples: int | None,
) -> set[int]:
    """The variables of a loss that hold the batch: arguments and constants, by number.

    An array among the arguments is a constant of the program, and so is one that the function
    closes over. The arguments hold the batch, as far as they have rows for each example. Where
    there are none, what is closed over does. It makes no difference whether `jax.jit` traces them.

    Args:
      program: the loss.
      constants: its constants.
      parameters: how many of its inputs are parameters.
      arguments: its other arguments: constants of the program, but for those that are abstract.
      examples: how many examples there are; None where that is not plain.
    """
    leaves = jax.tree.leaves(arguments)

    def has_rows(leaf: Any) -> bool:
        return _may_be_batch(leaf) and (not examples or leaf.shape[0] % examples == 0)

    abstract = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    given = [leaf for leaf in leaves if _may_be_batch(leaf)]

    def holds_batch(const: Any) -> bool:
        if not given:
            return has_rows(const)
        # A NumPy array has become another object on its way into the program.
        return any(
            const is leaf or (isinstance(leaf, np.ndarray) and _like(const, leaf))
            for leaf in given
            if has_rows(leaf)
        )

    inputs = program.inputs[parameters:]
    found = {n for n, leaf in zip(inputs, abstract, strict=True) if has_rows(leaf)}
    return found | {n for n, const in constants if holds_batch(const)}


def _like(const: Any, leaf: np.ndarray) -> bool:
    return getattr(const, "shape", None) == leaf.shape and (
        jax.dtypes.canonicalize_dtype(const.dtype) == jax.dtypes.canonicalize_dtype(leaf.dtype)
    )


def _may_be_batch(leaf: Any) -> bool:
    """Whether a leaf of the arguments is an array that may have a row for each example.

    A random key has none: neither a typed one nor one of the old style, two or four uint32.
    """
    return (
        isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        and bool(leaf.shape)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        and not (leaf.dtype == jnp.uint32 and leaf.shape in ((2,), (4,)))
    )
