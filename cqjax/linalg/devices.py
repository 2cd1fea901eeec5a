"""Within `jax.shard_map`: over which mesh axes arrays vary, sums and rows of all devices."""

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
    """The mesh axes over which any array of a tree varies: none outside of `jax.shard_map`."""
    types = (jax.typeof(leaf) for leaf in jax.tree.leaves(tree))
    return frozenset(axis for kind in types for axis in kind.manual_axis_type.varying)


def number(axes: Axes) -> int:
    """How many devices there are along these axes together."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes)


def axes_of(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes that a sharding names."""
    named = (axes for axes in sharding.spec if axes is not None)
    return tuple(axis for axes in named for axis in ((axes,) if isinstance(axes, str) else axes))


def vary(tree: Any, axes: Axes) -> Any:
    """The same arrays, with types that vary over these axes too."""

    def cast(leaf: jax.Array) -> jax.Array:
        missing = frozenset(axes) - varying(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def struct(shape: tuple[int, ...], dtype: Any, axes: Axes) -> jax.ShapeDtypeStruct:
    """The abstract array of this shape and dtype that varies over these axes."""
    return jax.eval_shape(lambda: vary(jnp.zeros(shape, dtype), axes))


def total(tree: Any, axes: Axes) -> Any:
    """The sums of the devices' arrays along these axes."""
    names = tuple(sorted(axes))
    return lax.psum(vary(tree, names), names) if names else tree


def gathered(tree: Any, axes: Axes, axis: int) -> Any:
    """The devices' arrays along these mesh axes, joined along an array axis."""
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
    """Whether something was found on any of the devices between which the answer varies."""
    return total(found.astype(jnp.int32), varying(found)) > 0
