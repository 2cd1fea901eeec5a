"""What becomes of the positions of a layer's output, on its way through equations that are none."""

import itertools
import math
from typing import NamedTuple

from jax.export import is_symbolic_dim
from jax.extend.core import primitives

from cqjax.program.jaxprs import Equation

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_SAME_AXES = frozenset({"pad", "concatenate"})


class Trace(NamedTuple):
    """What has become of a layer's output on its way to a variable.

    Attributes:
      pooled: the fraction of its positions left.
      axes: the variable's axes that are positions; None where they are not known any more.
      averaged: the part that maxima or sums over whole axes have left. Those of the loss itself do
        not count: else the order in which it sums would change every rate.
    """

    pooled: float
    axes: tuple[int, ...] | None
    averaged: float = 1.0

    @property
    def left(self) -> float:
        """The part of its positions that is left to another layer."""
        return self.pooled * self.averaged


def through(equation: Equation, before: tuple[int, ...], trace: Trace) -> Trace:
    """A trace, of an operand of shape `before`, after an equation that is no layer.

    Pooling is what leaves fewer positions: windows, slices, and reductions of whole axes.
    """
    name, params, after = equation.primitive.name, equation.params, equation.outputs[0].shape
    if trace.axes is None or any(is_symbolic_dim(before[i]) for i in trace.axes):
        return trace._replace(axes=None)
    if name.startswith("reduce_window") or name == "slice":
        part = math.prod(after[i] / before[i] for i in trace.axes)
        return trace._replace(pooled=trace.pooled * part)
    if name in _REDUCTIONS or name == "squeeze":
        gone = params["dimensions" if name == "squeeze" else "axes"]
        kept = [i for i in range(len(before)) if i not in gone]
        axes = tuple(kept.index(i) for i in trace.axes if i in kept)
        if name == "squeeze":
            return trace._replace(axes=axes)
        if not set(gone) <= set(trace.axes):
            return trace._replace(axes=None)
        part = trace.averaged / math.prod(before[i] for i in gone)
        return trace._replace(axes=axes, averaged=part)
    if equation.primitive is primitives.transpose_p:
        order = params["permutation"]
        return trace._replace(axes=tuple(order.index(i) for i in trace.axes))
    if equation.primitive is primitives.broadcast_in_dim_p:
        return trace._replace(axes=tuple(params["broadcast_dimensions"][i] for i in trace.axes))
    if equation.primitive is primitives.reshape_p:
        return trace._replace(axes=_reshaped(trace.axes, before, after))
    same = before == after or name in _SAME_AXES
    return trace if same else trace._replace(axes=None)


def _reshaped(
    axes: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Which axes of a reshaped variable the given ones have become; None if they were merged."""
    # What is in front stays: so a symbolic number of examples need not be compared.
    alike = (a == b for a, b in zip(before, after, strict=False))
    same = sum(itertools.takewhile(bool, alike))
    found = [axis for axis in axes if axis < same]
    for axis in (axis for axis in axes if axis >= same):
        size, start = before[axis], math.prod(before[same:axis])
        parts = [
            i
            for i, length in enumerate(after)
            if i >= same and length > 1 and start <= math.prod(after[same:i]) < start * size
        ]
        if math.prod(after[i] for i in parts) != size or (
            parts and math.prod(after[same : parts[0]]) != start
        ):
            return None
        found += parts
    return tuple(found)
