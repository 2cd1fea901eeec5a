"""Statistics that taps capture at a site, and how they reach a solve.

A new statistic is one class: derive it from `Statistic`, and pass it as `capture=`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.capture.outputs import Outputs
from cqjax.linalg import devices, gram
from cqjax.linalg.products import einsum
from cqjax.program import row_weights
from cqjax.program.forms import Lookup, Product
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Site

_pytree = jax.tree_util.register_dataclass


class Trip(NamedTuple):
    """What a tap sees of a site Z = XW in one trip of the loops around it.

    Attributes:
      x: the activation, in the shape in which the equation has it.
      dz: the loss's gradient with respect to the result, in the result's shape.
      h: the feature that stands for the bias, (): 1 where one is added, 0 where only the weight's
        other sites have one; None where none has, or where it is solved for alone. Where rows have
        weights, one for each row (or, of a convolution, for each example).
      precision: of products with X.
      sizes: how many rows each group of a ragged product has, (B,); None elsewhere.
      weights: where rows have weights, by which x is multiplied already: 0 for rows that are no
        examples. None where all are.
    """

    x: jax.Array
    dz: jax.Array
    h: jax.Array | None
    precision: lax.PrecisionLike
    sizes: jax.Array | None = None
    weights: jax.Array | None = None


class Statistic:
    """What is captured of a site Z = XW: a function of its input X and of Z̄ = ∂L/∂Z.

    A subclass is a frozen dataclass of arrays, which `jax.tree_util.register_dataclass` knows. Its
    arrays have the axis B first (groups, members of an ensemble, layers scanned over). It defines
    `take`. The other methods are right for sums over rows, as XᵀX is: they sum over the trips of a
    loop with one weight, and over devices.

    Attributes:
      every_trip: whether what the trips of a loop give is kept apart, rather than summed. A class
        that sets it defines `fold`, too.
      diagonal: whether `second_moment` is the diagonal (B, d) of XᵀX: a lookup's alone.

    Examples:
      The second moment of the gradients, as K-FAC has it (docs/extending.md builds K-FAC on it):

      >>> import dataclasses
      >>> import cqjax, jax, jax.numpy as jnp
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True)
      ... class Signals(cqjax.Statistic):
      ...     zz: jax.Array
      ...
      ...     @classmethod
      ...     def take(cls, site, trip):
      ...         z = site.form.output.pack(trip.dz)
      ...         return cls(jnp.einsum("bno,bnp->bop", z, z, precision=trip.precision))
      >>> def loss_fn(params, x):
      ...     return jnp.mean(jnp.sum(x @ params["w"], -1))
      >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
      >>> _, _, captures = cqjax.value_and_grad(loss_fn, capture=Signals)(params, x)
      >>> print(captures["w"][0].sites[0].zz)
      [[[0.25 0.25]
        [0.25 0.25]]]
    """

    every_trip: ClassVar[bool] = False
    diagonal: ClassVar[bool] = False

    @classmethod
    def take(cls, site: Site, trip: Trip) -> Statistic:
        """What one trip of a site contributes.

        Args:
          site: the site. `site.form.rows(trip.x)` is X, (B, n, d), and
            `site.form.output.pack(trip.dz)` is Z̄, (B, n, o).
          trip: what is known in the backward pass.
        """
        raise NotImplementedError(
            f"{cls.__name__} does not say what to take of {' + '.join(site.view.paths)}; expected "
            "a class method take(cls, site, trip), as cqjax.Rows has"
        )

    def fold(self, site: Site) -> Self:
        """The statistic after the loops around a site, in which its arrays have axes in front."""
        stacked = len(site.view.loops)

        def merged(value: jax.Array) -> jax.Array:
            return value.reshape(site.batch, *value.shape[stacked + 1 :])

        return jax.tree.map(merged, self)

    def of_all_devices(self, axes: devices.Axes) -> Self:
        """What the devices along these mesh axes of `jax.shard_map` took together."""
        return devices.total(self, axes)

    def second_moment(self, site: Site, precision: lax.PrecisionLike) -> jax.Array:
        """XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), where there is an h.

        Raises:
          ValueError: it is not known.
        """
        del precision
        raise ValueError(
            f"the second moment of {' + '.join(site.view.paths)} was not captured, only "
            f"{type(self).__name__}; pass capture=cqjax.Gram to cqjax.value_and_grad, or let "
            f"{type(self).__name__} define second_moment"
        )

    def outputs(
        self, site: Site, weight: jax.Array, precision: lax.PrecisionLike
    ) -> Outputs | None:
        """The outputs XV of other weights V, (B, d, k), in some of the rows, if those were kept.

        `clip_by_output_change` measures lengths by them. Where this returns None, it takes
        `second_moment`.
        """
        del site, weight, precision
        return None


@_pytree
@dataclasses.dataclass(frozen=True)
class Rows(Statistic):
    """All rows of a site: what the dual solution needs.

    Attributes:
      x: the activations X, (B, n, d), in the model's dtype.
      dz: the loss's gradient with respect to the outputs, (B, n, o).
      h: the constant feature, (B, n): 1 in rows to which a bias is added, else 0; None where none
        is. It is captured rather than assumed: a branch that was not taken has zeros here too.
    """

    every_trip: ClassVar[bool] = True

    x: jax.Array
    dz: jax.Array
    h: jax.Array | None

    @classmethod
    def take(cls, site: Site, trip: Trip) -> Rows:
        """The rows of one trip."""
        assert not isinstance(site.form, Lookup | Ragged)
        rows = site.form.rows(trip.x)
        h = None if trip.h is None else row_weights.column(site.form, trip.h, rows.shape[:2])
        return cls(rows, site.form.output.pack(trip.dz), h)

    def fold(self, site: Site) -> Rows:
        """The rows of all trips: along B if each trip has a weight of its own, else along n."""
        own = [level for level, _ in site.view.loops]
        loops = len(site.loops)
        same_weight = [level for level in range(loops) if level not in own]
        order = (*own, loops, *same_weight, loops + 1)

        def merged(value: jax.Array) -> jax.Array:
            value = value.transpose(*order, *range(loops + 2, value.ndim))
            return value.reshape(site.batch, -1, *value.shape[loops + 2 :])

        return jax.tree.map(merged, self)

    def of_all_devices(self, axes: devices.Axes) -> Rows:
        """The rows of all devices, one after the other."""
        return devices.gathered(self, axes, 1)

    def second_moment(self, site: Site, precision: lax.PrecisionLike) -> jax.Array:
        """XᵀX of these rows."""
        del site
        return gram.inner(self.x, self.h, precision)

    def outputs(self, site: Site, weight: jax.Array, precision: lax.PrecisionLike) -> Outputs:
        """Those of these rows."""
        del site
        y = einsum("bnd,bdk->bnk", self.x.astype(weight.dtype), weight, precision=precision)
        inputs = jnp.square(self.x.astype(gram.accumulator(self.x.dtype))).sum((1, 2))
        return Outputs(y, self.h, 1, inputs, 1, ())


@_pytree
@dataclasses.dataclass(frozen=True)
class Inputs(Statistic):
    """A site's activations as they are: XᵀX is computed when somebody asks for it.

    Attributes:
      x: the activations, in the shape in which the equation has them.
      h: the constant feature, as in `Trip`: 1 where a bias is added, else 0; None where none is.
    """

    x: jax.Array
    h: jax.Array | None

    def fold(self, site: Site) -> Inputs:
        """The same: there are no loops around the site."""
        del site
        return self

    def of_all_devices(self, axes: devices.Axes) -> Inputs:
        """Each device's own: their moments are summed, once there are some."""
        del axes
        return self

    def second_moment(self, site: Site, precision: lax.PrecisionLike) -> jax.Array:
        """XᵀX, of all devices."""
        assert not isinstance(site.form, Lookup | Ragged)
        return devices.total(site.form.second_moment(self.x, self.h, precision), site.reduced)

    def outputs(self, site: Site, weight: jax.Array, precision: lax.PrecisionLike) -> Outputs:
        """Those of some of many rows.

        A convolution's inputs count as if its window saw each of their entries equally often.
        """
        form = site.form
        assert not isinstance(form, Lookup | Ragged)
        y, x = form.times(self.x, weight, precision), form.sampled(self.x)
        h = None if self.h is None else row_weights.sampled(form, self.h, y.shape[1])
        inputs = jnp.square(x.astype(gram.accumulator(x.dtype))).sum((1, 2))
        rows, features = form.output.shape[1], form.weight.shape[1]
        entries = x.shape[1] * x.shape[2]
        return Outputs(y, h, rows / y.shape[1], inputs, rows * features / entries, site.reduced)


@_pytree
@dataclasses.dataclass(frozen=True)
class Gram(Statistic):
    """The second moment of a site's rows: what the primal solution needs.

    Attributes:
      xx: XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1), where a bias is added; in float32, or in
        float64 for a float64 model.
    """

    xx: jax.Array

    @classmethod
    def take(cls, site: Site, trip: Trip) -> Gram | Inputs:
        """XᵀX of one trip; the inputs, where the backward pass keeps them anyway.

        Then whoever wants XᵀX computes it, and nobody pays for a product that nobody uses:
        `update_every` leaves it out between its updates.
        """
        if not (site.loops or site.recomputed or site.automatic):
            return Inputs(trip.x, trip.h)
        assert not isinstance(site.form, Lookup | Ragged)
        return cls(site.form.second_moment(trip.x, trip.h, trip.precision))

    def second_moment(self, site: Site, precision: lax.PrecisionLike) -> jax.Array:
        """XᵀX."""
        del site, precision
        return self.xx


@_pytree
@dataclasses.dataclass(frozen=True)
class SketchedGram(Gram):
    """XᵀX of sums of rows with random signs: of many tokens, nearly XᵀX at a part of its cost.

    A layer of d features and n rows, n ≥ 8d, has about 4d such sums (`linalg.gram.sketched`). Their
    XᵀX takes 8d³ operations where that of all rows takes 2nd². It is right in the mean, and it
    differs from one batch to the next. That is why it does less harm than an inverse that
    `update_every` keeps: errors that change average out, those that stay add up. Convolutions, and
    layers with fewer rows, have what `Gram` has. docs/choosing.md has what such sums cost in loss.

    Pass it as `capture=` to `cqjax.value_and_grad`.

    Attributes:
      xx: as in `Gram`.
    """

    rows_per_feature: ClassVar[int] = 4

    @classmethod
    def take(cls, site: Site, trip: Trip) -> Gram | Inputs:
        """XᵀX of one trip."""
        form, wanted = site.form, cls.rows_per_feature * site.form.weight.shape[1]
        if not isinstance(form, Product) or form.inputs.shape[1] < 2 * wanted:
            return Gram.take(site, trip)
        rows = form.rows(trip.x)
        if trip.h is not None:  # the constant feature gets the signs, too
            h = row_weights.column(form, trip.h, rows.shape[:2]).astype(rows.dtype)
            rows = jnp.concatenate([rows, h[..., None]], -1)
        return cls(gram.inner(gram.sketched(rows, wanted), None, trip.precision))
