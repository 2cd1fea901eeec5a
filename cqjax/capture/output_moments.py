"""Sums over the rows of what other weights would make of a layer's inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cqjax.linalg import gram
from cqjax.linalg.products import diagonal, einsum


class OutputMoments(NamedTuple):
    """Sums over the rows of the outputs Y = XV of k columns of weights V.

    Attributes:
      yy: YᵀY, (B, k, k).
      yh: Yᵀh, (B, k), with the feature h that stands for the bias; None where there is none.
      hh: hᵀh, (B,), likewise.
    """

    yy: jax.Array
    yh: jax.Array | None
    hh: jax.Array | None


def output_moments(moment: jax.Array, columns: jax.Array) -> OutputMoments:
    """The sums, by XᵀX or [X, h]ᵀ[X, h], or its diagonal, for columns V: (B, d, k)."""
    if moment.ndim == 2:
        product = moment[..., None] * columns
        return OutputMoments(_inner(columns, product), None, None)
    size = columns.shape[1]
    product = einsum("bde,bek->bdk", moment[:, :size, :size], columns, precision=gram.HIGHEST)
    yy = _inner(columns, product)
    if moment.shape[-1] == size:
        return OutputMoments(yy, None, None)
    yh = einsum("bdk,bd->bk", columns, moment[:, :size, -1], precision=gram.HIGHEST)
    return OutputMoments(yy, yh, moment[:, -1, -1])


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    return einsum("bdk,bdl->bkl", a, b, precision=gram.HIGHEST)


def input_squares(moment: jax.Array, features: int) -> jax.Array:
    """‖X‖², (B,), by a second moment, or its diagonal, without the constant feature."""
    entries = moment if moment.ndim == 2 else diagonal(moment)
    return entries[:, :features].sum(-1)


def of_outputs(y: jax.Array, h: jax.Array | None) -> OutputMoments:
    """The sums over outputs (B, n, k) and a feature h: (), or (B or 1, n)."""
    yy = _inner(y, y)
    if h is None:
        return OutputMoments(yy, None, None)
    h = h.astype(y.dtype)
    if not h.ndim:
        return OutputMoments(yy, h * y.sum(1), jnp.broadcast_to(h * h * y.shape[1], y.shape[:1]))
    h = jnp.broadcast_to(h, y.shape[:2])
    # Two columns, since products of matrices take less time to compile than those with vectors.
    yh = _inner(y, jnp.stack([h, h], -1))[..., 0]
    return OutputMoments(yy, yh, jnp.square(h).sum(1))
