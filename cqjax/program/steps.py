"""A loss's program as one flat list of steps.

A jaxpr is a tree: equations have bodies, which have equations. Here it is made a list, once, and
every analysis is a loop over it. `jit`, `remat` and `closed_call` are replaced by the steps of
their bodies. The bodies of `scan` and `cond` are entered too; what happens to a variable at their
borders is a step of a kind of its own. Everything else is opaque: one step, whatever is inside.

Variables are numbers. Each number is written by one step, so no analysis needs to know in which
body it is. Only a `CARRY` reads what a later step writes: an analysis that wants to know it repeats
its loop until nothing changes.
"""

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from jax.extend import core
from jax.extend.core import primitives

from cqjax.program import jaxprs
from cqjax.program.jaxprs import Equation

Position = tuple[int, ...]
"""Where an equation is: its index, after those of the equations (and branches) around it."""

Number = int
"""A variable, or a literal: each has a number of its own."""

CALLS = frozenset({primitives.jit_p, primitives.remat_p, primitives.closed_call_p})
"""Primitives that do what their body does, and no more."""


class Kind(enum.Enum):
    """What a step does.

    All but `EQUATION` stand at the border of a body. All but `EQUATION`, `CARRY` and `JOIN` do the
    same to each of their variables: the i-th that they write depends on the i-th read alone.
    """

    EQUATION = enum.auto()
    ENTER = enum.auto()  # into a branch, or as a constant of a scan: the same value
    CLOSE = enum.auto()  # into a platform's branch: the same, but taps cannot follow
    SLICE = enum.auto()  # into a scan: one trip's part
    CARRY = enum.auto()  # into a scan: (first, next), the initial value and each trip's result
    LAST = enum.auto()  # out of a scan: what the last trip leaves of a carry
    STACK = enum.auto()  # out of a scan: what all trips leave, stacked
    JOIN = enum.auto()  # out of a `cond`: (index, *results), one result for each branch


_ONE_BY_ONE = frozenset({Kind.ENTER, Kind.CLOSE, Kind.SLICE, Kind.LAST, Kind.STACK})


class Step(NamedTuple):
    """One step of a program.

    Attributes:
      kind: what it does.
      equation: the equation, or the one at whose border this is.
      position: where the equation is.
      loops: lengths of the scans around the equation, outermost first.
      recomputed: whether the backward pass computes it anew (`jax.checkpoint`).
      reads: the variables that it reads.
      writes: those that it writes.
    """

    kind: Kind
    equation: Equation
    position: Position
    loops: tuple[int, ...]
    recomputed: bool
    reads: tuple[Number, ...]
    writes: tuple[int, ...]

    def sources(self, i: int) -> tuple[Number, ...]:
        """What the i-th of its results depends on."""
        return self.reads[i : i + 1] if self.kind in _ONE_BY_ONE else self.reads


class Program(NamedTuple):
    """A program, without any value of it.

    Attributes:
      steps: its steps, in an order in which they can be taken.
      inputs: the variables that it is given.
      outputs: the variables that it returns.
      literals: the values of those that are literals: numbers that the loss's text holds.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Number, ...]
    literals: Mapping[Number, Any]

    def needed(
        self,
        outputs: Iterable[Number],
        sources: Callable[["Step", int], Iterable[Number]] = Step.sources,
        cut: Set[int] = frozenset(),
    ) -> Set[int]:
        """The variables on which some of its results depend, these included.

        Args:
          outputs: the results.
          sources: those on which a step's i-th result depends, in a way that counts.
          cut: variables of which it does not matter what they depend on.
        """
        found = set(outputs)
        while True:
            before = len(found)
            for step in reversed(self.steps):
                for i, written in enumerate(step.writes):
                    if written in found and written not in cut:
                        found.update(sources(step, i))
            if len(found) == before:
                return found

    def written(self, positions: Set[Position]) -> Set[int]:
        """The results of the equations at some positions."""
        return {n for step in self.steps if step.position in positions for n in step.writes}

    def dependent(self, variables: Iterable[int]) -> Set[int]:
        """The variables that depend on some of its variables, these included."""
        found = set(variables)
        while True:
            before = len(found)
            for step in self.steps:
                for i, written in enumerate(step.writes):
                    if written not in found and not found.isdisjoint(step.sources(i)):
                        found.add(written)
            if len(found) == before:
                return found


def differentiable(step: Step) -> bool:
    """Whether gradients pass through a step."""
    return step.equation.primitive is not primitives.stop_gradient_p


def differentiated(step: Step, i: int) -> tuple[Number, ...]:
    """What the gradient of a step's i-th result goes to."""
    return step.sources(i) if differentiable(step) else ()


Constants = list[tuple[int, Any]]
"""Constants, each with a variable that depends on it."""


def flatten(jaxpr: Any) -> tuple[Program, Constants]:
    """A jaxpr as a flat program, and the constants in it."""
    return _Flattening().program(jaxpr)


class _Place(NamedTuple):
    """Where a body or an equation is: see `Step`."""

    position: Position = ()
    loops: tuple[int, ...] = ()
    recomputed: bool = False

    def at(self, index: int) -> "_Place":
        """The place of something within."""
        return self._replace(position=(*self.position, index))


class _Flattening:
    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._constants: Constants = []
        self._literals: dict[Number, Any] = {}
        self._count = 0

    def program(self, jaxpr: Any) -> tuple[Program, Constants]:
        inputs = self._new(len(jaxprs.opened(jaxpr)[0].invars))
        outputs = self._body(jaxpr, inputs, _Place())
        return Program(tuple(self._steps), inputs, tuple(outputs), self._literals), self._constants

    def _new(self, number: int) -> tuple[int, ...]:
        """The numbers of new variables."""
        self._count += number
        return tuple(range(self._count - number, self._count))

    def _body(self, jaxpr: Any, inputs: Sequence[Number], place: _Place) -> list[Number]:
        """Adds the steps of a jaxpr. Returns its results."""
        jaxpr, consts = jaxprs.opened(jaxpr)
        constants = self._new(len(consts))
        self._constants += zip(constants, consts, strict=True)
        numbers: dict[Any, Number] = dict(zip(jaxpr.constvars, constants, strict=True))
        numbers.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atoms: Sequence[Any]) -> list[Number]:
            return [literal(a) if jaxprs.is_literal(a) else numbers[a] for a in atoms]

        def literal(atom: Any) -> Number:
            (number,) = self._new(1)
            self._literals[number] = jaxprs.value(atom, {})
            return number

        for i, eqn in enumerate(jaxpr.eqns):
            results = self._equation(eqn, read(eqn.invars), place.at(i))
            numbers.update(zip(eqn.outvars, results, strict=True))
        return read(jaxpr.outvars)

    def _equation(
        self, eqn: core.JaxprEqn, reads: Sequence[Number], place: _Place
    ) -> Sequence[Number]:
        """Adds what an equation does. Returns its results.

        A primitive with a body that is to be entered has its place here, and in
        `taps.Evaluation`, which evaluates it.
        """
        params = eqn.params
        if eqn.primitive in CALLS:
            if eqn.primitive is primitives.remat_p:
                place = place._replace(recomputed=True)
            body = params.get("jaxpr", params.get("call_jaxpr"))
            return self._body(body, reads, place)
        equation = jaxprs.equation(eqn)

        def step(kind: Kind, reads: Sequence[Number], number: int) -> tuple[int, ...]:
            writes = self._new(number)
            self._steps.append(Step(kind, equation, *place, tuple(reads), writes))
            return writes

        if eqn.primitive is primitives.cond_p:
            index, *operands = reads
            kind = Kind.CLOSE if params.get("branches_platforms") else Kind.ENTER
            # Each branch has variables of its own: of the one not taken, what is captured is zero.
            branches = [
                self._body(branch, step(kind, operands, len(operands)), place.at(i))
                for i, branch in enumerate(params["branches"])
            ]
            results = zip(*branches, strict=True)
            return [step(Kind.JOIN, (index, *each), 1)[0] for each in results]
        if eqn.primitive is primitives.scan_p:
            consts, carry = jaxprs.scan_arity(eqn)
            firsts, xs = reads[consts : consts + carry], reads[consts + carry :]
            constants = step(Kind.ENTER, reads[:consts], consts)
            slices = step(Kind.SLICE, xs, len(xs))
            border, carries = len(self._steps), self._new(carry)
            inner = place._replace(loops=(*place.loops, params["length"]))
            results = self._body(params["jaxpr"], (*constants, *carries, *slices), inner)
            # A carry that the body returns unchanged is a constant. That is known only now, and
            # the steps that bring the carries in belong before the body.
            enters, finals = [], []
            for first, inside, after in zip(firsts, carries, results[:carry], strict=True):
                kept = after == inside
                kind, read = (Kind.ENTER, (first,)) if kept else (Kind.CARRY, (first, after))
                enters.append(Step(kind, equation, *place, read, (inside,)))
                if kept or not params["length"]:
                    finals.append(first)  # without trips, too, the first value is the last
                else:
                    finals += step(Kind.LAST, (after,), 1)
            self._steps[border:border] = enters
            return [*finals, *step(Kind.STACK, results[carry:], len(results) - carry)]
        # `custom_jvp` and `custom_vjp` stay closed. Their rule takes the place of the body's, so a
        # tap in the body would never be differentiated.
        writes = step(Kind.EQUATION, reads, len(eqn.outvars))
        held = jaxprs.constants_within(eqn)
        self._constants += [(written, const) for written in writes for const in held]
        return writes
