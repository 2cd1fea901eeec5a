"""Which equations of a loss depend on its data, and not on parameters and constants alone."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import primitives

from cqjax.capture import jaxprs
from cqjax.capture.sites import Position


def equations_with_data(
    jaxpr: Any, inputs: Sequence[bool], is_data: Callable[[Any], bool]
) -> set[Position]:
    """Positions of the equations of which an operand depends on data.

    Args:
      jaxpr: a closed jaxpr.
      inputs: which of its inputs are data.
      is_data: whether a constant is.
    """
    following = _Following(is_data)
    following.body(jaxpr, inputs, ())
    return following.found


class _Following:
    def __init__(self, is_data: Callable[[Any], bool]):
        self._is_data = is_data
        self.found: set[Position] = set()

    def body(self, jaxpr: Any, inputs: Sequence[bool], position: Position) -> list[bool]:
        """Which results of a jaxpr depend on data."""
        jaxpr, consts = jaxprs.opened(jaxpr)
        depends = dict(zip(jaxpr.constvars, map(self._is_data, consts), strict=True))
        depends.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> bool:
            return not jaxprs.is_literal(atom) and depends[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            args = [read(atom) for atom in eqn.invars]
            if any(args):
                self.found.add((*position, i))
            results = self._equation(eqn, args, (*position, i))
            depends.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: core.JaxprEqn, args: list[bool], position: Position) -> Sequence[bool]:
        params = eqn.params
        if eqn.primitive in (primitives.jit_p, primitives.remat_p, primitives.closed_call_p):
            return self.body(params.get("jaxpr", params.get("call_jaxpr")), args, position)
        if eqn.primitive is primitives.cond_p:
            branches = [
                self.body(branch, args[1:], (*position, i))
                for i, branch in enumerate(params["branches"])
            ]
            return [args[0] or any(results) for results in zip(*branches, strict=True)]
        if eqn.primitive is primitives.scan_p:
            return self._scan(eqn, args, position)
        held = any(self._holds_data(body) for body in jaxprs.bodies(eqn))
        return [held or any(args)] * len(eqn.outvars)

    def _holds_data(self, jaxpr: Any) -> bool:
        """Whether constants in a jaxpr are data."""
        jaxpr, consts = jaxprs.opened(jaxpr)
        return any(map(self._is_data, consts)) or any(
            self._holds_data(body) for eqn in jaxpr.eqns for body in jaxprs.bodies(eqn)
        )

    def _scan(self, eqn: core.JaxprEqn, args: list[bool], position: Position) -> list[bool]:
        consts, carry = jaxprs.scan_arity(eqn)
        inputs, carried = list(args), slice(consts, consts + carry)
        while True:
            results = self.body(eqn.params["jaxpr"], inputs, position)
            again = [a or b for a, b in zip(inputs[carried], results[:carry], strict=True)]
            if again == inputs[carried]:
                return results
            inputs[carried] = again
