"""A parameter as an equation sees it: through transposes, reshapes, slices, concatenations.

A view only moves entries, so it is linear. Its transpose therefore brings an array of the operand's
layout back to the parameters: it inverts a permutation, and writes a slice into zeros.

A view is a small tree of JAX operations rather than an array of indices: it costs no memory, and
it is hashable, so captures that hold it cross `jax.jit`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from cqjax.linalg import devices
from cqjax.program.jaxprs import Equation

# Operations that move entries and change none of them.
_MOVES = frozenset(
    {
        primitives.transpose_p,
        primitives.reshape_p,
        primitives.squeeze_p,
        primitives.rev_p,
        primitives.slice_p,
        primitives.concatenate_p,
    }
)
# Those without a public name are known by their own, and by a function that is one.
_MOVES_BY_NAME: Mapping[str, Callable[[jax.Array], Any]] = {
    "split": lambda x: lax.split(x, (1,)),
    "unstack": lambda x: lax.unstack(x),
}
# Conversions of dtype are identities here: an update goes back through a view in its own precision.
_IDENTITIES = frozenset(
    {
        primitives.convert_element_type_p,
        primitives.reduce_precision_p,
        primitives.copy_p,
        primitives.name_p,
        primitives.device_put_p,
        primitives.sharding_constraint_p,
    }
)
_IDENTITIES_BY_NAME = frozenset({"pvary", "pcast", "mesh_cast", "reshard"})
_PARTIAL = frozenset({"slice", "split", "unstack"})


@dataclasses.dataclass(frozen=True)
class View:
    """Parameters, moved into an operand's layout.

    Attributes:
      path: the parameter, where nothing has been moved yet; else None.
      shape: shape of one trip's operand: without the axes scanned over.
      primitive: the last operation; None for the parameter itself, and where one more scan
        slices `args[0]`.
      options: the operation's parameters.
      args: views of its operands.
      output: which of its results this is.
      loops: lengths of the scans that slice the parameter, keyed by nesting level. Outside the
        loops the view has these axes in front.
    """

    path: str | None
    shape: tuple[int, ...]
    primitive: core.Primitive | None = None
    options: tuple[tuple[str, Any], ...] = ()
    args: tuple["View", ...] = ()
    output: int = 0
    loops: tuple[tuple[int, int], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have the name of the primitive, whose copy would be another."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        name = None if self.primitive is None else self.primitive.name
        return _restored, (name, {**fields, "primitive": None})

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The parameters' paths, in order of appearance."""
        if self.path is not None:
            return (self.path,)
        return tuple(dict.fromkeys(p for arg in self.args for p in arg.paths))

    @functools.cached_property
    def whole(self) -> bool:
        """Whether it is plain that every entry of every parameter occurs exactly once."""
        return not self._partial and self._leaves == len(self.paths)

    @functools.cached_property
    def _partial(self) -> bool:
        cuts = self.primitive is not None and self.primitive.name in _PARTIAL
        return cuts or any(arg._partial for arg in self.args)

    @functools.cached_property
    def _leaves(self) -> int:
        return 1 if self.path is not None else sum(arg._leaves for arg in self.args)

    def __call__(self, parameters: Mapping[str, jax.Array]) -> jax.Array:
        """The operand's array, `(*loop lengths, *shape)`, made from arrays of the parameters."""
        if self.path is not None:
            return parameters[self.path]
        if self.primitive is None:  # sliced by one more loop: the array is the same
            return self.args[0](parameters)
        move = functools.partial(self.primitive.bind, **dict(self.options))
        for _ in self.loops:
            move = jax.vmap(move)
        result = move(*(arg(parameters) for arg in self.args))
        return result[self.output] if self.primitive.multiple_results else result

    def transpose(
        self, operand: jax.Array, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, jax.Array]:
        """Arrays of the parameters' `shapes` that hold the operand's entries, else zeros."""
        axes = devices.varying(operand)
        structs = {p: devices.struct(shapes[p], operand.dtype, axes) for p in self.paths}
        (parameters,) = jax.linear_transpose(self, structs)(operand)
        return parameters


def _restored(name: str | None, fields: dict[str, Any]) -> View:
    """The view of these fields, with the primitive of this name."""
    if name is None:
        return View(**fields)
    primitive = getattr(primitives, f"{name}_p", None)
    if primitive is None:
        one = jax.ShapeDtypeStruct((1,), jnp.float32)
        primitive = jax.make_jaxpr(_MOVES_BY_NAME[name])(one).eqns[0].primitive
    return View(**{**fields, "primitive": primitive})


def parameter(path: str, shape: tuple[int, ...]) -> View:
    """The parameter itself."""
    return View(path, shape)


def results(equation: Equation, args: list[View | None]) -> list[View] | None:
    """Views of an equation's results, or None where it does more than move entries.

    Args:
      equation: the equation.
      args: views of its operands; None for an operand that is not one.
    """
    if any(arg is None for arg in args) or not args:
        return None
    views = [arg for arg in args if arg is not None]
    if len({v.loops for v in views}) > 1:
        return None
    primitive = equation.primitive
    if keeps_entries(equation):
        return views
    size = sum(aval.size for aval in equation.inputs)
    # A broadcast that repeats nothing only adds axes of length 1.
    spreads = primitive is primitives.broadcast_in_dim_p and equation.outputs[0].size == size
    if not (primitive in _MOVES or primitive.name in _MOVES_BY_NAME or spreads):
        return None
    options = tuple(sorted(equation.params.items()))
    loops = views[0].loops
    return [
        View(None, aval.shape, primitive, options, tuple(views), i, loops)
        for i, aval in enumerate(equation.outputs)
    ]


def sliced(view: View, level: int) -> View:
    """The view that the body of a scan has of an operand scanned over, at nesting `level`."""
    length, *shape = view.shape
    return View(None, tuple(shape), None, (), (view,), 0, (*view.loops, (level, length)))


def keeps_entries(equation: Equation) -> bool:
    """Whether an equation with one operand is an identity, up to precision and placement."""
    primitive = equation.primitive
    known = primitive in _IDENTITIES or primitive.name in _IDENTITIES_BY_NAME
    return known and jnp.issubdtype(equation.outputs[0].dtype, jnp.floating)
