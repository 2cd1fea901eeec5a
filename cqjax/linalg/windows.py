"""A convolution's window: what it sees of the input, and the same with strides of 1."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.linalg import gram


class Window(NamedTuple):
    """How a convolution's window moves over its input: one entry for each spatial axis.

    Attributes:
      shape: of the window.
      strides: of the window.
      padding: before and after the input; negative amounts crop it.
      lhs_dilation: of the input.
      rhs_dilation: of the window.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    def positions(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """How many positions the window takes along each axis of the input."""
        return tuple(
            max(0, (_dilated(size, inserted) + lo + hi - _dilated(k, dilation)) // stride + 1)
            for size, k, stride, (lo, hi), inserted, dilation in zip(spatial, *self, strict=True)
        )


def patches(x: jax.Array, window: Window, groups: int = 1) -> jax.Array:
    """The im2col matrix X of x: (batch, *spatial, channels), which is (groups, n, d).

    n runs over examples and positions, d over the window's offsets, then over a group's channels.
    """
    columns = jnp.stack(_columns(x, window), -2)
    split = columns.reshape(*columns.shape[:-1], groups, x.shape[-1] // groups)
    rows, features = math.prod(columns.shape[:-2]), columns.shape[-2] * split.shape[-1]
    return jnp.moveaxis(split, -2, 0).reshape(groups, rows, features)


def column_sums(x: jax.Array, window: Window, groups: int = 1) -> jax.Array:
    """The sums of the columns of `patches`: (groups, d), in at least float32."""
    total = x.sum(0, keepdims=True, dtype=gram.accumulator(x.dtype))
    axes = tuple(range(x.ndim - 1))
    sums = jnp.stack([column.sum(axes) for column in _columns(total, window)])
    return jnp.moveaxis(sums.reshape(len(sums), groups, -1), 1, 0).reshape(groups, -1)


def _columns(x: jax.Array, window: Window) -> list[jax.Array]:
    """What each offset of the window sees: (batch, *positions, channels)."""
    edges = zip(window.padding, window.lhs_dilation, strict=True)
    padded = _pad(x, [(lo, hi, inserted - 1) for (lo, hi), inserted in edges])
    columns = []
    for offset in itertools.product(*map(range, window.shape)):
        starts = [u * dilation for u, dilation in zip(offset, window.rhs_dilation, strict=True)]
        axes = zip(starts, window.positions(x.shape[1:-1]), window.strides, strict=True)
        columns.append(padded[:, *(slice(u, u + n * stride, stride) for u, n, stride in axes)])
    return columns


class Blocks(NamedTuple):
    """Some of an axis's entries in blocks, over which a window moves with stride 1, undilated.

    Attributes:
      start: the first of the entries.
      step: from one of the entries to the next.
      entries: how many there are.
      zeros: how many zeros the first block begins with.
      size: of a block.
      length: of the axis, in blocks.
      window: its length, in blocks.
      padding: before and after, in blocks; neither is negative.
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
    """Splits a window's positions into those of windows with stride 1 over blocks of entries.

    Let r be the dilation and s the stride, divided by what they have in common. Every r-th position
    sees entries that are equal modulo the dilation; from one such position to the next, the window
    moves s of these entries further, which make a block.

    Args:
      spatial: the input's spatial shape.
      window: the window.

    Yields:
      Blocks for each axis. Those of which a window would see nothing are left out.
    """
    yield from itertools.product(
        *(
            _split(_dilated(size, inserted), n, k, stride, lo, dilation)
            for size, n, k, stride, (lo, _), inserted, dilation in zip(
                spatial, window.positions(spatial), *window, strict=True
            )
        )
    )


def _split(
    length: int, positions: int, window: int, stride: int, before: int, dilation: int
) -> Iterator[Blocks]:
    phases, size = (n // math.gcd(stride, dilation) for n in (dilation, stride))
    reach = _ceil(window, size)
    for phase in range(min(phases, positions)):
        own = _ceil(positions - phase, phases)
        first = stride * phase - before
        padding = max(0, _ceil(-first, dilation))
        start = first + dilation * padding
        entries = min(_ceil(length - start, dilation), (own - 1) * size + window - padding)
        if entries > 0:
            outside, zeros = divmod(padding, size)
            blocks = _ceil(zeros + entries, size)
            ends = outside, own - 1 + reach - outside - blocks
            yield Blocks(start, dilation, entries, zeros, size, blocks, reach, ends)


def gather(x: jax.Array, axes: Sequence[Blocks], window: Window) -> jax.Array:
    """Blocks of x: (batch, *spatial, channels) as (batch, *blocks, entries and channels)."""
    x = _pad(x, [(0, 0, inserted - 1) for inserted in window.lhs_dilation])
    x = x[:, *(slice(a.start, a.start + (a.entries - 1) * a.step + 1, a.step) for a in axes)]
    x = _pad(x, [(a.zeros, a.length * a.size - a.zeros - a.entries, 0) for a in axes])
    x = x.reshape(len(x), *itertools.chain(*((a.length, a.size) for a in axes)), x.shape[-1])
    entries = range(2, x.ndim - 1, 2)
    x = x.transpose(0, *(i - 1 for i in entries), *entries, x.ndim - 1)
    return x.reshape(len(x), *(a.length for a in axes), -1)


def ungather(product: jax.Array, axes: Sequence[Blocks], window: Window) -> jax.Array:
    """XᵀX, (d, d), of the one for blocks: (*window, entries and channels) twice."""
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
    return max(0, (size - 1) * dilation + 1)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
