"""What is captured of lookups and ragged products, whatever `capture=` asks for."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.capture.statistics import Statistic, Trip
from cqjax.linalg import gram
from cqjax.program.forms import Lookup
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Site


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups(Statistic):
    """The second moments of a ragged product's groups.

    Attributes:
      xx: XᵀX of the rows of each group, (B, d, d).
      sizes: how many rows each group has, (B,), as floating-point numbers.
    """

    xx: jax.Array
    sizes: jax.Array

    @classmethod
    def take(cls, site: Site, trip: Trip) -> Groups:
        """Those of one trip."""
        assert isinstance(site.form, Ragged) and trip.sizes is not None
        xx = site.form.second_moment(trip.x, trip.sizes, trip.precision)
        sizes = trip.sizes.astype(xx.dtype)
        if trip.weights is not None:
            sizes = site.form.counted(trip.weights[0].astype(xx.dtype), trip.sizes)
        return cls(xx, sizes)

    def second_moment(self, site: Site, precision: lax.PrecisionLike) -> jax.Array:
        """XᵀX of each group."""
        del site, precision
        return self.xx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts(Statistic):
    """The second moment of a lookup's one-hot rows, which is diagonal.

    Attributes:
      counts: how often each of the d entries was read, (B, d), as floating-point numbers.
    """

    diagonal: ClassVar[bool] = True

    counts: jax.Array

    @classmethod
    def take(cls, site: Site, trip: Trip) -> Counts:
        """The counts of one trip, for which x are the indices."""
        assert isinstance(site.form, Lookup)
        weights = None if trip.weights is None else jnp.square(trip.weights)
        return cls(site.form.counts(trip.x, gram.accumulator(trip.dz.dtype), weights))

    def second_moment(self, site: Site, precision: lax.PrecisionLike) -> jax.Array:
        """The diagonal of XᵀX."""
        del site, precision
        return self.counts
