"""A parameter as an equation sees it: through transposes, reshapes, slices, concatenations, scales.

A view moves entries V and multiplies them by constants c: the operand is W = c V, entry by entry.
The layer's problem is posed in W, for W is what makes its output. So three maps lead to and fro:

- a value of the parameters, or a change of them, is seen as c V: `view(arrays)`;
- their gradient ∂L/∂V = c ∂L/∂W is seen as ∂L/∂W: `view.reciprocal(arrays)`;
- a change ΔW is made by ΔV = ΔW / c, not by c ΔW: `view.bring_back`.

Without scales they are one map and its transpose, which inverts a permutation, and writes a slice
into zeros. Entries with c = 0 cannot change W: they are not brought back.

A view is a small tree of JAX operations rather than an array of indices: it costs no memory, and
it is hashable, so captures that hold it cross `jax.jit`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from cqjax.linalg import devices
from cqjax.program import jaxprs
from cqjax.program.jaxprs import Equation
from cqjax.program.known import Constant

# Operations that move entries and change none of them.
_MOVES = frozenset(
    {
        primitives.transpose_p,
        primitives.reshape_p,
        primitives.squeeze_p,
        primitives.rev_p,
        primitives.slice_p,
        primitives.concatenate_p,
        primitives.pad_p,  # by zeros, the caller sees to it
    }
)
# Those without a public name are known by their own, and by a function that is one.
_MOVES_BY_NAME: Mapping[str, Callable[[jax.Array], Any]] = {
    "split": lambda x: lax.split(x, (1,)),
    "stack": lambda x: jnp.stack([x, x]),
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
_PARTIAL = frozenset({"slice", "split", "unstack", "pad"})


@dataclasses.dataclass(frozen=True)
class View:
    """Parameters, moved into an operand's layout, and scaled.

    Attributes:
      path: the parameter, where nothing has been moved yet; else None.
      shape: shape of one trip's operand: without the axes scanned over.
      primitive: the last operation; None for the parameter itself, where one more scan slices
        `args[0]`, and where that is scaled.
      options: the operation's parameters.
      args: views of its operands.
      output: which of its results this is.
      loops: lengths of the scans that slice the parameter, keyed by nesting level. Outside the
        loops the view has these axes in front.
      scale: what `args[0]` is multiplied by, if that is the last operation.
      sources: where `path` stands for a weight that the loss makes of parameters (see `made`):
        their paths.
    """

    path: str | None
    shape: tuple[int, ...]
    primitive: core.Primitive | None = None
    options: tuple[tuple[str, Any], ...] = ()
    args: tuple["View", ...] = ()
    output: int = 0
    loops: tuple[tuple[int, int], ...] = ()
    scale: Constant | None = None
    sources: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have the name of the primitive, whose copy would be another."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        name = None if self.primitive is None else self.primitive.name
        return _restored, (name, {**fields, "primitive": None})

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """The parameters' paths, in order of appearance."""
        if self.path is not None:
            return self.sources or (self.path,)
        return tuple(dict.fromkeys(p for arg in self.args for p in arg.paths))

    @functools.cached_property
    def made(self) -> str | None:
        """The name of the weight that is seen, if the loss makes it of parameters; else None."""
        if self.path is not None:
            return self.path if self.sources else None
        return next((arg.made for arg in self.args if arg.made), None)

    @functools.cached_property
    def whole(self) -> bool:
        """Whether it is plain that every entry of every parameter occurs exactly once."""
        return not self._partial and self._leaves == len(self.paths)

    @functools.cached_property
    def scaled(self) -> bool:
        """Whether entries are multiplied by something."""
        return self.scale is not None or any(arg.scaled for arg in self.args)

    @functools.cached_property
    def holes(self) -> bool:
        """Whether entries of the operand may be zero whatever the parameters are."""
        pads = self.primitive is primitives.pad_p
        return pads or self._masks or any(arg.holes for arg in self.args)

    @property
    def _masks(self) -> bool:
        return self.scale is not None and not np.all(self.scale.value)

    @functools.cached_property
    def _partial(self) -> bool:
        cuts = self.primitive is not None and self.primitive.name in _PARTIAL
        return cuts or self._masks or any(arg._partial for arg in self.args)

    @functools.cached_property
    def _leaves(self) -> int:
        return 1 if self.path is not None else sum(arg._leaves for arg in self.args)

    def __call__(self, parameters: Mapping[str, jax.Array]) -> jax.Array:
        """The operand's array, `(*loop lengths, *shape)`, made from arrays of the parameters."""
        if self.path is not None:
            return parameters[self.path]
        if self.scale is not None:
            operand = self.args[0](parameters)
            return operand * self.scale.value.astype(operand.dtype)
        if self.primitive is None:  # sliced by one more loop: the array is the same
            return self.args[0](parameters)
        move = functools.partial(self.primitive.bind, **dict(self.options))
        if self.primitive is primitives.pad_p:
            move = functools.partial(_padded, move)
        for _ in self.loops:
            move = jax.vmap(move)
        result = move(*(arg(parameters) for arg in self.args))
        return result[self.output] if self.primitive.multiple_results else result

    @functools.cached_property
    def reciprocal(self) -> "View":
        """The view with 1 / c in the place of each scale c, and 0 in that of 0."""
        return self._rescaled(lambda c: np.divide(1, c, out=np.zeros_like(c), where=c != 0))

    @functools.cached_property
    def unscaled(self) -> "View":
        """The view with 1 in the place of each scale, and 0 in that of 0."""
        return self._rescaled(lambda c: (c != 0).astype(c.dtype))

    def _rescaled(self, change: Callable[[np.ndarray], np.ndarray]) -> "View":
        if not self.scaled:
            return self
        scale = None if self.scale is None else Constant(change(self.scale.value))
        return dataclasses.replace(
            self, args=tuple(arg._rescaled(change) for arg in self.args), scale=scale
        )

    @functools.cached_property
    def split(self) -> tuple["View", float]:
        """The view without those scales that are numbers other than zero, and their product."""
        if len(self.args) != 1:
            return self, 1.0
        arg, factor = self.args[0].split
        if self.scale is not None and not self.scale.value.ndim and self.scale.value != 0:
            return arg, factor * float(self.scale.value)
        return dataclasses.replace(self, args=(arg,)), factor

    @property
    def transposition(self) -> tuple[int, ...] | None:
        """The order of axes of the transpose that is the last operation; None if it is another."""
        if self.primitive is not primitives.transpose_p:
            return None
        return tuple(dict(self.options)["permutation"])

    def bring_back(
        self, operand: jax.Array, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, jax.Array]:
        """Arrays of the parameters' `shapes` that the view turns into the operand, else zeros."""
        return self.reciprocal.transpose(operand, shapes)

    def transpose(
        self, operand: jax.Array, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, jax.Array]:
        """The transpose of the view, as a linear map of the parameters, of these `shapes`."""
        axes = devices.varying(operand)
        structs = {p: devices.struct(shapes[p], operand.dtype, axes) for p in self.paths}
        (parameters,) = jax.linear_transpose(self, structs)(operand)
        return parameters

    def pattern(self) -> np.ndarray:
        """Which entries of the operand, `(*loop lengths, *shape)`, depend on the parameters."""
        with jax.ensure_compile_time_eval():
            ones = {path: jnp.ones(shape) for path, shape in self._shapes.items()}
            return np.asarray(self.unscaled(ones)) != 0

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self.path is not None:
            return {self.path: self.shape}
        return {path: shape for arg in self.args for path, shape in arg._shapes.items()}


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


def made(name: str, sources: tuple[str, ...], shape: tuple[int, ...], loops: Any) -> View:
    """A weight of this name that the loss makes of the parameters at `sources`."""
    return View(name, shape, loops=loops, sources=sources)


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


def scaled(view: View, by: np.ndarray) -> View:
    """The view, multiplied by a constant: a number, or an array of its shape."""
    return View(None, view.shape, None, (), (view,), 0, view.loops, Constant(np.asarray(by, float)))


def sliced(view: View, level: int) -> View:
    """The view that the body of a scan has of an operand scanned over, at nesting `level`."""
    length, *shape = view.shape
    return View(None, tuple(shape), None, (), (view,), 0, (*view.loops, (level, length)))


def rows(view: View, axis: int, start: int, number: int) -> View:
    """Some rows of a view, along an axis."""
    if number == view.shape[axis]:
        return view
    return _moved(view, lambda x: lax.slice_in_dim(x, start, start + number, axis=axis))


def reversed_rows(view: View, axis: int) -> View:
    """A view whose last row, along an axis, is the first."""
    return _moved(view, lambda x: lax.rev(x, (axis,)))


def in_turn(view: View, axis: int, level: int) -> View:
    """The one row, along an axis, that each trip of the loop at nesting `level` has of a view."""
    order = (axis, *(i for i in range(len(view.shape)) if i != axis))
    row = sliced(_moved(view, lambda x: lax.transpose(x, order)), level)
    return _moved(row, lambda x: lax.expand_dims(x, (axis,)))


def _moved(view: View, move: Callable[[jax.Array], jax.Array]) -> View:
    """The view after an operation of `jax.lax` that moves entries."""
    jaxpr, _ = jaxprs.opened(jax.make_jaxpr(move)(jax.ShapeDtypeStruct(view.shape, jnp.float32)))
    for eqn in jaxpr.eqns:
        found = results(jaxprs.equation(eqn), [view])
        assert found is not None
        (view,) = found
    return view


def keeps_entries(equation: Equation) -> bool:
    """Whether an equation with one operand is an identity, up to precision and placement."""
    primitive = equation.primitive
    known = primitive in _IDENTITIES or primitive.name in _IDENTITIES_BY_NAME
    return known and jnp.issubdtype(equation.outputs[0].dtype, jnp.floating)


def _padded(pad: Callable[..., jax.Array], operand: jax.Array) -> jax.Array:
    return pad(operand, jnp.zeros((), operand.dtype))
