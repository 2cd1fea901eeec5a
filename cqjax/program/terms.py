"""How many terms a loss averages over, read off its program.

From the loss the walk goes back through what is linear and does not depend on parameters: sums,
divisions, products, selections, moves. So the loss is Σᵢ cᵢ ℓᵢ, and N is the divisor of this sum.
A divisor that is a number counts where it is the size of axes that were summed; another is a scale
of the loss, as ½ is. A computed divisor (the sum of a mask) counts where a sum has no other.
"""

import itertools
import math
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.extend.core import primitives

from cqjax.program.steps import Kind, Number, Program, Step
from cqjax.program.values import Values

_ONE_OPERAND = frozenset(
    """broadcast_in_dim convert_element_type copy expand_dims name neg pcast pvary reduce_precision
    reshape rev sharding_constraint slice squeeze transpose""".split()
)
_MANY_OPERANDS = frozenset({"add", "add_any", "sub", "concatenate", "pad"})
_SUMS_OVER_DEVICES = frozenset({"psum", "psum_invariant", "psum2"})
_VISITS = 10_000  # more than any loss should need, and few enough to be done in a blink


class Mask(NamedTuple):
    """Where terms have the coefficient zero.

    Attributes:
      result: a variable that is a product, or a selection.
      operand: the operand of it that the terms are.
      mask: the other factor, or the variable that selects.
      case: the value of `mask` that selects the terms; None for a product.
    """

    result: int
    operand: int
    mask: int
    case: int | None


class Count(NamedTuple):
    """The divisor of a sum of terms.

    Attributes:
      number: the part of it that the program has as a number.
      sizes: the sizes of the axes whose product that is.
      computed: the variables that are its other factors; of an array the mean is.
      summed: the sizes of the axes that were summed over together with these, or with none.
      masks: where the sum leaves terms out.
    """

    number: int
    sizes: tuple[int, ...]
    computed: tuple[int, ...]
    summed: tuple[int, ...]
    masks: tuple[Mask, ...]

    def __str__(self) -> str:
        """In words, after "N is"."""
        sizes = " × ".join(map(str, self.sizes))
        if self.computed:
            return f"{sizes} × the computed divisor" if sizes else "the computed divisor of the sum"
        return f"{self.number}, mean over {sizes} terms" if sizes else "1, a sum"


class _Event(NamedTuple):
    """Something on the way from the loss to its terms.

    Attributes:
      kind: "sum" over axes of some sizes, "added" up one by one, "divided" by a number, "times" a
        number, "computed" divisor, or "mask".
      value: the sizes, the number of summands (one size), the number, its variable, or the `Mask`.
    """

    kind: str
    value: Any


_Events = tuple[_Event, ...]


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


class _Unknown(Exception):
    """The loss is no sum that the walk can read."""


class _Walk:
    def __init__(self, program: Program, parameters: int, outputs: Set[int], values: Values):
        self._loss = program.outputs[0]
        self._literals = program.literals
        self._writers = {n: (step, i) for step in program.steps for i, n in enumerate(step.writes)}
        self._learned = program.dependent(program.inputs[:parameters])
        self._outputs = outputs
        self._data = program.dependent(outputs)
        self._values = values
        self._visits = 0

    def counts(self) -> tuple[Count, ...]:
        try:
            return tuple(dict.fromkeys(self._visit(self._loss, ())))
        except (_Unknown, RecursionError):  # a chain of sums too long to follow is unknown, too
            return ()

    def _visit(self, number: Number, events: _Events) -> list[Count]:
        """The divisors of the terms that a variable holds, after some events.

        Raises:
          _Unknown: the loss is too large a sum.
        """
        self._visits += 1
        if number not in self._data:
            return []
        if self._visits > _VISITS:
            raise _Unknown
        if number in self._outputs:
            return [self._count(events)]
        step, i = self._writers[number]
        match step.kind:
            case Kind.EQUATION:
                return self._equation(step, number, events)
            case Kind.ENTER | Kind.CLOSE | Kind.SLICE | Kind.STACK:
                return self._visit(step.reads[i], events)
            case Kind.LAST:
                trips = _Event("sum", (step.equation.params.get("length", 1),))
                return self._visit(step.reads[i], (*events, trips))
            case Kind.CARRY:  # what other trips have added: the trip at hand shows how
                return self._visit(step.reads[0], events)
            case Kind.JOIN:
                found = [count for n in step.reads[1:] for count in self._visit(n, events)]
                return self._one(found, events)

    def _equation(self, step: Step, number: int, events: _Events) -> list[Count]:
        equation, name = step.equation, step.equation.primitive.name
        learned = [i for i, n in enumerate(step.reads) if n in self._learned]
        if equation.primitive is primitives.stop_gradient_p:
            return []
        if name in _MANY_OPERANDS:
            scalar = not equation.outputs[0].shape
            summands = self._summands(number) if scalar else step.reads
            # (a + b) / 2 is ½ (a + b): a scale.
            loop = scalar and len(summands) > 2
            added = (_Event("added", (len(summands),)),) if loop else ()
            found = [count for n in summands for count in self._visit(n, (*events, *added))]
            return self._one(found, events)
        if name == "select_n" and 0 not in learned:
            results = []
            for i in learned:
                mask = self._mask(step, number, i, step.reads[0], i - 1)
                results += self._visit(step.reads[i], (*events, *mask))
            return self._one(results, events)
        if len(learned) != 1:
            return [self._count(events)]
        (own,) = learned
        aval = equation.inputs[own]
        if name in _ONE_OPERAND:
            pass
        elif name == "reduce_sum":
            events += (_Event("sum", _sizes(aval, equation.params["axes"])),)
        elif name in _SUMS_OVER_DEVICES:
            mesh = jax.sharding.get_abstract_mesh().shape
            events += (_Event("sum", tuple(mesh.get(a, 1) for a in equation.params["axes"])),)
        elif name == "div" and own == 0:
            events += self._divided(step.reads[1])
        elif name == "mul":
            events += self._multiplied(step, number, own, step.reads[1 - own])
        elif name == "dot_general":
            axes, batch = (part[own] for part in equation.params["dimension_numbers"])
            if len(axes) + len(batch) < len(aval.shape):
                return [self._count(events)]  # a matrix: its rows are no coefficients
            events += (_Event("sum", _sizes(aval, axes)),)
        else:
            return [self._count(events)]
        return self._visit(step.reads[own], events)

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

    def _one(self, found: list[Count], events: _Events) -> list[Count]:
        """What summands within a mean differ in is no matter: the mean is over the sums."""
        found = list(dict.fromkeys(found))
        if len(found) > 1 and any(event.kind == "sum" for event in events):
            return [self._count(events)]
        return found

    def _divided(self, number: Number) -> _Events:
        """A division by a variable, or by a number.

        Raises:
          _Unknown: the variable depends on parameters.
        """
        number = self._source(number)
        if number in self._literals:
            return (_Event("divided", float(self._literals[number])),)
        if number not in self._values:
            raise _Unknown
        return (_Event("computed", number),)

    def _multiplied(self, product: Step, result: int, own: int, number: Number) -> _Events:
        """A product with a variable, or with a number."""
        source = self._source(number)
        if source in self._literals:
            return (_Event("times", float(self._literals[source])),)
        step, _ = self._writers.get(source, (None, 0))
        if step is not None and step.kind is Kind.EQUATION:
            name = step.equation.primitive.name
            if name == "div":  # by a divisor that is known, then: m / sum(m), or 1 / n
                divided = self._divided(step.reads[1])
                if self._source(step.reads[0]) in self._literals:
                    return divided
                return (*divided, *self._multiplied(product, result, own, step.reads[0]))
            if name == "integer_pow" and step.equation.params["y"] == -1:
                return self._divided(step.reads[0])
        return self._mask(product, result, own, number, None)

    def _mask(self, step: Step, result: int, own: int, number: Number, case: int | None) -> _Events:
        # A number for all terms leaves none of them out.
        other = step.equation.inputs[0 if case is not None else 1 - own]
        if number not in self._values or self._source(number) != number or other.size == 1:
            return ()
        return (_Event("mask", Mask(result, own, number, case)),)

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

    def _count(self, events: _Events) -> Count:
        """N, of all that happened between the loss and its terms.

        Raises:
          _Unknown: nothing was summed.
        """
        axes = [
            _Axis(at, i, size)
            for at, event in enumerate(events)
            if event.kind in ("sum", "added")
            for i, size in enumerate(event.value)
        ]
        if not any(event.kind == "sum" for event in events):
            raise _Unknown
        number, sizes, ends = 1, [], []
        for at, event in enumerate(events):
            matched = []
            if event.kind == "divided":
                matched = _matching(axes, event.value)
            elif event.kind == "times" and event.value:
                # A weight of 0.1 is a weight, even where ten outputs were summed. 1 / n, the
                # inverse of all that was summed at once, is not.
                first = min((axis.event for axis in axes if axis.event > at), default=None)
                together = [axis for axis in axes if axis.event == first]
                if _product(together) > 2 and _close(_product(together), 1 / event.value):
                    matched = together
            if matched:
                axes = [axis for axis in axes if axis not in matched]
                number *= _product(matched)
                sizes += [axis.size for axis in matched]
                ends += [axis.event for axis in matched]
        computed = []
        free = {axis.event for axis in axes if events[axis.event].kind == "sum"}
        for at, event in enumerate(events):
            if event.kind == "computed" and free:
                computed.append(event.value)
                ends.append(min((end for end in free if end > at), default=max(free)))
        sums = [at for at, event in enumerate(events) if event.kind == "sum"]
        last = max(ends, default=sums[0])
        following = min((at for at in sums if at > last), default=len(events))
        masks = tuple(e.value for e in events[:following] if e.kind == "mask")
        outermost = events[min(ends, default=sums[0])].value
        return Count(number, tuple(sizes), tuple(computed), outermost, masks)


_CONVERSIONS = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "pcast", "pvary", "reshape", "squeeze"}
)


def _sizes(aval: Any, axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of some axes; 0 for a symbolic one, which the program computes where it counts."""
    return tuple(n if isinstance(n, int) else 0 for n in (aval.shape[a] for a in axes))


class _Axis(NamedTuple):
    """An axis that was summed over: by which event, which of its axes, and its size."""

    event: int
    number: int
    size: int


def _close(size: int, divisor: float) -> bool:
    """Whether a divisor is this size, as nearly as float32 can write it."""
    return math.isclose(size, divisor, rel_tol=1e-6)


def _product(axes: Sequence[_Axis]) -> int:
    return math.prod(axis.size for axis in axes)


def _matching(axes: Sequence[_Axis], divisor: float) -> list[_Axis]:
    """The summed axes whose sizes have the divisor as their product; as few as possible."""
    if divisor < 1.5:
        return []
    axes = [axis for axis in axes if axis.size > 1]
    for number in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, number):
            if _close(_product(chosen), divisor):
                return list(chosen)
    return []


def examples(found: Sequence[Count]) -> int | None:
    """How many examples there are, as far as a mean tells: the size of its first axis."""
    firsts = {count.summed[0] for count in found if count.summed}
    return (firsts.pop() or None) if len(firsts) == 1 else None
