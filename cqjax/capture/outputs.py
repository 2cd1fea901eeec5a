"""What other weights would make of a layer's inputs, as far as their lengths need it."""

from typing import NamedTuple

import jax


class Outputs(NamedTuple):
    """Outputs Y = XV of k columns of weights V, in some of a site's rows.

    Attributes:
      y: (B, m, k).
      h: the feature that stands for the bias, () or (1 or B, m); None for none.
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
    axes: tuple[str, ...]


class Moment(NamedTuple):
    """XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), or the diagonal of XᵀX, (B, d)."""

    matrix: jax.Array
