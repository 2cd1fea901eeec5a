"""How JAX represents a traced program, where releases differ.

JAX changes jaxprs between releases (after 0.10 it merged `ClosedJaxpr` into `Jaxpr` and dropped
scan's `num_carry`), so everything here is read off public types and abstract values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import NamedSharding

from cqjax.linalg import devices


class Equation(NamedTuple):
    """What an analysis may know of an equation: no value, and no jaxpr that could hold one.

    So a plan can keep it after the trace, when tracers must not be used any more.

    Attributes:
      primitive: the operation.
      params: its parameters; of an operation that has jaxprs among them, how a loop runs at most.
      inputs: the operands' abstract values.
      outputs: the results' abstract values.
      pointwise: whether each entry of its results depends on the same entries of its operands
        alone, whatever is in its body.
    """

    primitive: core.Primitive
    params: Mapping[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    pointwise: bool


class Shaped(NamedTuple):
    """An array's type.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      placement: how it is split along the explicit axes of a mesh; None without such axes.
    """

    shape: tuple[int, ...]
    dtype: Any
    placement: NamedSharding | None = None


class Scan(NamedTuple):
    """How a scan equation splits its operands and results.

    Attributes:
      consts: the number of operands that are the same in each trip.
      carry: the number of operands that each trip replaces.
    """

    consts: int
    carry: int


def equation(eqn: core.JaxprEqn) -> Equation:
    """The part of an equation that outlives the trace."""
    params = eqn.params
    if bodies(eqn):
        params = {key: params[key] for key in ("length", "reverse") if key in params}
    inputs, outputs = (tuple(atom.aval for atom in side) for side in (eqn.invars, eqn.outvars))
    return Equation(eqn.primitive, params, inputs, outputs, pointwise(eqn))


_POINTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj
    convert_element_type copy cos cosh device_put digamma div eq erf erf_inv erfc exp exp2 expm1
    floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg
    nextafter not optimization_barrier or pow pvary pcast real reduce_precision rem round rsqrt
    select_n sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh
    xor""".split()
)


def pointwise(eqn: core.JaxprEqn) -> bool:
    """Whether each entry of the results depends on the same entries of the operands alone.

    A function with a rule of its own (`jax.nn.relu`) does if all that its body does is of the kind.
    """
    inner = bodies(eqn)
    if not inner:
        return eqn.primitive.name in _POINTWISE
    return len({_aval(out).shape for out in eqn.outvars}) == 1 and all(
        pointwise(each)
        or (each.primitive.name == "broadcast_in_dim" and _aval(each.invars[0]).size == 1)
        for body in inner
        for each in opened(body)[0].eqns
    )


def _aval(atom: Any) -> Any:
    return atom.aval


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """`(jaxpr, constants)` of an open or closed jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bodies(eqn: core.JaxprEqn) -> list[Any]:
    """The jaxprs within an equation."""
    found = []
    for param in eqn.params.values():
        several = param if isinstance(param, tuple | list) else (param,)
        found += [item for item in several if hasattr(opened(item)[0], "eqns")]
    return found


def at(jaxpr: Any, position: Sequence[int]) -> core.JaxprEqn:
    """The equation at a position: its index, after those of the equations around it."""
    first, *rest = position
    eqn = opened(jaxpr)[0].eqns[first]
    if not rest:
        return eqn
    if eqn.primitive is primitives.cond_p:
        return at(eqn.params["branches"][rest[0]], rest[1:])
    return at(bodies(eqn)[0], rest)


def constants_within(eqn: core.JaxprEqn) -> list[Any]:
    """The constants of the jaxprs within an equation, at every depth."""
    found = []
    for body in bodies(eqn):
        jaxpr, consts = opened(body)
        found += consts
        for inner in jaxpr.eqns:
            found += constants_within(inner)
    return found


def scan_arity(eqn: core.JaxprEqn) -> Scan:
    """Number of constants and carries of a scan equation.

    A scanned operand or result has one axis more outside the body than inside; nothing else has.
    """
    body, _ = opened(eqn.params["jaxpr"])
    carry = _same_rank(eqn.outvars, body.outvars)
    return Scan(_same_rank(eqn.invars, body.invars) - carry, carry)


def _same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True))


def evaluate(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on `inputs`, whatever its primitive.

    Not `jax.extend.core.jaxpr_as_fun`, which wants a class that JAX 0.12 no longer exports.
    Going through `eval_jaxpr` keeps the equation's name stack and context. It also leaves the
    unpacking of custom derivative rules to JAX, whose `get_bind_params` has changed its result
    between releases.
    """
    operands: dict[Any, Any] = {
        v: x for v, x in zip(eqn.invars, inputs, strict=True) if not is_literal(v)
    }
    kept = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
    names = core.DebugInfo("cqjax", eqn.primitive.name, ("",) * len(operands), ("",) * len(kept))
    jaxpr = core.Jaxpr([], list(operands), kept, [eqn], eqn.effects, names)
    results = iter(eval_jaxpr(jaxpr, [], *operands.values()))
    return [None if isinstance(v, core.DropVar) else next(results) for v in eqn.outvars]


def shaped(aval: Any) -> Shaped:
    """An abstract value's shape, dtype and placement."""
    return Shaped(aval.shape, aval.dtype, devices.placement(aval))


def varying(aval: Any) -> frozenset[str]:
    """The mesh axes over which an array of this type varies within `jax.shard_map`."""
    return aval.manual_axis_type.varying


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a constant written into the equation."""
    return isinstance(atom, core.Literal)


def value(atom: Any, values: Mapping[Any, Any]) -> Any:
    """An operand's value: its own, if it is a literal."""
    return np.asarray(atom.val, atom.aval.dtype) if is_literal(atom) else values[atom]
