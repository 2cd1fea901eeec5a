"""The singular value decomposition of a layer's inputs, and what takes its place for two sides."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cqjax.linalg import sylvester
from cqjax.linalg.gram import accumulator
from cqjax.solves import both_sides
from cqjax.solves.layer import Layer


class Spectrum(NamedTuple):
    """The singular value decomposition X = UΣVᵀ, as far as the captures determine it.

    Attributes:
      values: Σ, (B, k), in descending order; 0 for values within rounding error of zero.
      right: V, (B, d, k); None if it is the identity.
      left: U, (B, n, k); None if rows were not captured.
    """

    values: jax.Array
    right: jax.Array | None
    left: jax.Array | None


def spectrum_of(layer: Layer) -> Spectrum:
    """The decomposition of a weight's input X; a bias that is solved for with it is a feature."""
    if layer.block.statistic.diagonal:  # a lookup: XᵀX is the diagonal matrix of counts
        return Spectrum(jnp.sqrt(layer.second_moment()), None, None)
    if layer.capture.has_rows:
        left, values, right = jnp.linalg.svd(inputs(layer), full_matrices=False)
        return Spectrum(
            _without_rounding(values, max(layer.block.rows, layer.size)), right.mT, left
        )
    squares, right = jnp.linalg.eigh(layer.second_moment())
    values = jnp.sqrt(_without_rounding(jnp.maximum(squares[:, ::-1], 0), layer.size))
    return Spectrum(values, right[:, :, ::-1], None)


def eigenvalues(layer: Layer, system: both_sides.System) -> jax.Array:
    """The roots of aᵢ + bⱼ, in descending order, for a weight that is used both ways: (B, d o).

    Kernels with windows have none: NaN, (B, 1).
    """
    if layer.block.windows:
        return jnp.full((1, 1), jnp.nan, system.left.moment.dtype)
    left, right = sylvester.decompositions([system.left.moment, system.right.moment])
    sums = left.values[:, :, None] + right.values[:, None, :]
    values = jnp.sqrt(-jnp.sort(-sums.reshape(len(sums), -1), -1))
    return _without_rounding(values, max(left.values.shape[1], right.values.shape[1]))


def _without_rounding(values: jax.Array, size: int) -> jax.Array:
    """Values (B, k) in descending order, with zeros for those within rounding error of zero."""
    least = size * jnp.finfo(values.dtype).eps * values[:, :1]
    return jnp.where(values <= least, 0, values)


def inputs(layer: Layer) -> jax.Array:
    """[X, h], (B, n, d + 1), or X where there is no bias, in at least float32."""
    rows = layer.rows()
    x = rows.x.astype(accumulator(rows.x.dtype))
    if rows.h is None:
        return x
    return jnp.concatenate([x, rows.h[..., None].astype(x.dtype)], -1)
