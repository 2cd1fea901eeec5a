"""N, the divisor of a sum, from what happened between a loss and its terms."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple


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


class Event(NamedTuple):
    """Something on the way from the loss to its terms.

    Attributes:
      kind: "sum" over axes of some sizes, "added" up one by one, "divided" by a number, "times" a
        number, "computed" divisor, or "mask".
      value: the sizes, the number of summands (one size), the number, its variable, or the `Mask`.
    """

    kind: str
    value: Any


Events = tuple[Event, ...]


def divided(number: float) -> Events:
    """A division by a number. One that can be no number of terms is a scale of the loss."""
    whole = math.isfinite(number) and number >= 1.5 and _close(round(number), number)
    return (Event("divided", number),) if whole else ()


def times(number: float) -> Events:
    """A multiplication by a number. As a division, a half is a scale: see `count`."""
    return (Event("times", number),) if number and divided(1 / number) else ()


class Unknown(Exception):
    """The loss is no sum that the walk can read."""


def count(events: Events) -> Count:
    """N, of all that happened between the loss and its terms.

    Raises:
      Unknown: nothing was summed.
    """
    axes = [
        _Axis(at, i, size)
        for at, event in enumerate(events)
        if event.kind in ("sum", "added")
        for i, size in enumerate(event.value)
    ]
    if not any(event.kind == "sum" for event in events):
        raise Unknown
    number, sizes, ends = 1, [], []
    for at, event in enumerate(events):
        matched = []
        if event.kind == "divided":
            matched = _matching(axes, event.value)
        elif event.kind == "times":
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
