"""Every site as Z = XW, with X: (B, n, d), W: (B, d, o), Z: (B, n, o).

n counts rows (examples x positions), d contracted features, o outputs, and B independent products:
groups of a convolution, members of an ensemble. A convolution's X is its im2col matrix: a row holds
what the window sees at one position. A lookup's X is one-hot.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.extend.core import primitives

from cqjax.linalg import conv_gram, devices, gram, windows
from cqjax.linalg.windows import Window
from cqjax.program.jaxprs import Equation
from cqjax.program.layout import Layout

Shape = tuple[int, ...]

SAMPLED_ROWS, SAMPLED_EXAMPLES = 512, 16
"""What `times` looks at, where there is more: rows of a product, examples of a convolution."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general` whose weight is one of its operands.

    Attributes:
      weight: layout of the weight operand, (B, d, o).
      output: layout of the result, (B, n, o).
      axes: for each axis of the result, which of `output.sizes` it is made of.
      inputs: layout of the other operand, (B, n, d).
    """

    weight: Layout
    output: Layout
    axes: tuple[tuple[int, ...], ...]
    inputs: Layout

    @property
    def positions(self) -> tuple[int, ...]:
        """Axes of the result along which rows are positions of one example."""
        return self.output.groups[1][1:]

    def rows(self, x: jax.Array) -> jax.Array:
        """X: (B, n, d)."""
        return self.inputs.pack(x)

    @property
    def channels(self) -> int:
        """Length of the axis of features that `in_parts` cuts: the longest."""
        return max((self.weight.sizes[i] for i in self.weight.groups[1]), default=1)

    def in_parts(self, parts: int) -> "Product":
        """The form in which each part of the features, of equal size, is a product of its own."""
        if parts == 1:
            return self
        features = self.weight.groups[1]
        longest = [self.weight.sizes[i] for i in features].index(self.channels)
        weight = self.weight.in_parts(features[longest], parts)
        inputs = self.inputs.in_parts(self.inputs.groups[2][longest], parts)
        return dataclasses.replace(self, weight=weight, inputs=inputs)

    def second_moment(
        self, x: jax.Array, h: jax.Array | None, precision: lax.PrecisionLike
    ) -> jax.Array:
        """XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), for a constant feature h: ()."""
        rows = self.rows(x)
        column = None if h is None else jnp.broadcast_to(h, rows.shape[:2]).astype(rows.dtype)
        return gram.inner(rows, column, precision)

    def times(self, x: jax.Array, w: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
        """XV, (B, m, k), for k columns V, (B, d, k), and m of the rows: about `SAMPLED_ROWS`."""
        rows = self.rows(x)
        rows = rows[:, :: _stride(rows.shape[1], SAMPLED_ROWS)]
        return jnp.einsum("bnd,bdk->bnk", rows.astype(w.dtype), w, precision=precision)

    def moment_flops(self, shape: Shape, features: int) -> float:
        """Operations of `second_moment` for an input of this shape, the bias among the features."""
        del shape
        batch, rows, _ = self.inputs.shape
        return 2 * batch * rows * features**2


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A `conv_general_dilated` whose kernel is a weight.

    Attributes:
      weight: layout of the kernel, (B, d, o).
      output: layout of the result, (B, n, o).
      axes: for each axis of the result, which of `output.sizes` it is made of.
      window: how it moves over the input.
      lhs: which axes of the input are (batch, feature, *spatial).
      positions: which axes of the result are spatial.
    """

    weight: Layout
    output: Layout
    axes: tuple[tuple[int, ...], ...]
    window: Window
    lhs: tuple[int, ...]
    positions: tuple[int, ...]

    def rows(self, x: jax.Array) -> jax.Array:
        """The im2col matrix: (B, n, d), d running over the window, then over the channels."""
        return windows.patches(self._channels_last(x), self.window, self.weight.shape[0])

    @property
    def channels(self) -> int:
        """Input channels of a group: the features that `in_parts` cuts."""
        return self.weight.sizes[self.weight.groups[1][-1]]

    def in_parts(self, parts: int) -> "Convolution":
        """The form in which each part of the channels, of equal size, is a group of its own."""
        weight = self.weight.in_parts(self.weight.groups[1][-1], parts)
        return dataclasses.replace(self, weight=weight)

    def second_moment(
        self, x: jax.Array, h: jax.Array | None, precision: lax.PrecisionLike
    ) -> jax.Array:
        """XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), for a constant feature h: ()."""
        examples = self._channels_last(x)
        return conv_gram.inner(examples, self.window, self.weight.shape[0], h, precision)

    def times(self, x: jax.Array, w: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
        """XV, (B, m, k), for k columns V, (B, d, k), and m of the rows, by a convolution.

        The rows are those of about `SAMPLED_EXAMPLES` examples.
        """
        examples, window = self._channels_last(x), self.window
        examples = examples[:: _stride(examples.shape[0], SAMPLED_EXAMPLES)]
        groups, _, columns = w.shape
        # The columns of the groups become output channels, of which each group has k.
        kernel = jnp.moveaxis(w.reshape(groups, *window.shape, -1, columns), 0, -2)
        space = "".join(map(chr, range(ord("a"), ord("a") + len(window.shape))))
        z = lax.conv_general_dilated(
            examples.astype(w.dtype),
            kernel.reshape(*kernel.shape[:-2], groups * columns),
            window.strides,
            window.padding,
            window.lhs_dilation,
            window.rhs_dilation,
            (f"N{space}C", f"{space}IO", f"N{space}C"),
            groups,
            precision=precision,
        )
        return jnp.moveaxis(z.reshape(-1, groups, columns), 1, 0)

    def moment_flops(self, shape: Shape, features: int) -> float:
        """Operations of `second_moment` for an input of this shape."""
        del features
        channels_last = tuple(shape[i] for i in self._order)
        return conv_gram.flops(channels_last, self.window, self.weight.shape[0])

    def _channels_last(self, x: jax.Array) -> jax.Array:
        return x.transpose(self._order)

    @property
    def _order(self) -> tuple[int, ...]:
        batch, feature, *spatial = self.lhs
        return (batch, *spatial, feature)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A `gather` of whole rows of a table: X is one-hot, XᵀX the diagonal of counts.

    Attributes:
      weight: layout of the table, (B, d, o).
      output: layout of the result, (B, n, o).
      axes: for each axis of the result, which of `output.sizes` it is made of.
      dimension_numbers: the equation's.
      mode: what the equation does with indices out of bounds.
    """

    weight: Layout
    output: Layout
    axes: tuple[tuple[int, ...], ...]
    dimension_numbers: lax.GatherDimensionNumbers
    mode: lax.GatherScatterMode

    @property
    def positions(self) -> tuple[int, ...]:
        """Axes of the result along which rows are positions of one example."""
        return self.output.groups[1][1:]

    def counts(self, indices: jax.Array, dtype: Any) -> jax.Array:
        """How often each row of the table is read: (1, d).

        The transpose of the lookup adds up ones at the indices. So indices out of bounds, and
        negative ones, count as the lookup itself reads them.
        """
        table = [1] * len(self.weight.sizes)
        axis = self.dimension_numbers.start_index_map[0]
        table[axis] = self.weight.sizes[axis]

        def look_up(rows: jax.Array) -> jax.Array:
            return lax.gather(
                rows, indices, self.dimension_numbers, (1,) * len(table), mode=self.mode
            )

        axes = devices.varying(indices)
        struct = devices.struct(tuple(table), dtype, axes)
        ones = jnp.ones(jax.eval_shape(look_up, struct).shape, dtype)
        (counts,) = jax.linear_transpose(look_up, struct)(devices.vary(ones, axes))
        return counts.reshape(1, -1)


Form = Product | Convolution | Lookup


def matrix_form(equation: Equation, weight: int) -> Form | str:
    """The matrix form of an equation in which operand number `weight` is a parameter's view.

    A new kind of product is one more class, and one more case here. It has what `Product` has. For
    back-matching to match it, `matched.squared_norms` needs a case as well.

    Returns:
      The form, or why the equation is not a product with that operand in the weight's place.
    """
    arrays = (*equation.inputs, *equation.outputs)
    if any(jnp.issubdtype(array.dtype, jnp.complexfloating) for array in arrays):
        return f"enters `{equation.primitive.name}` of complex numbers"
    if equation.primitive is primitives.dot_general_p:
        return _product(equation, weight)
    if equation.primitive is primitives.conv_general_dilated_p:
        return _convolution(equation, weight)
    if equation.primitive is primitives.gather_p and weight == 0:
        return _lookup(equation)
    return f"enters `{equation.primitive.name}`, which is no matrix product"


def _product(equation: Equation, weight: int) -> Form:
    contracting, batching = equation.params["dimension_numbers"]
    other = 1 - weight
    w, x = equation.inputs[weight].shape, equation.inputs[other].shape
    batch_w, batch_x = tuple(batching[weight]), tuple(batching[other])
    features_w, features_x = tuple(contracting[weight]), tuple(contracting[other])
    outputs = _other_axes(w, batch_w, features_w)
    rows = _other_axes(x, batch_x, features_x)
    z = equation.outputs[0].shape
    # The result has the batch axes first, then the free axes of the first operand, then those of
    # the second.
    batch_z = tuple(range(len(batch_w)))
    end = len(batch_z) + len(rows if weight == 1 else outputs)
    middle, last = tuple(range(len(batch_z), end)), tuple(range(end, len(z)))
    rows_z, outputs_z = (middle, last) if weight == 1 else (last, middle)
    return Product(
        weight=Layout(w, (batch_w, features_w, outputs)),
        output=Layout(z, (batch_z, rows_z, outputs_z)),
        axes=tuple((i,) for i in range(len(z))),
        inputs=Layout(x, (batch_x, rows, features_x)),
    )


def _stride(number: int, wanted: int) -> int:
    """The distance at which about so many are left. It is odd: positions in texts are even.

    Of a symbolic number, all are left.
    """
    return 1 if is_symbolic_dim(number) else max(1, number // wanted) | 1


def _other_axes(shape: Shape, *known: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in range(len(shape)) if i not in itertools.chain(*known))


def _convolution(equation: Equation, weight: int) -> Form | str:
    params = equation.params
    if weight != 1:
        return "is the input of a convolution, not its kernel"
    if params["batch_group_count"] != 1:
        return "is the kernel of a convolution with `batch_group_count`"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    kernel, z = equation.inputs[1].shape, equation.outputs[0].shape
    w_sizes, w_axes = _grouped(kernel, numbers.rhs_spec[0], groups)
    (group, outputs), features = w_axes[numbers.rhs_spec[0]], w_axes[numbers.rhs_spec[1]]
    window = [w_axes[i] for i in numbers.rhs_spec[2:]]
    z_sizes, z_axes = _grouped(z, numbers.out_spec[1], groups)
    group_z, outputs_z = z_axes[numbers.out_spec[1]]
    rows_z = [z_axes[i] for i in (numbers.out_spec[0], *numbers.out_spec[2:])]
    return Convolution(
        weight=Layout(w_sizes, ((group,), (*itertools.chain(*window), *features), (outputs,))),
        output=Layout(z_sizes, ((group_z,), tuple(itertools.chain(*rows_z)), (outputs_z,))),
        axes=z_axes,
        window=Window(
            shape=tuple(kernel[i] for i in numbers.rhs_spec[2:]),
            strides=tuple(params["window_strides"]),
            padding=tuple((int(low), int(high)) for low, high in params["padding"]),
            lhs_dilation=tuple(params["lhs_dilation"]),
            rhs_dilation=tuple(params["rhs_dilation"]),
        ),
        lhs=tuple(numbers.lhs_spec),
        positions=tuple(numbers.out_spec[2:]),
    )


def _grouped(shape: Shape, axis: int, groups: int) -> tuple[Shape, tuple[tuple[int, ...], ...]]:
    """Shape with `axis` replaced by (groups, the rest), and the new axes of each old one."""
    sizes = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    axes = tuple(
        (i,) if i < axis else (i, i + 1) if i == axis else (i + 1,) for i in range(len(shape))
    )
    return sizes, axes


def _lookup(equation: Equation) -> Form | str:
    numbers, table = equation.params["dimension_numbers"], equation.inputs[0].shape
    axis = numbers.start_index_map[0] if numbers.start_index_map else 0
    slices = tuple(1 if i == axis else size for i, size in enumerate(table))
    if (
        tuple(numbers.start_index_map) != (axis,)
        or tuple(numbers.collapsed_slice_dims) != (axis,)
        or numbers.operand_batching_dims
        or tuple(equation.params["slice_sizes"]) != slices
    ):
        return "enters a `gather` that does not read whole rows along one axis"
    z = equation.outputs[0].shape
    outputs = tuple(numbers.offset_dims)
    return Lookup(
        weight=Layout(table, ((), (axis,), _other_axes(table, (axis,)))),
        output=Layout(z, ((), _other_axes(z, outputs), outputs)),
        axes=tuple((i,) for i in range(len(z))),
        dimension_numbers=numbers,
        mode=equation.params["mode"],
    )
