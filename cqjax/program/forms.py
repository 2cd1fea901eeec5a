"""Every site as Z = XW, with X: (B, n, d), W: (B, d, o), Z: (B, n, o).

n counts rows (examples x positions), d contracted features, o outputs, and B independent products:
groups of a convolution, members of an ensemble. A convolution's X is its im2col matrix: a row holds
what the window sees at one position. A lookup's X is one-hot (`lookups.Lookup`).
"""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from cqjax.linalg import conv_gram, gram, windows
from cqjax.linalg.products import einsum
from cqjax.linalg.windows import Window
from cqjax.program.known import Constant
from cqjax.program.layout import Layout
from cqjax.program.lookups import Lookup
from cqjax.program.ragged import Ragged
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
    def reading(self) -> Hashable:
        """How X is made of the other operand."""
        return self.inputs, self.live

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

    def sampled(self, x: jax.Array) -> jax.Array:
        """Some of the rows, (B, m, d): about `SAMPLED_ROWS`."""
        return self.rows(x)[:, :: _stride(self.inputs.shape[1], SAMPLED_ROWS)]

    def times(self, x: jax.Array, w: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
        """XV, (B, m, k), of the rows of `sampled`, for k columns V, (B, d, k)."""
        return einsum("bnd,bdk->bnk", self.sampled(x).astype(w.dtype), w, precision=precision)

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
    def reading(self) -> Hashable:
        """How X is made of the input."""
        return self.window, self.lhs, self.weight.shape[0], self.live

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

    def sampled(self, x: jax.Array) -> jax.Array:
        """The entries that the window sees in about `SAMPLED_EXAMPLES` examples: (B, m, c)."""
        examples, groups = self._sampled(self._channels_last(x)), self.weight.shape[0]
        return jnp.moveaxis(examples.reshape(-1, groups, examples.shape[-1] // groups), 1, 0)

    def times(self, x: jax.Array, w: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
        """XV, (B, m, k), for k columns V, (B, d, k), and m of the rows, by a convolution.

        The rows are those of about `SAMPLED_EXAMPLES` examples.
        """
        examples, window = self._sampled(self._channels_last(x)), self.window
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

    def _sampled(self, examples: jax.Array) -> jax.Array:
        return examples[:: _stride(examples.shape[0], SAMPLED_EXAMPLES)]

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


def _stride(number: int, wanted: int) -> int:
    """The distance at which about so many are left. It is odd: positions in texts are even.

    Of a symbolic number, all are left.
    """
    return 1 if is_symbolic_dim(number) else max(1, number // wanted) | 1
