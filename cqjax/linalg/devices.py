"""Sums and joined rows of all devices, within `jax.shard_map`.

An array varies over an axis of the device mesh if the devices along that axis may have different
values of it. JAX keeps these axes in the array's type.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

Axes = Iterable[str]
"""Names of axes of a device mesh."""


def varying(tree: Any) -> frozenset[str]:
    """The mesh axes over which any array of a tree varies; none outside of `jax.shard_map`."""
    types = (jax.typeof(leaf) for leaf in jax.tree.leaves(tree))
    return frozenset(axis for kind in types for axis in kind.manual_axis_type.varying)


def number(axes: Axes) -> int:
    """The number of devices along these axes together."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes)


def axes_of(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that a sharding names."""
    named = (axes for axes in sharding.spec if axes is not None)
    return tuple(axis for axes in named for axis in ((axes,) if isinstance(axes, str) else axes))


def vary(tree: Any, axes: Axes) -> Any:
    """The same arrays, with types that say that they vary over these axes too.

    Where JAX compares types, as in a loop's carry, the axes must agree.
    """

    def cast(leaf: jax.Array) -> jax.Array:
        missing = frozenset(axes) - varying(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def struct(shape: tuple[int, ...], dtype: Any, axes: Axes) -> jax.ShapeDtypeStruct:
    """An abstract array with this shape and dtype that varies over these axes."""
    return jax.eval_shape(lambda: vary(jnp.zeros(shape, dtype), axes))


def total(tree: Any, axes: Axes) -> Any:
    """The sums of arrays over the devices along these axes."""
    names = tuple(sorted(axes))
    return lax.psum(vary(tree, names), names) if names else tree


def gathered(tree: Any, axes: Axes, axis: int) -> Any:
    """The arrays of all devices along these mesh axes, joined along an axis of the arrays."""
    names = tuple(axes)
    if not names:
        return tree
    return jax.tree.map(
        lambda leaf: lax.all_gather(
            vary(leaf, names), names, axis=axis, tiled=True, to="invarying"
        ),
        tree,
    )


def anywhere(found: jax.Array) -> jax.Array:
    """Whether `found` is true on any of the devices over which it varies."""
    return total(found.astype(jnp.int32), varying(found)) > 0
