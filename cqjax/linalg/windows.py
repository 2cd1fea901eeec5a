"""Windows of convolutions: the entries that each position sees, and windows without strides."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.linalg import gram


class Window(NamedTuple):
    """How a convolution's window moves over its input, with an item for each spatial axis.

    Attributes:
      shape: the number of entries that the window sees at once.
      strides: the number of entries from one position of the window to the next.
      padding: the number of zeros before and after the input; negative numbers crop it.
      lhs_dilation: the input's: the distance that its entries are spread to, with zeros in between.
      rhs_dilation: the window's: the distance between the entries that it sees.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    def positions(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The number of the window's positions along each axis of the input."""
        return tuple(
            max(0, (_dilated(size, inserted) + lo + hi - _dilated(k, dilation)) // stride + 1)
            for size, k, stride, (lo, hi), inserted, dilation in zip(spatial, *self, strict=True)
        )


def patches(x: jax.Array, window: Window, groups: int = 1) -> jax.Array:
    """The im2col matrix X of an input: each row is the patch that one position sees.

    Args:
      x: the input, (batch, *spatial, channels).
      window: how the convolution's window moves over it.
      groups: the number of parts that the channels are split into, each with an X of its own.

    Returns:
      X, (groups, n, d). The rows are in the order of examples, then positions; the features in that
      of the window's offsets, then a group's channels.
    """
    seen = _seen(x, window)
    rows, offsets = math.prod(seen.shape[: x.ndim - 1]), math.prod(window.shape)
    grouped = seen.reshape(rows, offsets, groups, x.shape[-1] // groups)
    return jnp.moveaxis(grouped, -2, 0).reshape(groups, rows, offsets * grouped.shape[-1])


def column_sums(x: jax.Array, window: Window, groups: int = 1) -> jax.Array:
    """The sums of the columns of `patches`: (groups, d), in at least float32."""
    # Summing over the examples first leaves one input to take the columns of.
    total = x.sum(0, keepdims=True, dtype=gram.accumulator(x.dtype))
    sums = _seen(total, window, summed=True)
    return jnp.moveaxis(sums.reshape(-1, groups, x.shape[-1] // groups), 1, 0).reshape(groups, -1)


def _seen(x: jax.Array, window: Window, *, summed: bool = False) -> jax.Array:
    """For each offset in the window, the entries there at all positions.

    They are (batch, *positions, *offsets, channels); summed over the positions, (batch, *offsets,
    channels).
    """
    edges = zip(window.padding, window.lhs_dilation, strict=True)
    seen = _pad(x, [(lo, hi, inserted - 1) for (lo, hi), inserted in edges])
    # One spatial axis after the other: of k x k offsets, 2k slices are compiled instead of k².
    for i, count in enumerate(window.positions(x.shape[1:-1])):
        axis, stride = (1 if summed else 1 + i), window.strides[i]
        starts = [u * window.rhs_dilation[i] for u in range(window.shape[i])]
        parts = [_spaced(seen, axis, start, count, stride) for start in starts]
        seen = jnp.stack([part.sum(axis) if summed else part for part in parts], -2)
    return seen


def _spaced(x: jax.Array, axis: int, start: int, count: int, stride: int) -> jax.Array:
    """So many entries along an axis, each at a distance from the last."""
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, start + count * stride, stride)
    return x[tuple(index)]


class Blocks(NamedTuple):
    """Equally spaced entries of one axis, in blocks. A window moves over them by 1 block at a time.

    Attributes:
      start: the index of the first entry.
      step: the distance from one entry to the next.
      entries: the number of entries.
      zeros: the number of zeros in front of the entries that make up the first block.
      size: the number of entries, or zeros, in a block.
      length: the number of blocks.
      window: the number of blocks that the window sees at once.
      padding: the number of zero blocks before and after; neither is negative.
    """

    start: int
    step: int
    entries: int
    zeros: int
    size: int
    length: int
    window: int
    padding: tuple[int, int]


def in_blocks(spatial: Sequence[int], window: Window) -> Iterator[tuple[Blocks, ...]]:
    """Describes one window as several without dilation and strides, each over blocks of entries.

    Take one axis. Let r be the dilation and s the stride, both divided by their greatest common
    divisor. Then every r-th position sees entries whose indices are equal modulo the dilation.
    From one such position to the next, the window moves by s of these entries. So s entries make a
    block, and the window moves by one block. The positions are r such sequences in all.

    Args:
      spatial: the input's spatial shape.
      window: the window.

    Yields:
      For each combination of the axes' sequences of positions, the blocks of each axis. Sequences
      that see only zeros are left out.
    """
    yield from itertools.product(
        *(
            _axis_blocks(_dilated(size, inserted), n, k, stride, lo, dilation)
            for size, n, k, stride, (lo, _), inserted, dilation in zip(
                spatial, window.positions(spatial), *window, strict=True
            )
        )
    )


def _axis_blocks(
    length: int, positions: int, window: int, stride: int, before: int, dilation: int
) -> Iterator[Blocks]:
    """`in_blocks` for one axis: a `Blocks` for each sequence of positions."""
    sequences, size = (n // math.gcd(stride, dilation) for n in (dilation, stride))
    window_blocks = _ceil(window, size)
    for position in range(min(sequences, positions)):
        steps = _ceil(positions - position, sequences) - 1
        first = stride * position - before
        padding = max(0, _ceil(-first, dilation))
        start = first + dilation * padding
        entries = min(_ceil(length - start, dilation), steps * size + window - padding)
        if entries > 0:
            # Whole blocks of padding are the window's; the zeros left fill up the first block.
            outside, zeros = divmod(padding, size)
            blocks = _ceil(zeros + entries, size)
            ends = outside, steps + window_blocks - outside - blocks
            yield Blocks(start, dilation, entries, zeros, size, blocks, window_blocks, ends)


def gather(x: jax.Array, axes: Sequence[Blocks], window: Window) -> jax.Array:
    """The entries of an input in blocks, which count as channels.

    Args:
      x: the input, (batch, *spatial, channels).
      axes: the blocks of each spatial axis.
      window: the window that `in_blocks` made them of.

    Returns:
      An array (batch, *blocks, channels). Its channels are in the order of a block's entries, then
      the input's channels.
    """
    x = _pad(x, [(0, 0, inserted - 1) for inserted in window.lhs_dilation])
    x = x[:, *(slice(a.start, a.start + (a.entries - 1) * a.step + 1, a.step) for a in axes)]
    x = _pad(x, [(a.zeros, a.length * a.size - a.zeros - a.entries, 0) for a in axes])
    x = x.reshape(x.shape[0], *itertools.chain(*((a.length, a.size) for a in axes)), x.shape[-1])
    entries = range(2, x.ndim - 1, 2)
    x = x.transpose(0, *(i - 1 for i in entries), *entries, x.ndim - 1)
    return x.reshape(x.shape[0], *(a.length for a in axes), -1)


def ungather(product: jax.Array, axes: Sequence[Blocks], window: Window) -> jax.Array:
    """The Gram matrix of a window's patches, from that of the blocks' patches.

    Args:
      product: the Gram matrix of the patches of `gather`'s result: two indices, (*window, channels)
        each, in blocks.
      axes: the blocks of each spatial axis.
      window: the window that `in_blocks` made them of.

    Returns:
      XᵀX, (d, d), for the features of `patches`.
    """
    # Along each axis, a block in the window and an entry in the block are an offset together. The
    # last block may reach beyond the window: these offsets are cut off.
    ndim, entries = len(axes), [a.size for a in axes]
    channels = product.shape[-1] // math.prod(entries)
    product = product.reshape(2 * (*(a.window for a in axes), *entries, channels))
    order = [*itertools.chain(*((i, ndim + i) for i in range(ndim))), 2 * ndim]
    product = product.transpose(*order, *(2 * ndim + 1 + i for i in order))
    product = product.reshape(2 * (*(a.window * a.size for a in axes), channels))
    product = product[2 * (*map(slice, window.shape), slice(None))]
    return product.reshape(2 * (math.prod(window.shape) * channels,))


def _pad(x: jax.Array, spatial: Sequence[tuple[int, int, int]]) -> jax.Array:
    """Zeros before, after and between the entries of x: (batch, *spatial, channels)."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def _dilated(size: int, dilation: int) -> int:
    """The length of `size` entries with `dilation - 1` others between each two."""
    return max(0, (size - 1) * dilation + 1)


def _ceil(a: int, b: int) -> int:
    """The quotient a / b, rounded up."""
    return -(-a // b)
