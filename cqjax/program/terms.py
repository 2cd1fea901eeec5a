"""How many terms a loss averages over, read off its program.

From the loss the walk goes back through what is linear and does not depend on parameters: sums,
divisions, products, selections, moves. So the loss is Σᵢ cᵢ ℓᵢ, and N is the divisor of this sum.
A divisor that is a number counts where it is the size of axes that were summed; another is a scale
of the loss, as ½ is. A computed divisor (the sum of a mask) counts where a sum has no other.
"""

from collections.abc import Generator, Sequence, Set
from typing import Any

import jax
from jax.extend.core import primitives

from cqjax.program.divisors import Count, Event, Events, Mask, Unknown, count, divided, times
from cqjax.program.steps import Kind, Number, Program, Step
from cqjax.program.values import Values

_ONE_OPERAND = frozenset(
    """broadcast_in_dim convert_element_type copy expand_dims name neg pcast pvary reduce_precision
    reshape rev sharding_constraint slice squeeze transpose""".split()
)
_MANY_OPERANDS = frozenset({"add", "add_any", "sub", "concatenate", "pad"})
_SUMS_OVER_DEVICES = frozenset({"psum", "psum_invariant", "psum2"})
# More than any loss should need: `x = x * m + x * w`, without layers and with masks m and w, has
# twice as many ways to its terms with each line.
_VISITS = 10
"""How many ways to its terms may lead through each step of a program, in the mean."""

_Visit = Generator[tuple[Number, Events], list[Count], list[Count]]
"""The divisors of the terms that a variable holds. It asks for those of others."""


def counts(
    program: Program, parameters: int, outputs: Set[int], values: Values
) -> tuple[Count, ...]:
    """The divisors of a loss's sums over data; several where its terms differ, none if unknown.

    Args:
      program: the loss. Its first inputs are the parameters, its first output is the loss.
      parameters: how many these are.
      outputs: the variables that are the outputs of layers. Terms without them are of parameters
        alone, and do not count.
      values: which variables are known.
    """
    return _Walk(program, parameters, outputs, values).counts()


class _Walk:
    def __init__(self, program: Program, parameters: int, outputs: Set[int], values: Values):
        self._loss = program.outputs[0]
        self._literals = program.literals
        self._writers = {n: (step, i) for step in program.steps for i, n in enumerate(step.writes)}
        self._learned = program.dependent(program.inputs[:parameters])
        self._outputs = outputs
        self._data = program.dependent(outputs)
        self._values = values
        self._visits = max(10_000, _VISITS * len(program.steps))

    def counts(self) -> tuple[Count, ...]:
        """What the loss's terms have for divisors.

        Visits wait for one another here, and not on Python's stack: a residual network is deeper
        than that. What one has found, it has found for all.
        """
        wanted: tuple[Number, Events] = self._loss, ()
        found: dict[tuple[Number, Events], list[Count]] = {}
        waiting: list[tuple[tuple[Number, Events], _Visit]] = [(wanted, self._visit(*wanted))]
        while waiting:
            key, visit = waiting[-1]
            try:
                begins = wanted is key
                wanted = next(visit) if begins else visit.send(found[wanted])
                while wanted in found:
                    wanted = visit.send(found[wanted])
                waiting.append((wanted, self._visit(*wanted)))
            except StopIteration as end:
                found[key] = end.value
                wanted = key
                waiting.pop()
            except Unknown:
                return ()
        return tuple(dict.fromkeys(found[wanted]))

    def _visit(self, number: Number, events: Events) -> _Visit:
        """The divisors of the terms that a variable holds, after some events.

        Raises:
          Unknown: the loss is too large a sum.
        """
        if number not in self._data:
            return []
        self._visits -= 1
        if self._visits < 0:
            raise Unknown
        if number in self._outputs:
            return [count(events)]
        step, i = self._writers[number]
        match step.kind:
            case Kind.EQUATION:
                return (yield from self._equation(step, number, events))
            case Kind.ENTER | Kind.CLOSE | Kind.SLICE | Kind.STACK:
                return (yield step.reads[i], events)
            case Kind.LAST:
                trips = Event("sum", (step.equation.params.get("length", 1),))
                return (yield step.reads[i], (*events, trips))
            case Kind.CARRY:  # what other trips have added: the trip at hand shows how
                return (yield step.reads[0], events)
            case Kind.JOIN:
                found = []
                for n in step.reads[1:]:
                    found += yield n, events
                return self._one(found, events)

    def _equation(self, step: Step, number: int, events: Events) -> _Visit:
        equation, name = step.equation, step.equation.primitive.name
        learned = [i for i, n in enumerate(step.reads) if n in self._learned]
        if equation.primitive is primitives.stop_gradient_p:
            return []
        if name in _MANY_OPERANDS:
            scalar = not equation.outputs[0].shape
            summands = self._summands(number) if scalar else step.reads
            # (a + b) / 2 is ½ (a + b): a scale.
            loop = scalar and len(summands) > 2
            added = (Event("added", (len(summands),)),) if loop else ()
            found = []
            for n in summands:
                found += yield n, (*events, *added)
            return self._one(found, events)
        if name == "select_n" and 0 not in learned:
            found = []
            for i in learned:
                mask = self._mask(step, number, i, step.reads[0], i - 1)
                found += yield step.reads[i], (*events, *mask)
            return self._one(found, events)
        if len(learned) != 1:
            return [count(events)]
        (own,) = learned
        aval = equation.inputs[own]
        if name in _ONE_OPERAND:
            pass
        elif name == "reduce_sum":
            events += (Event("sum", _sizes(aval, equation.params["axes"])),)
        elif name in _SUMS_OVER_DEVICES:
            mesh = jax.sharding.get_abstract_mesh().shape
            events += (Event("sum", tuple(mesh.get(a, 1) for a in equation.params["axes"])),)
        elif name == "div" and own == 0:
            events += self._divided(step.reads[1])
        elif name == "mul":
            events += self._multiplied(step, number, own, step.reads[1 - own])
        elif name == "dot_general":
            axes, batch = (part[own] for part in equation.params["dimension_numbers"])
            if len(axes) + len(batch) < len(aval.shape):
                return [count(events)]  # a matrix: its rows are no coefficients
            events += (Event("sum", _sizes(aval, axes)),)
        else:
            return [count(events)]
        return (yield step.reads[own], events)

    def _summands(self, number: Number) -> list[Number]:
        """The scalars of data that one was added up of one by one: by a loop in Python."""
        waiting, found = [number], []
        while waiting:  # no recursion: the loop may have been long
            number = waiting.pop()
            if number not in self._data:
                continue
            step, _ = self._writers[number]
            if step.kind is Kind.EQUATION and step.equation.primitive.name in _MANY_OPERANDS:
                waiting += step.reads
            else:
                found.append(number)
        return found

    def _one(self, found: list[Count], events: Events) -> list[Count]:
        """What summands within a mean differ in is no matter: the mean is over the sums."""
        found = list(dict.fromkeys(found))
        if len(found) > 1 and any(event.kind == "sum" for event in events):
            return [count(events)]
        return found

    def _divided(self, number: Number) -> Events:
        """A division by a variable, or by a number.

        Raises:
          Unknown: the variable depends on parameters.
        """
        number = self._source(number)
        if number in self._literals:
            return divided(float(self._literals[number]))
        if number not in self._values:
            raise Unknown
        return (Event("computed", number),)

    def _multiplied(self, product: Step, result: int, own: int, number: Number) -> Events:
        """A product with a variable, or with a number."""
        events: Events = ()
        while True:
            source = self._source(number)
            if source in self._literals:
                return (*events, *times(float(self._literals[source])))
            step, _ = self._writers.get(source, (None, 0))
            if step is None or step.kind is not Kind.EQUATION:
                break
            name = step.equation.primitive.name
            if name == "integer_pow" and step.equation.params["y"] == -1:
                return (*events, *self._divided(step.reads[0]))
            if name != "div":
                break
            # By a divisor that is known, then: m / sum(m), or 1 / n.
            events += self._divided(step.reads[1])
            number = step.reads[0]
            if self._source(number) in self._literals:
                return events
        return (*events, *self._mask(product, result, own, number, None))

    def _mask(self, step: Step, result: int, own: int, number: Number, case: int | None) -> Events:
        # A number for all terms leaves none of them out.
        other = step.equation.inputs[0 if case is not None else 1 - own]
        if number not in self._values or self._source(number) != number or other.size == 1:
            return ()
        return (Event("mask", Mask(result, own, number, case)),)

    def _source(self, number: Number) -> Number:
        """The number that a variable was broadcast or converted from; itself for an array."""
        while number in self._writers:
            step, _ = self._writers[number]
            equation = step.equation
            if step.kind is not Kind.EQUATION or equation.primitive.name not in _CONVERSIONS:
                break
            if equation.inputs[0].size != 1:
                break
            number = step.reads[0]
        return number


_CONVERSIONS = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "pcast", "pvary", "reshape", "squeeze"}
)


def _sizes(aval: Any, axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of some axes; 0 for a symbolic one, which the program computes where it counts."""
    return tuple(n if isinstance(n, int) else 0 for n in (aval.shape[a] for a in axes))


def examples(found: Sequence[Count]) -> int | None:
    """How many examples there are, as far as a mean tells: the size of its first axis."""
    firsts = {count.summed[0] for count in found if count.summed}
    return (firsts.pop() or None) if len(firsts) == 1 else None
