"""XᵀX of a convolution's im2col matrix X, without the patches that are its rows.

Row p of X holds x[p + u] for the offsets u of the window, so that (XᵀX)[u, v] is the sum over the
positions p of x[p + u] x[p + v]ᵀ. Were p to run over all positions at which the window touches the
input, this would depend on u - v alone. It would be the input's autocorrelation: one convolution of
the input with itself, with the channels in place of the batch and the examples in place of the
features. For k × k offsets that has (2k - 1)² entries, half of them by symmetry; XᵀX has k⁴.

What the positions beyond X's own contribute is taken off again. Those before the first one along an
axis see only the first few entries of the input along it. With these entries counted as channels,
the contribution is a Gram matrix of the same kind, with an axis less. The same holds at the end.

Dilations and strides are undone beforehand (`windows.in_blocks`).
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.linalg import gram, windows
from cqjax.linalg.windows import Window

WORD = 100
"""Floating-point operations in the time that a number takes to memory and back, roughly."""

SUMMED = 1 << 14
"""Positions that one convolution sums over, if that leaves no more than `PARTS` convolutions: in
float32, where they are many more, their sum is less accurate than that of partial sums."""

PARTS = 8

Padding = Sequence[tuple[int, int]]


def inner(
    x: jax.Array,
    window: Window,
    groups: int = 1,
    h: jax.Array | float | None = None,
    precision: lax.PrecisionLike = gram.HIGHEST,
) -> jax.Array:
    """XᵀX for the `windows.patches` X of x, or [X, h]ᵀ[X, h]; whichever way costs less.

    Args:
      x: the input, (batch, *spatial, channels).
      window: how the convolution's window moves over it.
      groups: parts that the channels are split into, each with an X of its own.
      h: a constant further feature, the same in every row; None for none.
      precision: of the products.

    Returns:
      (groups, d, d), or (groups, d+1, d+1) with h, in at least float32. The largest array needed is
      of the size of x or of XᵀX, unless the patches themselves are the cheaper way.
    """
    if correlation_cost(x.shape, window, groups) < patches_cost(x.shape, window, groups):
        product = correlation(x, window, groups, precision)
    else:
        product = gram.inner(windows.patches(x, window, groups), precision=precision)
    if h is None:
        return product
    h = jnp.asarray(h, product.dtype)
    sums = h * windows.column_sums(x, window, groups)[..., None]
    count = len(x) * math.prod(window.positions(x.shape[1:-1]))
    corner = jnp.full((groups, 1, 1), h * h * count)
    return jnp.block([[product, sums], [sums.mT, corner]])


def flops(shape: tuple[int, ...], window: Window, groups: int = 1) -> float:
    """Floating-point operations of `inner`, for x of this shape."""
    routes = correlation_cost, patches_cost
    cheaper = min(routes, key=lambda cost: cost(shape, window, groups))
    return cheaper(shape, window, groups, word=0)


def correlation(
    x: jax.Array, window: Window, groups: int = 1, precision: lax.PrecisionLike = gram.HIGHEST
) -> jax.Array:
    """XᵀX for the `windows.patches` X of x, (groups, d, d), by way of the autocorrelation.

    Exact but for rounding, whose errors are relative to the trace of XᵀX rather than to each entry.
    """
    x = x.astype(gram.accumulator(x.dtype))
    split = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -2, 0)
    features = math.prod(window.shape) * split.shape[-1]

    def product(x: jax.Array) -> jax.Array:
        total = jnp.zeros((features, features), x.dtype)
        for axes in windows.in_blocks(x.shape[1:-1], window):
            blocks = windows.gather(x, axes, window)
            part = _gram(blocks, [a.window for a in axes], [a.padding for a in axes], precision)
            total += windows.ungather(part, axes, window)
        return total

    return lax.map(product, split)


def patches_cost(
    shape: tuple[int, ...], window: Window, groups: int = 1, word: float = WORD
) -> float:
    """Operations by way of the patches, for x of this shape; a number stored counts as `word`."""
    rows = shape[0] * math.prod(window.positions(shape[1:-1]))
    features = math.prod(window.shape) * shape[-1] // groups
    return groups * (2 * rows * features**2 + word * (rows * features + features**2))


def correlation_cost(
    shape: tuple[int, ...], window: Window, groups: int = 1, word: float = WORD
) -> float:
    """Operations of `correlation`, for x of this shape; a number stored counts as `word`."""
    cost = 0.0
    for axes in windows.in_blocks(shape[1:-1], window):
        channels = shape[-1] // groups * math.prod(a.size for a in axes)
        blocks = [shape[0], *(a.length for a in axes), channels]
        cost += _cost(blocks, [a.window for a in axes], [a.padding for a in axes], word)
    return groups * cost


def _cost(shape: Sequence[int], window: Sequence[int], padding: Padding, word: float) -> float:
    """Operations of `_gram`, for x of this shape."""
    features = math.prod(window) * shape[-1]
    differences = math.prod(2 * k - 1 for k in window[1:]) * (window[0] if window else 1)
    cost = 2 * math.prod(shape) * shape[-1] * differences
    cost += word * (3 * math.prod(shape) + features**2)
    for axis, _, depth, others, around in _edges(window, padding):
        strip = (*shape[: axis + 1], *shape[axis + 2 : -1], depth * shape[-1])
        if len(others) > 1:
            cost += _cost(strip, others, around, word)
        else:
            cost += patches_cost(strip, _moving(others, around), word=word)
    return cost


def _moving(shape: Sequence[int], padding: Padding) -> Window:
    """A window that moves by 1, undilated."""
    ones = (1,) * len(shape)
    return Window(tuple(shape), ones, tuple(padding), ones, ones)


def _gram(
    x: jax.Array, window: Sequence[int], padding: Padding, precision: lax.PrecisionLike
) -> jax.Array:
    """Σ_p x[p + u] x[p + v]ᵀ, p moving by 1: (*window, channels, *window, channels).

    Args:
      x: (batch, *spatial, channels).
      window: the number of offsets u along each axis.
      padding: zeros before and after each axis; none is negative.
      precision: of the products.
    """
    channels, ndim = x.shape[-1], len(window)
    if not window:
        return gram.inner(x[None], precision=precision)[0]
    product = _toeplitz(_autocorrelation(x, window, precision), window)
    for axis, way, depth, others, around in _edges(window, padding):
        both = axis, ndim + 1 + axis
        strip = _pad(x, (axis + 1,), *(0, depth - x.shape[axis + 1])[::way])
        strip = jnp.moveaxis(strip, axis + 1, -2)
        strip = strip.reshape(*strip.shape[:-2], depth * channels)
        if len(others) > 1:
            edge = _gram(strip, others, around, precision)
        else:
            edge = gram.inner(windows.patches(strip, _moving(others, around)), None, precision)
        edge = edge.reshape(2 * (*others, depth, channels))
        edge = jnp.moveaxis(edge, (ndim - 1, 2 * ndim), both)
        shifted = (_pad(edge, both, *(at, -at)[::way]) for at in range(depth))
        edge = sum(shifted, jnp.zeros_like(edge))
        product -= _pad(edge, both, *(window[axis] - depth, 0)[::way])
    return product


def _edges(
    window: Sequence[int], padding: Padding
) -> Iterator[tuple[int, int, int, Sequence[int], Padding]]:
    """Where positions beyond the convolution's own touch the input.

    To count each of them once, those beyond the ends of one axis run over all positions that touch
    the input along the axes before it, and over the convolution's own along those after it.

    Yields:
      The axis; 1 before its first position or -1 after its last; how many positions beyond touch
      the input, and so how many of its entries they see; and for the axes that remain window and
      padding.
    """
    everywhere = [(k - 1, k - 1) for k in window]
    for axis, k in enumerate(window):
        others = (*window[:axis], *window[axis + 1 :])
        around = (*everywhere[:axis], *padding[axis + 1 :])
        for way, zeros in zip((1, -1), padding[axis], strict=True):
            if zeros < k - 1:
                yield axis, way, k - 1 - zeros, others, around


def _pad(x: jax.Array, axes: Sequence[int], before: int, after: int) -> jax.Array:
    """Adds zeros at the ends of some axes, or crops them where a number is negative."""
    config = [(0, 0, 0)] * x.ndim
    for axis in axes:
        config[axis] = (before, after, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _autocorrelation(
    x: jax.Array, window: Sequence[int], precision: lax.PrecisionLike
) -> jax.Array:
    """Σ_q x[q + Δ] x[q]ᵀ: (channels, *Δ, channels), Δ from 1 - k to k - 1 along each axis.

    The partial sums are of every so many examples: of a batch that is split over devices, each has
    its part in each of them, and none is moved.
    """
    reach = [(0, window[0] - 1), *((k - 1, k - 1) for k in window[1:])]
    few = max(SUMMED // max(1, math.prod(x.shape[1:-1])), -(-len(x) // PARTS), 1)
    number = min(1 << (-(-len(x) // few) - 1).bit_length(), len(x)) or 1
    parts = [x[start::number] for start in range(number)]
    half = functools.reduce(jnp.add, [_correlation(p, p, reach, precision) for p in parts])
    mirrored = jnp.flip(half[:, 1:], tuple(range(1, half.ndim - 1))).swapaxes(0, -1)
    return jnp.concatenate([mirrored, half], 1)


def _correlation(
    x: jax.Array, y: jax.Array, reach: Sequence[tuple[int, int]], precision: lax.PrecisionLike
) -> jax.Array:
    """Σ_q x[q + Δ] y[q]ᵀ: (channels, *Δ, channels), Δ from -before to after along each axis.

    On the CPU, XLA is fast at convolutions along one or two axes in the layout used here. It brings
    others into this layout, but not within a loop: there they take a hundred times as long.
    """
    ndim = len(reach)
    if ndim > 2:
        before, after = reach[0]
        padded = _pad(x, (1,), before, after)
        shifted = [padded[:, at : at + y.shape[1]] for at in range(before + after + 1)]
        y, *shifted = (z.reshape(-1, *z.shape[2:]) for z in (y, *shifted))
        return jnp.stack([_correlation(x, y, reach[1:], precision) for x in shifted], 1)
    spatial, last = tuple(range(1, ndim + 1)), ndim + 1
    return lax.conv_general_dilated(
        x.transpose(last, *spatial, 0),
        y.transpose(*spatial, 0, last),
        window_strides=(1,) * ndim,
        padding=reach,
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, last, *spatial), (last, ndim, *range(ndim)), (0, last, *spatial)
        ),
        precision=precision,
    )


def _toeplitz(correlation: jax.Array, window: Sequence[int]) -> jax.Array:
    """Entry u - v for each two offsets u, v: (*window, channels, *window, channels)."""
    ndim = len(window)
    for axis, k in enumerate(window, 1):
        rows = [
            lax.slice_in_dim(correlation, k - 1 - v, 2 * k - 1 - v, axis=axis) for v in range(k)
        ]
        correlation = jnp.stack(rows, ndim + axis)
    return jnp.moveaxis(correlation, 0, ndim)
