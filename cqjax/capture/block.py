"""A block: the sites that share one weight, and the bias added to their outputs. One solve."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.capture.matrix_form import Layout, Lookup
from cqjax.capture.sites import Bias, Site
from cqjax.capture.statistics import Counts, Gram, Inputs, Rows, Statistic, of_all_devices
from cqjax.capture.views import View
from cqjax.linalg import gram

Solver = Literal["dual", "primal", "diagonal"]


SPANNING = 2
"""Rows for each feature with which an inverse is of use for other rows. Of independent rows it is
then twice too large in the mean; with as many rows as features, without bound."""


class Cost(NamedTuple):
    """How a loss's statistics are taken: what that and their solves may cost.

    Attributes:
      solver: "dual", "primal", or "auto" for the cheaper.
      max_dim: the largest matrix to be inverted; None for no limit.
      block_size: of the diagonal blocks of a larger XᵀX; None for no solve at all.
      subsample: XᵀX comes from one in so many rows.
      precision: of the products with X.
    """

    solver: Literal["auto", "primal", "dual"] = "auto"
    max_dim: int | None = None
    block_size: int | None = None
    subsample: int = 1
    precision: lax.PrecisionLike = "highest"


@dataclasses.dataclass(frozen=True)
class Block:
    """Sites with the same weight W (and bias b), seen as one product [X, h][W; b] = Z.

    The rows of X are those of all sites and trips; h is 1 in the rows of sites that add b. B counts
    the weights that are solved for side by side: groups, ensemble members, layers scanned over.

    Attributes:
      sites: the sites, in the order of the program.
      solver: "dual" (captures rows), "primal" (captures XᵀX) or "diagonal" (a lookup: counts).
      bias: the view added to the outputs; None if there is none.
      shapes: shapes of the parameters involved.
      exact: whether the loss uses these parameters in these sites only, so that their gradient
        is XᵀZ̄.
      parts: how many parts the features are in, each with an XᵀX of its own that is one of the B;
        a bias is then solved for alone. None where XᵀX is whole.
      subsample: XᵀX comes from one in so many rows.
      precision: of the products with X.
      max_dim: the largest matrix to be inverted; None for no limit.
    """

    sites: tuple[Site, ...]
    solver: Solver
    bias: Bias | None
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    exact: bool
    parts: int | None = None
    subsample: int = 1
    precision: lax.PrecisionLike = "highest"
    max_dim: int | None = None

    @property
    def view(self) -> View:
        """The weight."""
        return self.sites[0].view

    @property
    def name(self) -> str:
        """The weight's path; several, joined by +, where parameters are concatenated."""
        return " + ".join(self.view.paths)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all parameters that the block's update covers."""
        return tuple(path for path, _ in self.shapes)

    @property
    def batch(self) -> int:
        """The number B of weights solved for side by side."""
        return math.prod(length for _, length in self.view.loops) * self._packed[0]

    @property
    def rows(self) -> int:
        """n, over all sites, trips and devices."""
        return sum(site.rows for site in self.sites)

    @property
    def rows_with_bias(self) -> int:
        """How many of the rows add the bias."""
        return sum(site.rows for site in self.sites if site.bias is not None)

    @property
    def shared(self) -> bool:
        """Whether all examples share its rows."""
        return all(site.shared for site in self.sites)

    def terms(
        self, batch_size: int | jax.Array, examples: int | jax.Array | None
    ) -> float | jax.Array:
        """What ∂L/∂Z is multiplied by for the virtual error of a row of the output.

        N, the number of terms that the loss averages over; or N / examples, where all examples
        share the rows: ∂L/∂Z is a sum over them then.
        """
        return batch_size / examples if self.shared and examples is not None else batch_size

    @property
    def features(self) -> int:
        """d, without the homogeneous coordinate."""
        return self._packed[1]

    @property
    def outputs(self) -> int:
        """The number o of outputs."""
        return self._packed[2]

    @property
    def _packed(self) -> tuple[int, ...]:
        return self.sites[0].form.weight.shape

    def flops(self, solver: Solver) -> float:
        """Floating-point operations that a solver adds to the layer's own, on each device.

        Dual: XXᵀ, its inverse, and the inverse's product with Z̄; that with Xᵀ is the weight
        gradient's. Primal: XᵀX, its inverse, and the inverse's product with the gradient.
        """
        n, d, o = self.rows, self.size("primal"), self.outputs
        if solver == "diagonal":
            return self.batch * (n + d * o)
        if solver == "dual":
            return self.batch * (2 * n * n * d + 2 * n**3 + 2 * n * n * o)
        moment = sum(
            math.prod(site.loops) * site.form.moment_flops(site.x[0], d)
            for site in self.sites
            if not isinstance(site.form, Lookup)
        )
        return moment / self.subsample + self.batch * (2 * d**3 + 2 * d * d * o)

    def size(self, solver: Solver) -> int:
        """Rows of the matrix that a solver inverts."""
        if solver == "dual":
            return self.rows
        return self.features + (self.bias is not None and self.parts is None)

    def relative_flops(self) -> float:
        """The solver's operations relative to the layer's, forwards and backwards: 6 B n d o."""
        rows = sum(site.local_rows for site in self.sites)
        own = 6 * self.batch * rows * self.features * self.outputs
        return self.flops(self.solver) / own

    def small(self, solver: Solver) -> bool:
        """Whether a solver may invert its matrix."""
        return self.max_dim is None or self.size(solver) <= self.max_dim

    @property
    def spans(self) -> bool:
        """Whether a batch's rows surely span the features: there are `SPANNING` times as many.

        Else XᵀX + λI from other rows is nearly singular along some of a batch's own: its inverse
        would make updates too large there, up to a factor of its eigenvalues over λ.
        """
        return self.rows >= SPANNING * self.features

    def parts_of(self, size: int) -> int | None:
        """The least number of equal parts that leaves each at most `size` features, if any does.

        A convolution's parts have all the window's offsets of some of the channels.
        """
        form = self.sites[0].form
        assert not isinstance(form, Lookup)
        numbers = (n for n in range(1, form.channels + 1) if form.channels % n == 0)
        return next((n for n in numbers if self.features // n <= size), None)

    def split(self, parts: int) -> "Block":
        """The block with diagonal blocks of XᵀX in its place: see `parts`."""

        def split(site: Site) -> Site:
            assert not isinstance(site.form, Lookup)
            return dataclasses.replace(site, form=site.form.split(parts))

        return dataclasses.replace(
            self, sites=tuple(map(split, self.sites)), solver="primal", parts=parts
        )

    def weight_matrix(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The weight, of the parameters' arrays: (B, d, o)."""
        return self._pack(self.view, self.sites[0].form.weight, arrays)

    def bias_matrix(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The bias, of the parameters' arrays: (B, o)."""
        assert self.bias is not None
        return self._pack(self.bias.view, self.bias.layout, arrays)

    def scatter(self, weight: jax.Array, bias: jax.Array | None) -> dict[str, jax.Array]:
        """Arrays of the parameters' shapes that hold W: (B, d, o) and b: (B, o), else zeros."""
        shapes = dict(self.shapes)
        layout = self.sites[0].form.weight
        arrays = self.view.transpose(_unpack(self.view, layout, weight), shapes)
        if bias is not None and self.bias is not None:
            view, layout = self.bias.view, self.bias.layout
            arrays |= view.transpose(_unpack(view, layout, bias), shapes)
        return arrays

    @staticmethod
    def _pack(view: View, layout: Layout, arrays: Mapping[str, jax.Array]) -> jax.Array:
        operand = view(arrays).reshape(-1, *view.shape)
        packed = jax.vmap(layout.pack)(operand)
        return packed.reshape(-1, *layout.shape[1:])

    def statistic(self, site: Site, x: jax.Array, dz: jax.Array) -> Statistic:
        """What one trip of a site contributes: its rows, its inputs, or its second moment."""
        form = site.form
        if isinstance(form, Lookup):
            return Counts(form.counts(x, gram.accumulator(site.z[1])))
        h = None
        if self.bias is not None and self.parts is None:
            h = jnp.full((), site.bias is not None, x.dtype)
        if self.solver == "dual":
            rows = form.rows(x)
            ones = None if h is None else jnp.broadcast_to(h, rows.shape[:2])
            return Rows(rows, form.output.pack(dz), ones)
        if self.deferred(site):
            return Inputs(x, h)
        return Gram(form.second_moment(x, h, self.subsample, self.precision))

    def deferred(self, site: Site) -> bool:
        """Whether XᵀX is left to who wants it: where the backward pass keeps x, for a product."""
        return self.solver == "primal" and not site.loops and not site.recomputed

    def scanned(self, site: Site, level: int) -> bool:
        """Whether a statistic has an axis for the loop at `level`, rather than a sum over it."""
        return self.solver == "dual" or level in dict(site.view.loops)

    def fold(self, site: Site, statistic: Statistic) -> Statistic:
        """A site's statistic with the axes of the loops around it, and devices, in B and n."""
        if not site.loops and isinstance(statistic, Inputs):
            return statistic
        stacked = [level for level, _ in site.view.loops]
        loops = len(site.loops)
        shared = [level for level in range(loops) if level not in stacked]
        order = (*stacked, loops, *shared, loops + 1)

        def fold(value: jax.Array) -> jax.Array:
            if isinstance(statistic, Rows):
                value = value.transpose(*order, *range(loops + 2, value.ndim))
                return value.reshape(self.batch, -1, *value.shape[loops + 2 :])
            return value.reshape(self.batch, *value.shape[len(stacked) + 1 :])

        return of_all_devices(jax.tree.map(fold, statistic), site.reduced)


def _unpack(view: View, layout: Layout, matrix: jax.Array) -> jax.Array:
    trips = matrix.reshape(-1, *layout.shape)
    operand = jax.vmap(lambda m: layout.unpack(m, view.shape))(trips)
    return operand.reshape(*(length for _, length in view.loops), *view.shape)
