"""Every site as Z = XW, with X: (B, n, d), W: (B, d, o), Z: (B, n, o).

n counts rows (examples x positions), d contracted features, o outputs, and B independent products:
groups of a convolution, members of an ensemble. A convolution's X is its im2col matrix: a row holds
what the window sees at one position. A lookup's X is one-hot (`lookups.Lookup`).
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim
from jax.extend.core import primitives

from cqjax.linalg import conv_gram, gram, windows
from cqjax.linalg.products import einsum
from cqjax.linalg.windows import Window
from cqjax.program import lookups, opaque
from cqjax.program.jaxprs import Equation
from cqjax.program.known import Constant
from cqjax.program.layout import Layout
from cqjax.program.lookups import Lookup
from cqjax.program.ragged import RAGGED, Ragged, ragged
from cqjax.program.views import View

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
      live: which features have weights that may differ from zero, (B, d); others are zero in X.
    """

    weight: Layout
    output: Layout
    axes: tuple[tuple[int, ...], ...]
    inputs: Layout
    live: Constant = Constant(True)

    @property
    def positions(self) -> tuple[int, ...]:
        """Axes of the result along which rows are positions of one example."""
        return self.output.groups[1][1:]

    def rows(self, x: jax.Array) -> jax.Array:
        """X: (B, n, d)."""
        return _live(self, self.inputs.pack(x), 2)

    def untransposed(self, view: View) -> tuple["Product", View]:
        """The form of a weight without the transposes that a view ends with, and that weight.

        Features and outputs are in the order of the weight's axes. So one product's features are
        another's outputs, axis by axis, where the loss uses a weight both ways.
        """
        weight = self.weight
        while (permutation := view.transposition) and view.shape == weight.sizes:
            weight = weight.before(permutation)
            (view,) = view.args
        weight, features = weight.sorted(1)
        weight, outputs = weight.sorted(2)
        inputs = self.inputs.reordered(2, features)
        output = self.output.reordered(2, outputs)
        return dataclasses.replace(self, weight=weight, inputs=inputs, output=output), view

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
        live = _in_parts(self.live, self.weight, weight)
        return dataclasses.replace(self, weight=weight, inputs=inputs, live=live)

    def second_moment(
        self, x: jax.Array, h: jax.Array | None, precision: lax.PrecisionLike
    ) -> jax.Array:
        """XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), for a feature h: (), or (B or 1, n)."""
        rows = self.rows(x)
        column = None if h is None else jnp.broadcast_to(h, rows.shape[:2]).astype(rows.dtype)
        return gram.inner(rows, column, precision)

    def times(self, x: jax.Array, w: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
        """XV, (B, m, k), for k columns V, (B, d, k), and m of the rows: about `SAMPLED_ROWS`."""
        rows = self.rows(x)
        rows = rows[:, :: _stride(rows.shape[1], SAMPLED_ROWS)]
        return einsum("bnd,bdk->bnk", rows.astype(w.dtype), w, precision=precision)

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
      live: which features have weights that may differ from zero, (B, d); others are zero in X.
    """

    weight: Layout
    output: Layout
    axes: tuple[tuple[int, ...], ...]
    window: Window
    lhs: tuple[int, ...]
    positions: tuple[int, ...]
    live: Constant = Constant(True)

    def rows(self, x: jax.Array) -> jax.Array:
        """The im2col matrix: (B, n, d), d running over the window, then over the channels."""
        patches = windows.patches(self._channels_last(x), self.window, self.weight.shape[0])
        return _live(self, patches, 2)

    def turned(self, matrix: Any) -> Any:
        """The kernel's matrix, (1, d, o), of that which its transpose has of it.

        Where this one's features are the window's entries and c channels, and its outputs o
        channels, the transpose's are the window's entries, from last to first, and o channels, and
        its outputs c channels.
        """
        shape, (_, features, outputs) = self.window.shape, self.weight.shape
        kernel = matrix.reshape(*shape, outputs, features // math.prod(shape))
        kernel = kernel[(slice(None, None, -1),) * len(shape)]
        return kernel.swapaxes(-1, -2).reshape(1, features, outputs)

    @property
    def channels(self) -> int:
        """Input channels of a group: the features that `in_parts` cuts."""
        return self.weight.sizes[self.weight.groups[1][-1]]

    def in_parts(self, parts: int) -> "Convolution":
        """The form in which each part of the channels, of equal size, is a group of its own."""
        weight = self.weight.in_parts(self.weight.groups[1][-1], parts)
        live = _in_parts(self.live, self.weight, weight)
        return dataclasses.replace(self, weight=weight, live=live)

    def second_moment(
        self, x: jax.Array, h: jax.Array | None, precision: lax.PrecisionLike
    ) -> jax.Array:
        """XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), for a feature h: (), or by example."""
        examples = self._channels_last(x)
        xx = conv_gram.inner(examples, self.window, self.weight.shape[0], h, precision)
        return _live(self, _live(self, xx, 1), 2)

    def times(self, x: jax.Array, w: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
        """XV, (B, m, k), for k columns V, (B, d, k), and m of the rows, by a convolution.

        The rows are those of about `SAMPLED_EXAMPLES` examples.
        """
        examples, window = self._channels_last(x), self.window
        examples = examples[:: _stride(examples.shape[0], SAMPLED_EXAMPLES)]
        groups, _, columns = w.shape
        w = _live(self, w, 1)
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


Form = Product | Convolution | Lookup | Ragged


def _live(form: Product | Convolution, array: jax.Array, axis: int) -> jax.Array:
    """An array, (B, ...), with zeros where features along an axis (h aside) are not live."""
    if form.live == Constant(True):
        return array
    batch, features, _ = form.weight.shape
    live = np.ones((batch, array.shape[axis]), bool)
    live[:, :features] = form.live.value
    shape = [1] * array.ndim
    shape[0], shape[axis] = live.shape
    return array * live.reshape(shape).astype(array.dtype)


def _in_parts(live: Constant, before: Layout, after: Layout) -> Constant:
    """The live features of a weight in parts."""
    batch, features, outputs = before.shape
    each = np.broadcast_to(live.value, (batch, features))[..., None]
    weight = np.broadcast_to(each, (batch, features, outputs))
    return Constant(after.pack(before.unpack(weight, before.sizes))[..., 0])


def matrix_form(equation: Equation, weight: int, sizes: Shape | None = None) -> Form | str:
    """The matrix form of an equation in which operand number `weight` is a parameter's view.

    A new kind of product is one more class, and one more case here. It has what `Product` has. For
    back-matching to match it, `matched.squared_norms` needs a case as well.

    Args:
      equation: the equation.
      weight: the operand's number.
      sizes: where the view has been broadcast, its size along each axis, 1 where it is repeated.

    Returns:
      The form, or why the equation is not a product with that operand in the weight's place.
    """
    arrays = (*equation.inputs, *equation.outputs)
    if any(jnp.issubdtype(array.dtype, jnp.complexfloating) for array in arrays):
        return f"enters `{equation.primitive.name}` of complex numbers"
    if equation.primitive is primitives.dot_general_p:
        return _product(equation, weight, sizes or equation.inputs[weight].shape)
    if sizes is not None and equation.primitive is primitives.conv_general_dilated_p:
        return "is broadcast before a product"
    if equation.primitive is primitives.conv_general_dilated_p:
        return _convolution(equation, weight)
    if equation.primitive.name == RAGGED and sizes is None:
        return ragged(equation, weight)
    if equation.primitive in lookups.READS and weight == 0 and sizes is None:
        return lookups.lookup(equation)
    opaquely = opaque.reason(equation)
    return opaquely or f"enters `{equation.primitive.name}`, which is no matrix product"


def _product(equation: Equation, weight: int, sizes: Shape) -> Form | str:
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
    # Along a batch axis, a repeated weight is one weight with more rows.
    repeated = [i for i, axis in enumerate(batch_w) if sizes[axis] != w[axis]]
    if any(sizes[axis] != w[axis] for axis in (*features_w, *outputs)):
        return "is broadcast before a product"
    rows = (*(batch_x[i] for i in repeated), *rows)
    rows_z = (*repeated, *rows_z)
    batch_x = tuple(axis for i, axis in enumerate(batch_x) if i not in repeated)
    batch_z = tuple(i for i in batch_z if i not in repeated)
    return Product(
        weight=Layout(sizes, (batch_w, features_w, outputs)),
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
