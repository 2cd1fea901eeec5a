"""The patch Gram: XᵀX of a convolution's im2col matrix X, without building X.

Each row of X is the patch of the input x that the window sees at one position. At position p it
holds x[p + u] for every offset u in the window. So the block of XᵀX for two offsets u and v is the
sum over all positions p of x[p + u] x[p + v]ᵀ.

Suppose that p ran over all positions at which the window touches the input. Then this sum would
depend on u - v alone: it would be the input's autocorrelation. That is one convolution of the input
with itself, in which the channels stand for the batch, and the examples for the features. For k × k
offsets it has (2k - 1)² blocks, of which symmetry gives half, where XᵀX has k⁴.

A convolution has fewer positions than that. So the contributions of the others, beyond its first or
last position along an axis, are subtracted again. Those before the first position see only the
first few entries along the axis. If these entries count as channels, their contribution is a Gram
matrix of the same kind with one axis less. The same holds at the end of the axis.

All this is for windows without dilation and strides; `windows.in_blocks` reduces others to these.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from cqjax.linalg import gram, windows
from cqjax.linalg.windows import Window

# With this value the cost model chose the slower route in one of 41 cases: a batch of one.
WORD = 100
"""Roughly, the floating-point operations that take as long as writing and reading one number."""

# A running float32 sum over 131,072 positions had an error of 6e-6 of the largest entry, which was
# more than the damping λ = 3e-2. Sums of at most 16,384 positions had 2e-7, at the same speed.
SUMMED = 1 << 14
"""The number of positions that one convolution sums over, unless that makes more than `PARTS`."""

PARTS = 8
"""The largest number of partial sums, each of which is a convolution in the program."""

ASSUMED = 64
"""The number of examples for which costs are compared where it is symbolic (`jax.export`)."""

Padding = Sequence[tuple[int, int]]


def inner(
    x: jax.Array,
    window: Window,
    groups: int = 1,
    h: jax.Array | float | None = None,
    precision: lax.PrecisionLike = gram.HIGHEST,
) -> jax.Array:
    """XᵀX of an input's patches X (`windows.patches`), by the route that costs less.

    Args:
      x: the input, (batch, *spatial, channels).
      window: how the convolution's window moves over it.
      groups: the number of parts that the channels are split into, each with an X of its own.
      h: a further feature, with one value for all rows, or for each example; None for none.
      precision: of the products.

    Returns:
      XᵀX, (groups, d, d), or with h [X, h]ᵀ[X, h], (groups, d+1, d+1), in at least float32. By way
      of the autocorrelation no array is much larger than x or XᵀX; the other route builds X.
    """
    shape = _assumed(x.shape)
    if correlation_cost(shape, window, groups) < patches_cost(shape, window, groups):
        product = correlation(x, window, groups, precision)
    else:
        product = gram.inner(windows.patches(x, window, groups), precision=precision)
    if h is None:
        return product
    h = jnp.asarray(h, product.dtype)
    if h.ndim:
        x, squares = x * h.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype), (h * h).sum()
        sums = windows.column_sums(x, window, groups)[..., None]
    else:
        sums, squares = h * windows.column_sums(x, window, groups)[..., None], h * h * x.shape[0]
    corner = jnp.full((groups, 1, 1), squares * math.prod(window.positions(x.shape[1:-1])))
    return jnp.block([[product, sums], [sums.mT, corner]])


def flops(shape: tuple[int, ...], window: Window, groups: int = 1) -> float:
    """The floating-point operations of `inner`, for an input of this shape."""
    shape, routes = _assumed(shape), (correlation_cost, patches_cost)
    cheaper = min(routes, key=lambda cost: cost(shape, window, groups))
    return cheaper(shape, window, groups, word=0)


def _assumed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape to estimate costs by: symbolic numbers, of examples, are taken to be `ASSUMED`."""
    return tuple(ASSUMED if is_symbolic_dim(size) else size for size in shape)


def correlation(
    x: jax.Array, window: Window, groups: int = 1, precision: lax.PrecisionLike = gram.HIGHEST
) -> jax.Array:
    """XᵀX of an input's patches, (groups, d, d), by way of the autocorrelation.

    It is exact but for rounding. The errors are relative to the trace of XᵀX, not to each entry,
    since large contributions are added and subtracted again.
    """
    x = x.astype(gram.accumulator(x.dtype))
    grouped = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups), -2, 0)
    features = math.prod(window.shape) * grouped.shape[-1]

    def product(x: jax.Array) -> jax.Array:
        total = jnp.zeros((features, features), x.dtype)
        for axes in windows.in_blocks(x.shape[1:-1], window):
            blocks = windows.gather(x, axes, window)
            shape, padding = [a.window for a in axes], [a.padding for a in axes]
            total += windows.ungather(_unit_gram(blocks, shape, padding, precision), axes, window)
        return total

    return lax.map(product, grouped)


def patches_cost(
    shape: tuple[int, ...], window: Window, groups: int = 1, word: float = WORD
) -> float:
    """The cost of XᵀX by way of the patches, for an input of this shape.

    Each floating-point operation counts as 1, and each number stored as `word`.
    """
    rows = shape[0] * math.prod(window.positions(shape[1:-1]))
    features = math.prod(window.shape) * shape[-1] // groups
    return groups * (2 * rows * features**2 + word * (rows * features + features**2))


def correlation_cost(
    shape: tuple[int, ...], window: Window, groups: int = 1, word: float = WORD
) -> float:
    """The cost of `correlation`, for an input of this shape, counted as in `patches_cost`."""
    cost = 0.0
    for axes in windows.in_blocks(shape[1:-1], window):
        channels = shape[-1] // groups * math.prod(a.size for a in axes)
        blocks = [shape[0], *(a.length for a in axes), channels]
        cost += _unit_cost(blocks, [a.window for a in axes], [a.padding for a in axes], word)
    return groups * cost


def _unit_cost(shape: Sequence[int], window: Sequence[int], padding: Padding, word: float) -> float:
    """The cost of `_unit_gram`, for an input of this shape."""
    features = math.prod(window) * shape[-1]
    differences = math.prod(2 * k - 1 for k in window[1:]) * (window[0] if window else 1)
    cost = 2 * math.prod(shape) * shape[-1] * differences
    cost += word * (3 * math.prod(shape) + features**2)
    for axis, _, depth, others, around in _outside(window, padding):
        strip = (*shape[: axis + 1], *shape[axis + 2 : -1], depth * shape[-1])
        if len(others) > 1:
            cost += _unit_cost(strip, others, around, word)
        else:
            cost += patches_cost(strip, _unit_window(others, around), word=word)
    return cost


def _unit_window(shape: Sequence[int], padding: Padding) -> Window:
    """A window without dilation and strides."""
    ones = (1,) * len(shape)
    return Window(tuple(shape), ones, tuple(padding), ones, ones)


def _unit_gram(
    x: jax.Array, window: Sequence[int], padding: Padding, precision: lax.PrecisionLike
) -> jax.Array:
    """The sum over positions p of x[p + u] x[p + v]ᵀ, for a window without dilation and strides.

    Args:
      x: the input, (batch, *spatial, channels).
      window: the number of offsets u along each axis.
      padding: the number of zeros before and after each axis; none is negative.
      precision: of the products.

    Returns:
      The Gram matrix, (*window, channels, *window, channels), indexed by u and then v.
    """
    channels, ndim = x.shape[-1], len(window)
    if not window:
        return gram.inner(x[None], precision=precision)[0]
    product = _toeplitz(_autocorrelation(x, window, precision), window)
    # Pairs such as (before, after) are for the start of an axis; `[::way]` swaps them for its end.
    both_ends = itertools.groupby(_outside(window, padding), lambda each: (each[0], each[2]))
    for (axis, depth), ends in both_ends:
        _, ways, _, (others, *_), (around, *_) = zip(*ends, strict=True)
        both = axis, ndim + 1 + axis
        strips = [_strip(x, axis, way, depth) for way in ways]
        if len(others) > 1:
            parts = [_unit_gram(strip, others, around, precision) for strip in strips]
        else:
            # The two ends of an axis side by side compile once, if patches of both are no larger
            # than the input.
            together = len(ways) * depth * math.prod(others) <= x.shape[axis + 1]
            over = _unit_window(others, around)
            seen = [jnp.concatenate(strips, -1)] if together else strips
            patches = [windows.patches(each, over, len(strips) // len(seen)) for each in seen]
            parts = [part for each in patches for part in gram.inner(each, None, precision)]
        for way, outside in zip(ways, parts, strict=True):
            outside = outside.reshape(2 * (*others, depth, channels))
            outside = jnp.moveaxis(outside, (ndim - 1, 2 * ndim), both)
            # A position that is t before the first (or after the last) sees each entry of the strip
            # at an offset that is t more (or less). So the entries' Gram matrix is shifted for each
            # t.
            shifted = (_pad(outside, both, *(at, -at)[::way]) for at in range(1, depth))
            outside = sum(shifted, outside)
            product -= _pad(outside, both, *(window[axis] - depth, 0)[::way])
    return product


def _strip(x: jax.Array, axis: int, way: int, depth: int) -> jax.Array:
    """The first (or last) `depth` entries along an axis, counted as channels."""
    strip = _pad(x, (axis + 1,), *(0, depth - x.shape[axis + 1])[::way])
    strip = jnp.moveaxis(strip, axis + 1, -2)
    return strip.reshape(*strip.shape[:-2], depth * x.shape[-1])


def _outside(
    window: Sequence[int], padding: Padding
) -> Iterator[tuple[int, int, int, Sequence[int], Padding]]:
    """Lists the sets of positions that touch the input and are not the convolution's own.

    A set is beyond one end of one axis. So that each position is in one set only, it runs along the
    axes before that one over all positions that touch the input, and along the axes after it over
    the convolution's own.

    Yields:
      The axis; the end, 1 for its start and -1 for its end; along this axis the number of positions
      in the set, which is also the number of entries that they see; and the window and the padding
      along the other axes.
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
    """The sums over entries q of x[q + Δ] x[q]ᵀ: (channels, *Δ, channels).

    Along each axis, of k offsets, Δ is from 1 - k to k - 1. The result for -Δ is the transposed one
    for Δ, so only Δ ≥ 0 is computed along the first axis.
    """
    reach = [(0, window[0] - 1), *((k - 1, k - 1) for k in window[1:])]
    # Partial sums are more accurate than one running sum: see `SUMMED`. Each takes every so many-th
    # example. So if the batch is split over devices, each device has its share of every sum, and no
    # example moves. The number of sums is a power of two, as numbers of devices usually are.
    number = 1
    if not is_symbolic_dim(x.shape[0]):
        examples = max(SUMMED // max(1, math.prod(x.shape[1:-1])), -(-len(x) // PARTS), 1)
        number = min(1 << (-(-len(x) // examples) - 1).bit_length(), len(x)) or 1
    half = _sum_of_parts(x, number, lambda part: _correlation(part, part, reach, precision))
    mirrored = jnp.flip(half[:, 1:], tuple(range(1, half.ndim - 1))).swapaxes(0, -1)
    return jnp.concatenate([mirrored, half], 1)


def _sum_of_parts(
    x: jax.Array, number: int, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The sum of a function of so many parts of the examples, as a loop, which is compiled once."""
    if number == 1:
        return function(x)
    x = _pad(x, (0,), 0, -len(x) % number)  # examples of zeros add nothing
    x = x.reshape(-1, number, *x.shape[1:])

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + function(lax.dynamic_index_in_dim(x, i, 1, keepdims=False))

    return lax.fori_loop(1, number, add, function(x[:, 0]))


def _correlation(
    x: jax.Array, y: jax.Array, reach: Sequence[tuple[int, int]], precision: lax.PrecisionLike
) -> jax.Array:
    """The sums over entries q of x[q + Δ] y[q]ᵀ: (channels, *Δ, channels).

    Along each axis, Δ is from -before to after, the two numbers of `reach`.
    """
    ndim = len(reach)
    # One convolution is the fastest way. Measured slower for 3 x 3 offsets: a product for each Δ,
    # im2col along one axis, a convolution for each row of offsets. Along more than two axes XLA has
    # no fast convolution on the CPU, so the first axis becomes a loop over Δ.
    if ndim > 2:
        before, after = reach[0]
        padded = _pad(x, (1,), before, after)
        shifted = [padded[:, at : at + y.shape[1]] for at in range(before + after + 1)]
        y, *shifted = (z.reshape(-1, *z.shape[2:]) for z in (y, *shifted))
        return jnp.stack([_correlation(x, y, reach[1:], precision) for x in shifted], 1)
    spatial, last = tuple(range(1, ndim + 1)), ndim + 1
    # The transposes are explicit because XLA is fast on the CPU in this layout only. It brings
    # others into it, but not within a loop: there they took a hundred times as long.
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
    """Copies entry u - v to each pair of offsets u, v: (*window, channels, *window, channels)."""
    ndim = len(window)
    for axis, k in enumerate(window, 1):
        # In k copies, one after the other, entries of one diagonal are 2k - 2 apart. As views of
        # one array these are compiled in a third of the time that k slices of it take.
        before, after = correlation.shape[:axis], correlation.shape[axis + 1 :]
        copies = jnp.broadcast_to(
            jnp.expand_dims(correlation, axis), (*before, k, 2 * k - 1, *after)
        ).reshape(*before, k * (2 * k - 1), *after)
        length = max(1, 2 * k - 2)
        rows = lax.slice_in_dim(copies, k - 1, k - 1 + k * length, axis=axis)
        rows = rows.reshape(*before, k, length, *after)
        each_v = lax.slice_in_dim(rows, 0, k, axis=axis + 1)
        correlation = jnp.moveaxis(each_v, axis, ndim + axis)
    return jnp.moveaxis(correlation, 0, ndim)
