"""The one place that knows how JAX represents a traced program.

JAX changes jaxprs between releases (after 0.10 it merged `ClosedJaxpr` into `Jaxpr` and dropped
scan's `num_carry`), so everything here is read off public types and abstract values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core


class Scan(NamedTuple):
    """How a scan equation splits its operands and results."""

    consts: int
    carry: int


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """`(jaxpr, constants)` of an open or closed jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bodies(eqn: core.JaxprEqn) -> list[Any]:
    """The jaxprs within an equation."""
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
    return [leaf for leaf in leaves if hasattr(opened(leaf)[0], "eqns")]


def scan_arity(eqn: core.JaxprEqn) -> Scan:
    """Number of constants and carries of a scan equation.

    A scanned operand or result has one axis more outside the body than inside; nothing else has.
    """
    body, _ = opened(eqn.params["jaxpr"])
    carry = _same_rank(eqn.outvars, body.outvars)
    return Scan(_same_rank(eqn.invars, body.invars) - carry, carry)


def _same_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(len(aval(a).shape) == len(aval(b).shape) for a, b in zip(outer, inner, strict=True))


def evaluate(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on `inputs`, whatever its primitive.

    Going through `eval_jaxpr` keeps the equation's name stack and context, and leaves the
    unpacking of custom derivative rules to JAX.
    """
    operands: dict[Any, Any] = {
        v: x for v, x in zip(eqn.invars, inputs, strict=True) if not is_literal(v)
    }
    kept = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
    names = core.DebugInfo("cqjax", eqn.primitive.name, ("",) * len(operands), ("",) * len(kept))
    jaxpr = core.Jaxpr([], list(operands), kept, [eqn], eqn.effects, names)
    results = iter(eval_jaxpr(jaxpr, [], *operands.values()))
    return [None if isinstance(v, core.DropVar) else next(results) for v in eqn.outvars]


def aval(atom: Any) -> Any:
    """Shape and dtype of an equation's operand or result."""
    return atom.aval


def varying(atom: Any) -> frozenset[str]:
    """The mesh axes over which an operand or result varies within `jax.shard_map`."""
    return aval(atom).manual_axis_type.varying


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a constant written into the equation."""
    return isinstance(atom, core.Literal)


def value(atom: Any, values: Mapping[Any, Any]) -> Any:
    """An operand's value: its own, if it is a literal."""
    return np.asarray(atom.val, atom.aval.dtype) if is_literal(atom) else values[atom]


def needed_results(jaxpr: Any, needed: Sequence[bool]) -> list[list[bool]]:
    """For each equation, on which of its results the `needed` results of the jaxpr depend."""
    wanted = {
        v for v, need in zip(jaxpr.outvars, needed, strict=True) if need and not is_literal(v)
    }
    results = []
    for eqn in reversed(jaxpr.eqns):
        results.append([v in wanted for v in eqn.outvars])
        if any(results[-1]):
            wanted.update(v for v in eqn.invars if not is_literal(v))
    return results[::-1]
