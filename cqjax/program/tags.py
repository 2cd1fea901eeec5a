"""What the walk knows of a variable: a view, a broadcast view, or a site's output.

A broadcast view is a bias on its way to the output that it is added to.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.extend.core import primitives

from cqjax.program import views
from cqjax.program.forms import Form
from cqjax.program.jaxprs import Equation
from cqjax.program.known import Constant
from cqjax.program.layout import Layout
from cqjax.program.sites import Site
from cqjax.program.views import View


@dataclasses.dataclass(frozen=True)
class Spread:
    """A view that has been broadcast.

    Attributes:
      view: what it was.
      sizes: along each axis of the variable, the view's size, or 1 where it is repeated.
      stopped: whether its gradient is stopped where it is repeated, at some places.
    """

    view: View
    sizes: tuple[int, ...]
    stopped: bool = False


@dataclasses.dataclass(frozen=True)
class Output:
    """A site's result, possibly with its entries moved.

    Attributes:
      site: the site's number.
      axes: for each axis of the variable, which of the sizes in the site's `form.output` it is
        made of.
      scale: what it has been multiplied by: a number, or one for each output, (B, o).
    """

    site: int
    axes: tuple[tuple[int, ...], ...]
    scale: Constant = Constant(1.0)


Tag = View | Spread | Output | None


def follow(equation: Equation, tag: View | Spread | Output, sites: Sequence[Site]) -> Tag:
    """The tag of a result that only moves or repeats its operand's entries; else None."""
    if isinstance(tag, Output):
        return _follow_output(equation, tag, sites[tag.site].form)
    tag = Spread(tag, tag.shape) if isinstance(tag, View) else tag
    if views.keeps_entries(equation):
        return tag
    if equation.primitive is not primitives.broadcast_in_dim_p:
        return None
    sizes = [1] * len(equation.outputs[0].shape)
    for axis, size in zip(equation.params["broadcast_dimensions"], tag.sizes, strict=True):
        sizes[axis] = size
    return dataclasses.replace(tag, sizes=tuple(sizes))


def _follow_output(equation: Equation, tag: Output, form: Form) -> Output | None:
    """The tag of a site's output after an operation that only moves its entries; else None."""
    primitive, params = equation.primitive, equation.params
    axes, shape = tag.axes, equation.outputs[0].shape
    if primitive is primitives.transpose_p:
        axes = tuple(axes[i] for i in params["permutation"])
    elif primitive in (primitives.reshape_p, primitives.squeeze_p):
        if params.get("dimensions") and primitive is primitives.reshape_p:
            axes = tuple(axes[i] for i in params["dimensions"])
        regrouped = _regroup([i for axis in axes for i in axis], form.output.sizes, shape)
        if regrouped is None:
            return None
        axes = regrouped
    elif not views.keeps_entries(equation):
        return None
    return dataclasses.replace(tag, axes=axes)


def scaled(
    tag: View | Spread | Output, by: np.ndarray, sites: Sequence[Site]
) -> View | Spread | Output | None:
    """The tag of the variable's product with a constant, () or of its shape; None if it has none.

    A bias must be the same in all rows, and so must the factor of an output that one is added to.
    """
    by = Constant(by).value
    if isinstance(tag, View):
        return views.scaled(tag, by)
    if isinstance(tag, Spread):
        factor = _constant_along([size == 1 for size in tag.sizes], by)
        if factor is None:
            return None
        factor = factor.reshape(tag.view.shape) if factor.ndim else factor
        return dataclasses.replace(tag, view=views.scaled(tag.view, factor))
    factor = _of_outputs(sites[tag.site].form, tag.axes, by)
    if factor is None or not np.all(factor):
        return None
    return dataclasses.replace(tag, scale=Constant(tag.scale.value * factor))


def _of_outputs(form: Form, axes: tuple[tuple[int, ...], ...], by: np.ndarray) -> np.ndarray | None:
    """A factor of a site's moved output as () or (B, o); None if it differs from row to row."""
    rows = form.output.groups[1]
    factor = _constant_along([not set(axis).isdisjoint(rows) for axis in axes], by)
    if factor is None or not factor.ndim:
        return factor
    layout = bias_layout(form, axes, factor.shape)
    return None if layout is None else layout.pack(factor)


def _constant_along(which: Sequence[bool], array: np.ndarray) -> np.ndarray | None:
    """The array with length 1 along some axes, () if it is a number; None if it differs there."""
    if not array.ndim:
        return array
    first = array[tuple(slice(0, 1) if along else slice(None) for along in which)]
    return first if np.all(array == first) else None


def _regroup(
    factors: list[int], sizes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """Which factors each axis of a reshaped output is made of, or None if it cuts one in two."""
    remaining = [i for i in factors if sizes[i] != 1]
    axes = []
    for size in shape:
        axis, product = [], 1
        while product < size and remaining:
            axis.append(remaining.pop(0))
            product *= sizes[axis[-1]]
        if product != size:
            return None
        axes.append(tuple(axis))
    return tuple(axes) if not remaining else None


def bias_layout(
    form: Form, axes: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]
) -> Layout | None:
    """Layout (B, o) of a view that is added along output axes only; None if it is no bias."""
    lengths, (batch, rows, outputs) = form.output.sizes, form.output.groups
    kept: list[int] = []
    for axis, size in zip(axes, sizes, strict=True):
        factors = [i for i in axis if lengths[i] != 1]
        if all(i in rows for i in factors) and size == 1:
            continue
        if any(i in rows for i in factors) or size != math.prod(lengths[i] for i in factors):
            return None
        kept += factors
    groups = [[kept.index(i) for i in group if i in kept] for group in (batch, outputs)]
    if len(kept) != sum(lengths[i] != 1 for i in (*batch, *outputs)):
        return None
    return Layout(tuple(lengths[i] for i in kept), (tuple(groups[0]), tuple(groups[1])))
