"""A block: the sites that share one weight, and the bias added to their outputs. One solve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from cqjax.capture.statistics import Statistic, Trip
from cqjax.linalg import devices, gram, sylvester
from cqjax.program import row_weights
from cqjax.program.forms import Convolution, Lookup
from cqjax.program.known import Constant
from cqjax.program.layout import Layout
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Bias, Site
from cqjax.program.steps import Position
from cqjax.program.taps import Tap
from cqjax.program.views import View

Solver = Literal["dual", "primal", "diagonal", "both sides"]

SPANNING = 2
"""Rows for each feature with which an inverse is of use for other rows than its own.

For independent rows, the mean of the inverse of XᵀX is 1 / (1 - d/n) times the inverse of its mean:
twice as large with n = 2d, without bound with n = d."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Sites with the same weight W (and bias b), seen as one product [X, h][W; b] = Z.

    The rows of X are those of all sites and trips; h is 1 in the rows of sites that add b. B counts
    the weights that are solved for side by side: groups, ensemble members, layers scanned over.

    W and b are what the product sees: where the loss multiplies parameters by constants, as in
    x @ (V / c), these are in W. So the damping λ is in the units of W, and the update is that of
    x @ W, brought back to V. The same goes for a constant between a product and its bias.

    Attributes:
      sites: the sites, in the order of the program.
      statistic: what is captured of each.
      solver: how the update is solved for: "dual" (from rows), "primal" (from XᵀX) or "diagonal"
        (from a lookup's counts).
      bias: the view added to the outputs; None if there is none.
      shapes: shapes of the parameters involved.
      exact: whether the loss uses these parameters in these sites only, so that their gradient
        is XᵀZ̄. It is not where the loss makes the weight of them.
      parts: how many parts the features are in, each with an XᵀX of its own that is one of the B;
        a bias is then solved for alone. None where XᵀX is whole.
      precision: of the products with X.
      max_dim: the largest matrix to be inverted; None for no limit.
      other: where the loss has products Y = DWᵀ, too: these, as a block of their own, whose weight
        is Wᵀ, (B, o, d). None where it has none.
      beside_own: whether `other`, or the block whose `other` this is, has rows that the examples do
        not share.
    """

    sites: tuple[Site, ...]
    statistic: type[Statistic]
    solver: Solver
    bias: Bias | None
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    exact: bool
    parts: int | None = None
    precision: lax.PrecisionLike = "highest"
    max_dim: int | None = None
    other: Block | None = None
    beside_own: bool = False

    @property
    def sides(self) -> tuple[Block, ...]:
        """This block, and the one whose weight is the transpose of its own, if there is one."""
        return (self,) if self.other is None else (self, self.other)

    @property
    def windows(self) -> bool:
        """Whether the weight is a kernel with windows, and no matrix that has a transpose."""
        return isinstance(self.sites[0].form, Convolution)

    def of_other(self, matrix: jax.Array) -> jax.Array:
        """The weight's matrix, (B, d, o), of that which the other side has of it."""
        form = self.sites[0].form
        return form.turned(matrix) if isinstance(form, Convolution) else matrix.mT

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
        return self.sites[0].batch

    @property
    def rows(self) -> int:
        """n, over all sites, trips and devices."""
        return sum(site.rows for site in self.sites)

    def number(self, weights: Mapping[Position, jax.Array]) -> jax.Array | None:
        """How many rows are examples, by the weights of those sites that have some: (), or (B,).

        None where all are.
        """
        if weights.keys().isdisjoint(site.position for site in self.sites):
            return None
        total = jnp.zeros(())
        for site in self.sites:
            number: Any = site.rows
            if site.position in weights:
                part = row_weights.counted(site.form, weights[site.position])
                number = devices.total(part * site.shared_trips, site.reduced)
            total += number
        return total

    @property
    def rows_with_bias(self) -> int:
        """How many of the rows add the bias."""
        return sum(site.rows for site in self.sites if site.bias is not None)

    @property
    def features(self) -> int:
        """d, without the constant feature."""
        return self.sites[0].form.weight.shape[1]

    @property
    def outputs(self) -> int:
        """The number o of outputs."""
        return self.sites[0].form.weight.shape[2]

    @property
    def grouped(self) -> bool:
        """Whether the B weights divide the rows among themselves: those of a ragged product."""
        return isinstance(self.sites[0].form, Ragged)

    @property
    def live(self) -> int | np.ndarray:
        """How many of the features have weights that may differ from zero: all, or (B,)."""
        form = self.sites[0].form
        if isinstance(form, Lookup | Ragged) or form.live == Constant(True):
            return self.features
        each = np.broadcast_to(form.live.value, form.weight.shape[:2]).sum(1)
        return np.tile(each, self.batch // len(each))

    @property
    def shared(self) -> bool:
        """Whether all examples share its rows, and those of the transposed weight."""
        return not self.beside_own and all(site.shared for site in self.sites)

    @property
    def spans(self) -> bool:
        """Whether a batch's rows surely span the features: there are `SPANNING` times as many.

        Else XᵀX + λI from other rows is nearly singular along some of a batch's own: its inverse
        would make updates too large there, up to a factor of its eigenvalues over λ.
        """
        known = not self.grouped and not is_symbolic_dim(self.rows)
        return known and self.rows >= SPANNING * self.features

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """Shape of the second moment: (B, d, d), (B, d+1, d+1), or (B, d) if it is diagonal."""
        size = self.size("primal")
        return (self.batch, size) if self.statistic.diagonal else (self.batch, size, size)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the second moment."""
        site = self.sites[0]
        return gram.accumulator(site.z.dtype if self.statistic.diagonal else site.dtype)

    def terms(
        self, batch_size: int | jax.Array, examples: int | jax.Array | None
    ) -> float | jax.Array:
        """What ∂L/∂Z is multiplied by for the virtual error of a row of the output.

        The virtual error is what the row's own example asks of it. A loss that averages over N
        terms divides it by N in ∂L/∂Z. Where all examples share the rows, ∂L/∂Z is a sum over
        the examples already: then N is divided by their number.
        """
        return batch_size / examples if self.shared and examples is not None else batch_size

    def by_moments(self) -> Block:
        """The block, solved for by its second moment."""
        if self.solver == "both sides":
            return self
        solver: Solver = "diagonal" if self.statistic.diagonal else "primal"
        return dataclasses.replace(self, solver=solver)

    def size(self, solver: Solver) -> int:
        """Rows of the matrix that a solver inverts."""
        if solver == "dual":
            return self.rows
        return self.features + (self.bias is not None and self.parts is None)

    def small(self, solver: Solver) -> bool:
        """Whether a solver may invert its matrix, which a diagonal is for none too large."""
        diagonal = self.statistic.diagonal and solver == "both sides"
        return diagonal or self.max_dim is None or self.size(solver) <= self.max_dim

    def flops(self, solver: Solver) -> float:
        """Floating-point operations that a solver adds to the layer's own, on each device.

        Dual: XXᵀ, its inverse, and the inverse's product with Z̄; that with Xᵀ is the weight
        gradient's. Primal: XᵀX, its inverse, and the inverse's product with the gradient. Both
        sides: XᵀX, its eigenvectors in 9 d³ (Golub and Van Loan, Matrix computations, 8.3.3), or
        inverses, and two products; and the same for DᵀD. Of kernels, the products of about ten
        steps of conjugate gradients.
        """
        n, d, o = self.rows, self.size("primal"), self.outputs
        if solver == "both sides" and self.other is not None:
            alone = dataclasses.replace(self, other=None)
            return alone.flops(solver) + self.other.flops(solver)
        if solver == "diagonal" or (solver == "both sides" and self.statistic.diagonal):
            return self.batch * (n + d * o)
        if solver == "dual":
            return self.batch * (2 * n * n * d + 2 * n**3 + 2 * n * n * o)
        moment = sum(
            math.prod(site.loops) * site.form.moment_flops(site.x.shape, d)
            for site in self.sites
            if not isinstance(site.form, Lookup)
        )
        solved = 2 * d**3 + 2 * d * d * o
        if solver == "both sides":
            few = o <= min(d, sylvester.FEW)  # an inverse for each output
            of_matrix = 2 * o * d**3 if few else 9 * d**3
            solved = 20 * d * d * o if self.windows else of_matrix + 4 * d * d * o
        return moment + self.batch * solved

    def relative_flops(self) -> float:
        """The solver's operations relative to the layer's, forwards and backwards: 6 B n d o."""
        rows = sum(site.local_rows for side in self.sides for site in side.sites)
        batch = 1 if self.grouped else self.batch
        own = 6 * batch * rows * self.features * self.outputs
        return self.flops(self.solver) / own

    def weight_matrix(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The weight, or a change of it, of the parameters' arrays: (B, d, o)."""
        return _pack(self.view, self.sites[0].form.weight, arrays)

    def bias_matrix(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The bias, or a change of it, of the parameters' arrays: (B, o)."""
        assert self.bias is not None
        return _pack(self.bias.view, self.bias.layout, arrays)

    def weight_gradient(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The gradient with respect to the weight, of that of the parameters: (B, d, o)."""
        return _pack(self.view.reciprocal, self.sites[0].form.weight, arrays)

    def bias_gradient(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The gradient with respect to the bias, of that of the parameters: (B, o)."""
        assert self.bias is not None
        return _pack(self.bias.view.reciprocal, self.bias.layout, arrays)

    def scatter(self, weight: jax.Array, bias: jax.Array | None) -> dict[str, jax.Array]:
        """Changes of the parameters that change W: (B, d, o) and b: (B, o) so, else zeros."""
        shapes = dict(self.shapes)
        layout = self.sites[0].form.weight
        arrays = self.view.bring_back(_unpack(self.view, layout, weight), shapes)
        return arrays if bias is None else arrays | self.scatter_bias(bias)

    def scatter_bias(self, bias: jax.Array) -> dict[str, jax.Array]:
        """Changes of the parameters that change b: (B, o) so; none where there is no bias."""
        if self.bias is None:
            return {}
        view = self.bias.view
        return view.bring_back(_unpack(view, self.bias.layout, bias), dict(self.shapes))

    def tap(self, site: Site, weights: jax.Array | None, examples: int | jax.Array | None) -> Tap:
        """Takes what is captured of one of its sites.

        Args:
          site: the site.
          weights: 1 for its rows that are examples, else 0, as in `row_weights`; None if all are.
          examples: how many there are; None where that is not plain.
        """
        given, more, dtype = (), (), site.z.dtype
        if weights is not None:
            given = (weights, jnp.ones((), dtype))
        if site.shared and not self.shared and examples is not None:
            # Beside rows of the examples' own, one that they share stands for as many.
            copies = jnp.sqrt(jnp.asarray(examples, dtype))
            ones = jnp.ones(row_weights.shape(site.form), dtype)
            given = (copies * (ones if weights is None else weights), copies)
        if isinstance(site.form, Ragged) and site.sizes is not None:
            more = ((site.form.sizes, site.sizes),)

        def take(x: jax.Array, dz: jax.Array, *arrays: jax.Array) -> Statistic:
            if not self.statistic.diagonal:  # else x are indices
                x = x.astype(site.dtype)
            sizes = arrays[0] if more else None
            factors = None
            if given:
                factors, copies = arrays[len(more) :]
                dz = dz / copies
            h = None
            if self.bias is not None and self.parts is None:
                h = jnp.full((), site.bias is not None, x.dtype)
            x = site.activation(x)
            if factors is not None:
                x = row_weights.weighted(site.form, x, factors)
                h = None if h is None else h * factors.astype(x.dtype)
            trip = Trip(x, site.gradient(dz), h, self.precision, sizes, factors)
            return self.statistic.take(site, trip)

        own = dict(site.view.loops)
        stacked = (self.statistic.every_trip or i in own for i in range(len(site.loops)))
        return Tap(
            take,
            site.operand,
            site.x,
            site.z,
            tuple(stacked),
            site.loops,
            site.varying,
            more,
            given,
        )


def _pack(view: View, layout: Layout, arrays: Mapping[str, jax.Array]) -> jax.Array:
    operand = view(arrays).reshape(-1, *view.shape)
    packed = jax.vmap(layout.pack)(operand)
    return packed.reshape(-1, *layout.shape[1:])


def _unpack(view: View, layout: Layout, matrix: jax.Array) -> jax.Array:
    trips = matrix.reshape(-1, *layout.shape)
    operand = jax.vmap(lambda m: layout.unpack(m, view.shape))(trips)
    return operand.reshape(*(length for _, length in view.loops), *view.shape)
