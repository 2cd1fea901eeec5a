"""What the axes of a device mesh ask of our mathematics.

Within `jax.shard_map`, an array varies over an axis if the devices along it may have different
values of it: sums and joined rows of all devices are written down. Along an explicit axis, an array
is split as its type says, and an operation whose result could be split in several ways is an error.
There we leave the choice to XLA, as along automatic axes.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def placement(kind: Any) -> NamedSharding | None:
    """How an array, or those of a type, are split along a mesh's explicit axes; None without."""
    sharding = getattr(kind, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and _explicit(sharding.mesh) else None


def within_automatic(kind: Any) -> bool:
    """Whether a type is of a part of the program whose axes are automatic, and explicit around it.

    Such parts are made by `jax.sharding.auto_axes`, and by lookups with an `out_sharding`.
    """
    around = bool(_explicit(jax.sharding.get_abstract_mesh()))
    return around and not kind.sharding.mesh.empty and placement(kind) is None


def placed(tree: Any, placements: Any) -> Any:
    """The same arrays, split so; as they are, where a placement is None."""
    return jax.tree.map(
        lambda at, leaf: leaf if at is None else jax.sharding.reshard(leaf, at),
        placements,
        tree,
        is_leaf=_is_none,
    )


def mesh_entered(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """The context of the mesh that arrays are on, where that has explicit axes.

    JAX needs one for placing what is made outside of `jax.jit`. Within, types are enough.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if jax.sharding.get_abstract_mesh().empty and not any(isinstance(a, Tracer) for a in arrays):
        meshes = [at.mesh for at in map(placement, arrays) if at is not None]
        if meshes and isinstance(meshes[0], Mesh):
            return jax.set_mesh(meshes[0])
    return contextlib.nullcontext()


def automatic(function: Callable[..., Any], *operands: Any, like: Any = None) -> Any:
    """A function's result, computed with a mesh's explicit axes turned automatic.

    Args:
      function: of pytrees of arrays.
      *operands: these. An array that occurs twice among them is one array for the function, too.
      like: placements of the results, or arrays that are split as the results shall be: a tree, or
        the upper part of one. None for what shall be on all devices.
    """
    leaves, tree = jax.tree.flatten(operands)
    arrays = {id(leaf): leaf for leaf in leaves if isinstance(leaf, jax.Array)}
    types = list(map(jax.typeof, arrays.values()))
    meshes = [at.mesh for at in map(placement, types) if at is not None]
    if any(map(within_automatic, types)):
        meshes.append(jax.sharding.get_abstract_mesh())
    if not meshes:
        return function(*operands)

    def inside(*inner: jax.Array) -> Any:
        known = dict(zip(arrays, inner, strict=True))
        return function(*jax.tree.unflatten(tree, [known.get(id(leaf), leaf) for leaf in leaves]))

    def place(leaf: Any) -> NamedSharding:
        at = placement(jax.typeof(leaf)) if isinstance(leaf, jax.Array) else leaf
        return at if isinstance(at, NamedSharding) else NamedSharding(meshes[0], PartitionSpec())

    results = jax.tree.map(place, like, is_leaf=_is_none)
    run = jax.sharding.auto_axes(inside, axes=_explicit(meshes[0]), out_sharding=results)
    with mesh_entered(operands):
        return run(*arrays.values())


def _explicit(mesh: Any) -> tuple[str, ...]:
    """The names of a mesh's explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == AxisType.Explicit)


def _is_none(leaf: Any) -> bool:
    return leaf is None
