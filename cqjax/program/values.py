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
        self._values |= program.literals
        self._known = {*self._values, *program.inputs[parameters:]}
        for step in program.steps:
            if step.kind is Kind.EQUATION and not step.loops:
                if self._known.issuperset(step.reads):
                    self._known.update(step.writes)

    def __contains__(self, number: object) -> bool:
        """Whether the variable has a value, once the arguments have."""
        return number in self._known

    def of(self, numbers: Iterable[int]) -> Mapping[int, Any]:
        """The values of variables that have one; no argument may be abstract."""
        needed = self._program.needed(set(numbers) - set(self._values)) - set(self._values)
        for step in self._program.steps if needed else ():
            if not needed.isdisjoint(step.writes):
                operands = [self._values[number] for number in step.reads]
                results = jaxprs.evaluate(jaxprs.at(self._jaxpr, step.position), operands)
                self._values.update(zip(step.writes, results, strict=True))
        return self._values
