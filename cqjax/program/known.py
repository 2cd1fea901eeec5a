"""What a program's text fixes: numbers in it, and what it computes of them.

A scale of a weight, a mask, or a loop's counter is the same in each call of the loss. It is
computed while the loss is traced, when somebody asks for it. What comes of an array among the
loss's arguments is never known, traced or not: so a plan is the same under `jax.jit` as without.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives

from cqjax.program.steps import Constants, Kind, Number, Program, Step

# What is computed: cheap, without bodies, and the same in each call.
_COMPUTED = frozenset(
    "abs add and broadcast_in_dim clamp concatenate convert_element_type copy cos cumsum div eq "
    "exp floor ge gt integer_pow iota le log lt max min mul ne neg not or pad pow reduce_sum rem "
    "reshape rev rsqrt select_n sign sin slice sqrt square squeeze sub transpose".split()
)


class Constant:
    """An array that belongs to a program's text: hashable, and equal if its entries are.

    One whose entries are all equal is kept as a scalar.

    Attributes:
      value: the array.
    """

    def __init__(self, value: Any):
        value = np.asarray(value)
        uniform = value.size > 0 and bool(np.all(value == value.flat[0]))
        self.value = value.ravel()[0].reshape(()) if uniform else value

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.value.shape, self.value.dtype.name, self.value.tobytes()

    def __eq__(self, other: object) -> bool:
        """Whether the other's entries are the same."""
        return isinstance(other, Constant) and self._key == other._key

    def __hash__(self) -> int:
        """A hash of the entries."""
        return hash(self._key)


class Value(NamedTuple):
    """What is known of a variable.

    Attributes:
      array: its value; with an axis in front for each of the `levels`.
      levels: the nesting levels of those loops around it, outermost first, whose trips have values
        of their own.
    """

    array: np.ndarray
    levels: tuple[int, ...] = ()


class Known:
    """The values that a program's text fixes, by variable. Computed when asked for."""

    def __init__(self, program: Program, constants: Constants, arguments: Sequence[Any]):
        """Prepares for questions.

        Args:
          program: the program.
          constants: its constants.
          arguments: the loss's arguments: constants of the program too, but never known.
        """
        self._writers = {
            number: (step, i) for step in program.steps for i, number in enumerate(step.writes)
        }
        self._values: dict[Number, Value | None] = {
            number: Value(np.asarray(value)) for number, value in program.literals.items()
        }
        self._constants = {n: const for n, const in constants if n not in self._writers}
        self._arguments = arguments

    def __call__(self, variable: Number) -> Value | None:
        """The variable's value, or None where it is not known."""
        waiting = [variable]  # no recursion: a constant may have come through many steps
        while waiting:
            lacking = [n for n in self._operands(waiting[-1]) if n not in self._values]
            if lacking and waiting[-1] not in self._values:
                waiting += lacking
                continue
            last = waiting.pop()
            if last not in self._values:
                self._values[last] = None  # while it is computed: what needs itself is not known
                self._values[last] = self._computed(last)
        return self._values[variable]

    def _operands(self, variable: Number) -> Sequence[Number]:
        """What is computed before the variable."""
        step, i = self._writers.get(variable, (None, 0))
        if step is None or variable in self._constants:
            return ()
        match step.kind:
            case Kind.EQUATION if step.equation.primitive.name in _COMPUTED:
                return step.reads
            case Kind.ENTER | Kind.SLICE:
                return step.reads[i : i + 1]
            case _:
                return ()

    def scalar(self, variable: Number, value: float) -> bool:
        """Whether all entries of the variable are known to be this number."""
        known = self(variable)
        return known is not None and bool(np.all(known.array == value))

    def factor(self, step: Step, at: int) -> np.ndarray | None:
        """What an equation multiplies its operand number `at` by; None if it does something else.

        It is a number, or an array of the operand's shape.
        """
        name = step.equation.primitive.name
        shape = step.equation.outputs[0].shape
        if name not in ("neg", "mul", "div", "select_n") or step.equation.inputs[at].shape != shape:
            return None
        others = [self(n) for i, n in enumerate(step.reads) if i != at]
        arrays = [known.array for known in others if known is not None and not known.levels]
        arrays = [np.broadcast_to(a, shape) if a.ndim else a for a in arrays]
        if len(arrays) < len(others):
            return None
        match name:
            case "neg":
                return np.array(-1.0)
            case "mul":
                return arrays[0].astype(float)
            case "div" if at == 0 and np.all(arrays[0]):
                return 1 / arrays[0].astype(float)
            case "select_n" if at > 0 and not any(map(np.any, arrays[1:])):
                return (arrays[0].astype(int) == at - 1).astype(float)
            case _:
                return None

    def _computed(self, variable: Number) -> Value | None:
        if variable in self._constants:
            return self._constant(self._constants[variable])
        if variable not in self._writers:
            return None  # an input
        step, i = self._writers[variable]
        match step.kind:
            case Kind.EQUATION if step.equation.primitive.name in _COMPUTED:
                return self._result(step)
            case Kind.ENTER:
                return self(step.reads[i])
            case Kind.SLICE:
                whole, level = self(step.reads[i]), len(step.loops)
                return None if whole is None else Value(whole.array, (*whole.levels, level))
            case Kind.CARRY:
                return self._counter(step)
            case _:
                return None

    def _constant(self, const: Any) -> Value | None:
        if isinstance(const, Tracer) or any(_same(const, leaf) for leaf in self._arguments):
            return None
        return Value(np.asarray(const))

    def _result(self, step: Step) -> Value | None:
        values = [self(n) for n in step.reads]
        found = [value for value in values if value is not None]
        if len(found) < len(values):
            return None
        levels = tuple(sorted({level for value in found for level in value.levels}))
        compute = functools.partial(step.equation.primitive.bind, **step.equation.params)
        for level in reversed(levels):  # the outermost loop's axis is the first, so it comes last
            axes = tuple(0 if level in value.levels else None for value in found)
            compute = jax.vmap(compute, axes)
        with jax.ensure_compile_time_eval():
            return Value(np.asarray(compute(*(value.array for value in found))), levels)

    def _counter(self, step: Step) -> Value | None:
        """A carry to which each trip adds the same number."""
        first, after = step.reads
        start, (carry,) = self(first), step.writes
        add, _ = self._writers.get(after, (None, 0))
        if start is None or start.array.ndim or start.levels or add is None:
            return None
        if add.kind is not Kind.EQUATION or add.equation.primitive is not primitives.add_p:
            return None
        others = [n for n in add.reads if n != carry]
        by = self(others[0]) if len(others) == 1 else None
        if by is None or by.array.ndim or by.levels:
            return None
        params = step.equation.params
        trips = np.arange(params["length"], dtype=start.array.dtype)
        if params["reverse"]:  # a trip's number is that of the slices it reads
            trips = trips[::-1]
        return Value(start.array + by.array * trips, (len(step.loops),))


def _same(const: Any, argument: Any) -> bool:
    """Whether a constant is, or may be, an argument."""
    if const is argument:
        return True
    if not isinstance(argument, np.ndarray) or argument.shape != const.shape:
        return False
    return np.array_equal(argument.astype(const.dtype), np.asarray(const))
