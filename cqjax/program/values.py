"""Values of some of a program's variables, computed apart from the loss."""

from collections.abc import Iterable, Mapping
from typing import Any

from cqjax.program import jaxprs
from cqjax.program.steps import Constants, Kind, Program


class Values:
    """The variables of a program that do not depend on parameters, written outside of loops.

    Under `jax.jit`, XLA merges what is computed here with the same operations of the loss.
    """

    def __init__(self, jaxpr: Any, program: Program, constants: Constants, parameters: int):
        """Prepares the evaluation of a traced program, whose first inputs are the parameters."""
        self._jaxpr = jaxpr
        self._program = program
        written = {n for step in program.steps for n in step.writes}
        # Equations that hold constants in bodies are listed with these, too.
        self._values = {n: value for n, value in constants if n not in written}
        self._known = {*self._values, *program.inputs[parameters:]}
        for step in program.steps:
            if step.kind is Kind.EQUATION and not step.loops:
                if all(n is None or n in self._known for n in step.reads):
                    self._known.update(step.writes)

    def __contains__(self, number: object) -> bool:
        """Whether the variable has a value, once the arguments have."""
        return number in self._known

    def constant(self, number: int | None) -> Any:
        """The value of a constant; None for other variables."""
        return self._values.get(number) if number is not None else None

    def of(self, numbers: Iterable[int]) -> Mapping[int, Any]:
        """The values of variables that have one; no argument may be abstract."""
        wanted = set(numbers) - set(self._values)
        needed = self._program.needed(wanted) - set(self._values) if wanted else ()
        for step in self._program.steps if needed else ():
            if not needed.isdisjoint(step.writes) and step.writes[0] not in self._values:
                eqn = jaxprs.at(self._jaxpr, step.position)
                operands = [
                    atom.val if number is None else self._values[number]
                    for atom, number in zip(eqn.invars, step.reads, strict=True)
                ]
                self._values.update(zip(step.writes, jaxprs.evaluate(eqn, operands), strict=True))
        return self._values
