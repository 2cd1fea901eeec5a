"""A ragged product as Z = XW: rows in groups, of which each has a weight of its own."""

import dataclasses

import jax
from jax import lax

from cqjax.linalg import gram
from cqjax.program.jaxprs import Equation
from cqjax.program.layout import Layout

RAGGED = "ragged_dot_general"
"""The name of the primitive, which JAX does not export."""


@dataclasses.dataclass(frozen=True)
class Ragged:
    """A `ragged_dot` of rows, sorted by their groups, with a weight for each group.

    How many rows a group has is known only when the loss runs. So there is no (B, n, d).

    Attributes:
      weight: layout of the weight operand, (B, d, o): a weight for each group.
      output: layout of the result, (1, n, o): the rows of all groups.
      axes: for each axis of the result, which of `output.sizes` it is made of.
      inputs: layout of the rows, (1, n, d).
      sizes: which of the equation's operands has the number of rows of each group.
    """

    weight: Layout
    output: Layout
    axes: tuple[tuple[int, ...], ...]
    inputs: Layout
    sizes: int = 2

    @property
    def positions(self) -> tuple[int, ...]:
        """Axes of the result along which rows are positions of one example: none is known."""
        return ()

    def second_moment(
        self, x: jax.Array, sizes: jax.Array, precision: lax.PrecisionLike
    ) -> jax.Array:
        """XᵀX of the rows of each group: (B, d, d)."""
        return _moments(self.inputs.pack(x)[0], sizes, precision)

    def counted(self, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        """How many rows of each group have a weight, (B,), by the weights of all rows, (n,)."""
        ones = (weights != 0).astype(weights.dtype)
        return _moments(ones[:, None], sizes, gram.HIGHEST)[:, 0, 0]

    def moment_flops(self, shape: tuple[int, ...], features: int) -> float:
        """Operations of `second_moment`."""
        del shape
        return 2 * self.inputs.shape[1] * features**2


def _moments(rows: jax.Array, sizes: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    return lax.ragged_dot_general(
        rows,
        rows,
        sizes,
        lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], []),
        precision=precision,
        preferred_element_type=gram.accumulator(rows.dtype),
    )


def ragged(equation: Equation, weight: int) -> Ragged | str:
    """The form of a ragged product, or why it has none."""
    if weight != 1:
        return "is the operand of a ragged product that has the rows, not the weights"
    params = equation.params
    numbers = params["ragged_dot_dimension_numbers"]
    contracting, batching = numbers.dot_dimension_numbers
    x, w, sizes = (operand.shape for operand in equation.inputs[:3])
    z = equation.outputs[0].shape
    rows = tuple(i for i in range(len(x)) if i not in contracting[0])
    groups = tuple(numbers.rhs_group_dimensions)
    if (
        params["group_offset"] is not None
        or batching[0]
        or rows != tuple(numbers.lhs_ragged_dimensions)
        or len(groups) != 1
        or len(sizes) != 1
    ):
        return "enters a ragged product that has more axes than rows, features and groups"
    outputs = tuple(i for i in range(len(w)) if i not in (*groups, *contracting[1]))
    return Ragged(
        weight=Layout(w, (groups, tuple(contracting[1]), outputs)),
        output=Layout(z, ((), (0,), tuple(range(1, len(z))))),
        axes=tuple((i,) for i in range(len(z))),
        inputs=Layout(x, ((), rows, tuple(contracting[0]))),
    )
