"""Which rows of a layer's output reach the loss's terms.

A loss may leave terms out (a mask, padding), or take a part of an output alone (one of two batches
that went through the network together). The rows that reach no term are no examples. The walk goes
back from the loss. It knows for each variable along which axes entries stay apart, and which of
them count. Where an operation mixes entries along an axis (attention, batch normalisation, loops),
all of them count as soon as one of the results does.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.program.divisors import Mask
from cqjax.program.jaxprs import Equation
from cqjax.program.steps import Kind, Program, Step, differentiable, differentiated

Live = Any
"""True where all entries count, else whether each does: a boolean array with the variable's axes,
of which those have length 1 along which all are alike. NumPy's where no mask had a say."""

_ALONG_ONE_AXIS = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"})


def live(
    program: Program, masks: Sequence[Mask], values: Mapping[int, Any], wanted: Set[int]
) -> dict[int, Live]:
    """Which entries of some variables reach the loss's terms.

    Args:
      program: the loss, its first output.
      masks: where terms have the coefficient zero.
      values: of the variables that the masks name.
      wanted: the variables.

    Returns:
      Those whose entries do not all count.
    """
    walk = _Walk(program, masks, values)
    return {n: walk.found[n] for n in wanted if walk.found.get(n, True) is not True}


class _Walk:
    def __init__(self, program: Program, masks: Sequence[Mask], values: Mapping[int, Any]):
        self._masks = {(mask.result, mask.operand): mask for mask in masks}
        self._values = values
        self._writers = {n: step for step in program.steps for n in step.writes}
        needed = program.needed(program.outputs[:1], differentiated)
        self.found: dict[int, Live] = {program.outputs[0]: True}
        for step in reversed(program.steps):
            results = [self.found.get(n) if n in needed else None for n in step.writes]
            if step.loops or not differentiable(step):
                continue  # within loops all entries count
            if any(result is not None for result in results):
                self._step(step, results)

    def _step(self, step: Step, results: list[Live]) -> None:
        match step.kind:
            case Kind.EQUATION:
                for i, number in enumerate(step.reads):
                    self._add(number, self._operand(step, i, results))
            case Kind.ENTER | Kind.CLOSE:
                for number, result in zip(step.reads, results, strict=True):
                    if result is not None:
                        self._add(number, result)
            case Kind.JOIN:
                for number in step.reads[1:]:
                    self._add(number, results[0])
            case _:
                for number in step.reads:
                    self._add(number, True)

    def _add(self, number: int, result: Live) -> None:
        """Counts what one more use of a variable needs."""
        known = self.found.get(number)
        if known is None or result is True or known is True:
            self.found[number] = result if known is None else True
        elif known is not result:
            self.found[number] = known | result

    def _operand(self, step: Step, i: int, results: list[Live]) -> Live:
        rows = self._counted(step) if step.equation.primitive.name == "gather" else {}
        result = _operand(step.equation, i, results, rows)
        mask = self._masks.get((step.writes[0], i))
        if mask is None:
            return result
        value = jnp.asarray(self._values[mask.mask])
        counts = value != 0 if mask.case is None else value == mask.case
        shape = step.equation.inputs[i].shape
        counts = counts.reshape(counts.shape or (1,) * len(shape))
        repeated = tuple(a for a, n in enumerate(shape) if n < counts.shape[a])
        counts = counts.any(repeated, keepdims=True)
        return counts if result is True else counts & result

    def _counted(self, step: Step) -> dict[int, int]:
        """Axes of a gather's operand that are indexed by 0, 1, 2, …: `x[jnp.arange(n), y]`.

        Returns:
          For each, the axis of the indices along which they count.
        """
        numbers = step.equation.params["dimension_numbers"]
        mapped, indices = numbers.start_index_map, step.reads[1]
        joined = self._writers.get(indices)
        parts = [indices]
        if joined is not None and joined.equation.primitive.name == "concatenate":
            last = len(joined.equation.outputs[0].shape) - 1
            if joined.equation.params["dimension"] == last:
                parts = list(joined.reads)
        if len(parts) != len(mapped):
            return {}
        found = {}
        for axis, part in zip(mapped, parts, strict=True):
            along = self._count_along(part, step.equation.inputs[0].shape[axis])
            if along is not None:
                found[axis] = along
        return found

    def _count_along(self, number: int, size: int) -> int | None:
        """The axis along which a variable is 0, 1, 2, … up to a size; None if there is none."""
        step = self._writers.get(number)
        places: dict[int, int] | None = None  # of the axes at hand among the variable's own
        while step is not None and step.kind is Kind.EQUATION:
            name, params = step.equation.primitive.name, step.equation.params
            if name == "iota":
                axis = params["dimension"]
                whole = step.equation.outputs[0].shape[axis] == size
                return (axis if places is None else places[axis]) if whole else None
            if name == "broadcast_in_dim":
                axes = params["broadcast_dimensions"]
                places = {k: a if places is None else places[a] for k, a in enumerate(axes)}
            elif name == "select_n":  # it wraps indices that are negative: these are not
                sign = self._writers.get(step.reads[0])
                if sign is None or sign.equation.primitive.name != "lt":
                    return None
                if sign.reads[0] != step.reads[1]:
                    return None
            elif name != "convert_element_type":
                return None
            step = self._writers.get(step.reads[1 if name == "select_n" else 0])
        return None


def _operand(equation: Equation, i: int, results: list[Live], counted: Mapping[int, int]) -> Live:
    """Which entries of an equation's operand count, by those of its results.

    Args:
      equation: the equation.
      i: the operand's number.
      results: which entries of the results count.
      counted: of a gather, the operand's axes that go along with an axis of the indices.
    """
    name, params, shape = equation.primitive.name, equation.params, equation.inputs[i].shape
    if name == "split":
        return _joined(equation, results)
    (result,) = results if len(results) == 1 else (True,)
    if name == "slice":
        return _placed(result, equation.outputs[0].shape, params, shape)
    if result is True:
        return True
    out = equation.outputs[0].shape
    if name == "concatenate":
        axis = params["dimension"]
        start = sum(aval.shape[axis] for aval in equation.inputs[:i])
        return _cut(result, axis, start, start + shape[axis])
    if name == "pad" and i == 0:
        return _unpadded(result, out, params["padding_config"])
    if name == "rev":
        return result[
            tuple(
                slice(None, None, -1 if a in params["dimensions"] else 1) for a in range(len(out))
            )
        ]
    if name == "reshape" and params.get("dimensions") is None:
        return _reshaped(result, out, shape)
    if name == "gather" and i == 0:
        return _taken(result, _axes_of_gather(equation, counted))
    axes = _axes(equation, i)
    return True if axes is None else _taken(result, axes)


def _axes(equation: Equation, i: int) -> list[int | None] | None:
    """For each axis of an operand the result's axis along which it has the same entries.

    None for an axis along which entries are mixed; and instead of all, where all are.
    """
    name, params = equation.primitive.name, equation.params
    shape, out = equation.inputs[i].shape, equation.outputs[0].shape
    rank = len(shape)
    if equation.pointwise:
        # An axis of length 1 is repeated along the result's.
        return (
            [a if shape[a] == out[a] else None for a in range(rank)] if rank == len(out) else None
        )
    if name == "broadcast_in_dim":
        return [
            a if out[a] == n else None
            for a, n in zip(params["broadcast_dimensions"], shape, strict=True)
        ]
    if name == "transpose":
        return [params["permutation"].index(a) for a in range(rank)]
    if name == "squeeze" or name.startswith(("reduce_", "arg")) and "axes" in params:
        gone = params["dimensions"] if name == "squeeze" else params["axes"]
        kept = iter(range(len(out)))
        return [None if a in gone else next(kept) for a in range(rank)]
    if name in _ALONG_ONE_AXIS:
        mixed = params["dimension" if name == "sort" else "axis"]
        return [None if a == mixed else a for a in range(rank)]
    if name.startswith("reduce_window") and "window_dimensions" in params:
        return [
            a if n == 1 and shape[a] == out[a] else None
            for a, n in enumerate(params["window_dimensions"])
        ]
    if name == "dot_general":
        return _axes_of_product(equation, i)
    if name == "conv_general_dilated" and i == 0 and params["batch_group_count"] == 1:
        numbers = params["dimension_numbers"]
        return [numbers.out_spec[0] if a == numbers.lhs_spec[0] else None for a in range(rank)]
    if name == "dynamic_slice" and i == 0:
        return [a if shape[a] == out[a] else None for a in range(rank)]
    return None


def _axes_of_product(equation: Equation, i: int) -> list[int | None]:
    contracting, batch = equation.params["dimension_numbers"]
    ranks = [len(aval.shape) for aval in equation.inputs[:2]]
    free = [[a for a in range(ranks[j]) if a not in (*contracting[j], *batch[j])] for j in range(2)]
    start = len(batch[0]) + (len(free[0]) if i == 1 else 0)
    places = {a: k for k, a in enumerate(batch[i])}
    places |= {a: start + k for k, a in enumerate(free[i])}
    return [places.get(a) for a in range(ranks[i])]


def _axes_of_gather(equation: Equation, counted: Mapping[int, int]) -> list[int | None]:
    """Axes of which whole slices are taken, and those that go along with the indices'."""
    params = equation.params
    numbers, shape = params["dimension_numbers"], equation.inputs[0].shape
    out = range(len(equation.outputs[0].shape))
    of_indices = [a for a in out if a not in numbers.offset_dims]
    batching = dict(
        zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    )
    offsets = iter(numbers.offset_dims)
    axes: list[int | None] = []
    for a, size in enumerate(shape):
        if a in batching or a in counted:
            axes.append(of_indices[batching[a] if a in batching else counted[a]])
        elif a in numbers.collapsed_slice_dims:
            axes.append(None)
        else:
            offset = next(offsets)
            axes.append(offset if params["slice_sizes"][a] == size else None)
    return axes


def _taken(result: Live, axes: Sequence[int | None]) -> Live:
    """The result's axes, in the operand's order; any entry counts along those that are mixed."""
    kept = [a for a in axes if a is not None]
    gone = tuple(a for a in range(result.ndim) if a not in kept)
    order = sorted(kept)
    moved = result.any(gone).transpose([order.index(a) for a in kept])
    return moved.reshape([1 if a is None else result.shape[a] for a in axes])


def _cut(result: Live, axis: int, start: int, stop: int) -> Live:
    if result.shape[axis] == 1:
        return result
    return result[(slice(None),) * axis + (slice(start, stop),)]


def _placed(
    result: Live, out: Sequence[int], params: Mapping[str, Any], shape: Sequence[int]
) -> Live:
    """A slice's entries in the place that they were taken from; the others do not count."""
    if result is True and tuple(out) == tuple(shape):
        return True
    if result is True:
        result = np.ones((1,) * len(shape), bool)
    strides = params["strides"] or (1,) * len(shape)
    for a, (size, start, stride) in enumerate(
        zip(shape, params["start_indices"], strides, strict=True)
    ):
        if out[a] == size:
            continue
        full = [out[a] if b == a else n for b, n in enumerate(result.shape)]
        part = jnp if isinstance(result, jax.Array) else np
        result = part.broadcast_to(result, full)
        where = (slice(None),) * a + (slice(start, start + (out[a] - 1) * stride + 1, stride),)
        empty = part.zeros([size if b == a else n for b, n in enumerate(full)], bool)
        if isinstance(empty, np.ndarray):
            empty[where] = result
            result = empty
        else:
            result = empty.at[where].set(result)
    return result


def _joined(equation: Equation, results: list[Live]) -> Live:
    """The parts that `split` made, one after the other."""
    axis, shape = equation.params["axis"], equation.inputs[0].shape
    if all(result is True for result in results):
        return True
    parts = []
    for result, aval in zip(results, equation.outputs, strict=True):
        part = result if hasattr(result, "shape") else np.full((1,) * len(shape), result is True)
        parts.append(
            jnp.broadcast_to(
                part,
                [
                    aval.shape[a]
                    if a == axis
                    else max(n, *(1 if r is None or r is True else r.shape[a] for r in results), 1)
                    for a, n in enumerate(part.shape)
                ],
            )
        )
    return jnp.concatenate(parts, axis)


def _unpadded(result: Live, out: Sequence[int], config: Sequence[tuple[int, int, int]]) -> Live:
    for a, (low, high, within) in enumerate(config):
        if result.shape[a] > 1 and (low < 0 or high < 0):
            result = result.any(a, keepdims=True)
        elif result.shape[a] > 1:
            result = result[(slice(None),) * a + (slice(low, out[a] - high, within + 1),)]
    return result


def _reshaped(result: Live, out: Sequence[int], shape: Sequence[int]) -> Live:
    """A reshape undone. Axes are brought to full length only where they are merged or split."""
    sizes, lengths, i, j = [], [], 0, 0
    while i < len(out) or j < len(shape):
        first, start = i, j
        a = out[i] if i < len(out) else 1
        b = shape[j] if j < len(shape) else 1
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * out[i], i + 1
            else:
                b, j = b * shape[j], j + 1
        i, j = min(i, len(out)), min(j, len(shape))
        alike = math.prod(result.shape[first:i]) == 1
        sizes += [1 if alike else n for n in out[first:i]]
        lengths += [1 if alike else n for n in shape[start:j]]
    part = jnp if isinstance(result, jax.Array) else np
    return part.broadcast_to(result, sizes).reshape(lengths)
