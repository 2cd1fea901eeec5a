"""A lookup of rows of a table as Z = XW: X is one-hot, XᵀX the diagonal of counts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from cqjax.linalg import devices
from cqjax.program import views
from cqjax.program.jaxprs import Equation
from cqjax.program.known import Known
from cqjax.program.layout import Layout
from cqjax.program.steps import Step
from cqjax.program.views import View

READS = frozenset({primitives.gather_p, primitives.dynamic_slice_p})
"""The operations that may be lookups."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A `gather` or `dynamic_slice` of whole rows of a table, by indices along one axis.

    Attributes:
      weight: layout of the table, (B, d, o).
      output: layout of the result, (B, n, o).
      axes: for each axis of the result, which of `output.sizes` it is made of.
      operand: which of the equation's operands has the indices.
      dimension_numbers: those of the equation, as a `gather`.
      mode: what the equation does with indices out of bounds.
    """

    weight: Layout
    output: Layout
    axes: tuple[tuple[int, ...], ...]
    operand: int
    dimension_numbers: lax.GatherDimensionNumbers
    mode: lax.GatherScatterMode

    @property
    def positions(self) -> tuple[int, ...]:
        """Axes of the result along which rows are positions of one example."""
        return self.output.groups[1][1:]

    def counts(self, indices: jax.Array, dtype: Any, weights: jax.Array | None) -> jax.Array:
        """How often each row of the table is read: (B, d).

        The transpose of the lookup adds up ones, or the weights (B or 1, n), at the indices. So
        indices out of bounds, and negative ones, count as the lookup itself reads them.
        """
        batch, features, outputs = self.weight.groups
        table = [1 if i in outputs else size for i, size in enumerate(self.weight.sizes)]

        def look_up(rows: jax.Array) -> jax.Array:
            return lax.gather(
                rows,
                jnp.atleast_1d(indices),
                self.dimension_numbers,
                (1,) * len(table),
                mode=self.mode,
            )

        axes = devices.varying(indices)
        struct = devices.struct(tuple(table), dtype, axes)
        added = jnp.ones(jax.eval_shape(look_up, struct).shape, dtype)
        if weights is not None:
            batch_z, rows_z, _ = self.output.groups
            of_rows = self.output.narrowed((*batch_z, *rows_z) if len(weights) > 1 else rows_z)
            added *= of_rows.unpack(weights.astype(dtype), of_rows.sizes)
        (counts,) = jax.linear_transpose(look_up, struct)(devices.vary(added, axes))
        layout = Layout(tuple(table), (batch, features, outputs))
        return layout.pack(counts)[..., 0]


def lookup(equation: Equation) -> Lookup | str:
    """The lookup that an equation is, or why it is none."""
    table, sizes = equation.inputs[0].shape, tuple(equation.params["slice_sizes"])
    everywhere = tuple(range(len(table)))
    if equation.primitive is primitives.gather_p:
        numbers, mode = equation.params["dimension_numbers"], equation.params["mode"]
        axis = row_axis(table, sizes, numbers.start_index_map, numbers.operand_batching_dims)
    else:
        axis = row_axis(table, sizes, everywhere)
        numbers = lax.GatherDimensionNumbers(everywhere, (), () if axis is None else (axis,))
        mode = lax.GatherScatterMode.CLIP
    if axis is None:
        return f"enters a `{equation.primitive.name}` that does not read whole rows along one axis"
    z = equation.outputs[0].shape
    batch = tuple(map(int, numbers.operand_batching_dims))
    kept = [i for i in everywhere if i not in (*numbers.collapsed_slice_dims, *batch)]
    offsets = dict(zip(kept, map(int, numbers.offset_dims), strict=True))
    outputs = tuple(i for i in everywhere if i not in (axis, *batch))
    outputs_z = tuple(offsets[i] for i in outputs)
    # The result's other axes are those of the indices, in their order.
    of_indices = [i for i in range(len(z)) if i not in offsets.values()]
    batch_z = tuple(of_indices[i] for i in numbers.start_indices_batching_dims)
    rows_z = tuple(i for i in range(len(z)) if i not in (*batch_z, *outputs_z))
    return Lookup(
        weight=Layout(table, (batch, (axis,), outputs)),
        output=Layout(z, (batch_z, rows_z, outputs_z)),
        axes=tuple((i,) for i in range(len(z))),
        operand=1 if equation.primitive is primitives.gather_p else 1 + axis,
        dimension_numbers=numbers,
        mode=mode,
    )


def row_axis(
    table: Sequence[int], sizes: Sequence[int], indexed: Sequence[int], batch: Sequence[int] = ()
) -> int | None:
    """The axis along which slices of these sizes are rows of a table; None if they are not.

    Args:
      table: the table's shape.
      sizes: the slices' sizes.
      indexed: the axes along which there are indices.
      batch: the axes along which each index has a table of its own.
    """
    cut = [i for i, size in enumerate(table) if sizes[i] != size and i not in batch]
    if not cut:  # a table of one row
        cut = [i for i in indexed if table[i] == 1][:1]
    rows = len(cut) == 1 and sizes[cut[0]] == 1 and cut[0] in indexed
    return int(cut[0]) if rows and math.prod(table) else None


def read_in_turn(step: Step, view: View, known: Known) -> View | None:
    """The row of a view that a `dynamic_slice` reads, if the program's text names it.

    Of each trip of a loop that is the next row, or the one before, where a counter names it: as if
    the loop scanned over the rows.
    """
    sizes = step.equation.params["slice_sizes"]
    axis = row_axis(view.shape, sizes, range(len(sizes)))
    index = None if axis is None else known(step.reads[1 + axis])
    if axis is None or index is None:
        return None
    rows = np.clip(index.array, 0, view.shape[axis] - 1)
    if not index.levels:
        return views.rows(view, axis, int(rows), 1)
    level, number, start = index.levels[-1], len(rows), int(rows.min())
    inner = all(level > other for other, _ in view.loops)
    if len(index.levels) > 1 or not inner:
        return None
    view = views.rows(view, axis, start, min(number, view.shape[axis] - start))
    if np.array_equal(rows, np.arange(start, start + number)):
        return views.in_turn(view, axis, level)
    if np.array_equal(rows[::-1], np.arange(start, start + number)):
        return views.in_turn(views.reversed_rows(view, axis), axis, level)
    return None
