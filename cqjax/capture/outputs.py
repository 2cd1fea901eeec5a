"""What other weights would make of a layer's inputs, as far as their lengths need it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cqjax.linalg import devices, gram
from cqjax.linalg.products import diagonal, einsum


class Outputs(NamedTuple):
    """Outputs Y = XV of k columns of weights V, in some of a site's rows.

    Attributes:
      y: (B, m, k).
      h: the feature that stands for the bias, (B, 1 or m); None where there is none.
      times: how many rows each of the m stands for.
      inputs: the sum of squares of some of the entries of X, (B,).
      inputs_times: how many entries each of those stands for.
      axes: the mesh axes of `jax.shard_map` along which the devices have other rows.
    """

    y: jax.Array
    h: jax.Array | None
    times: float
    inputs: jax.Array
    inputs_times: float
    axes: devices.Axes


class Moment(NamedTuple):
    """XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), or the diagonal of XᵀX, (B, d)."""

    matrix: jax.Array


def with_bias(weight: jax.Array, bias: jax.Array | None, moment: jax.Array) -> jax.Array:
    """Columns (B, d, k), with a bias's (B, k), or zeros, below where the moment has an h."""
    if moment.shape[1] == weight.shape[1]:
        return weight
    if bias is None:
        bias = jnp.zeros_like(weight[:, 0])
    return jnp.concatenate([weight, bias[:, None]], 1)


def times(moment: jax.Array, columns: jax.Array) -> jax.Array:
    """A moment's product with columns (B, d, k)."""
    if moment.ndim == 2:
        return moment[..., None] * columns
    return einsum("bde,bek->bdk", moment, columns, precision=gram.HIGHEST)


def input_squares(moment: jax.Array, features: int) -> jax.Array:
    """‖X‖², (B,), by a moment, without the feature h."""
    entries = moment if moment.ndim == 2 else diagonal(moment)
    return entries[:, :features].sum(-1)
