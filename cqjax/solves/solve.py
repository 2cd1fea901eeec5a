"""The update that each layer's solve makes: N (XᵀX + λI)⁻¹ H, for whatever update H came in.

First every solve says which matrix is to be inverted. So all can be inverted together, and before
the backward pass where they come of the inputs alone. Then each makes its update.

That is the one definition of the update, for both solvers. Where H is the gradient, the dual is the
cheap way to it. Where an earlier member of a chain changed H, the dual takes a second term.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.linalg import gram, ridge
from cqjax.linalg.products import diagonal as diagonal_of
from cqjax.linalg.products import einsum
from cqjax.solves import nearest
from cqjax.solves.layer import Layer
from cqjax.solves.matrices import Matrices, along, decomposed, finite, product


class Damping(NamedTuple):
    """λ, in two parts.

    Attributes:
      absolute: in units of the squared length of an input row.
      relative: in units of the mean of those eigenvalues that may differ from zero.
    """

    absolute: Any
    relative: Any

    def of(self, matrix: jax.Array, rank: jax.Array | int) -> Any:
        """λ for a matrix, (B, m, m), of which `rank` eigenvalues may differ from zero."""
        return self.absolute + self.relative * ridge.mean_eigenvalue(diagonal_of(matrix), rank)


class Solve(NamedTuple):
    """A matrix to be inverted, and the update that its inverse makes.

    Attributes:
      system: the matrix and its damping.
      update: makes the update from the inverse, and the sum of all entries of the solution, (B,).
        It is not finite where an entry is not.
    """

    system: ridge.System
    update: Callable[[ridge.Inverse], tuple[Matrices, jax.Array]]


class SolveOfMade(NamedTuple):
    """A matrix to be inverted, and the update of the parameters that a weight is made of.

    Attributes:
      system: the matrix and its damping.
      update: makes the parameters' updates from the inverse, and the sum of the weight's, (B,),
        which is not finite where they are not solved for.
    """

    system: ridge.System
    update: Callable[[ridge.Inverse], tuple[dict[str, jax.Array], jax.Array]]


def primal(layer: Layer, damping: Damping, xx: jax.Array, averaged: bool) -> Solve:
    """U = N (XᵀX + λI)⁻¹ H, for a second moment of the layer."""

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        return preconditioned(layer, damping, inverse.value)

    return Solve(primal_system(layer, damping, xx, averaged), update)


def nearest_of_made(layer: Layer, damping: Damping, xx: jax.Array, averaged: bool) -> SolveOfMade:
    """U = N (JᵀAJ + δI)⁻¹ H, A = XᵀX + λI, where the loss makes the weight of parameters."""
    system = primal_system(layer, damping, xx, averaged)

    def update(inverse: ridge.Inverse) -> tuple[dict[str, jax.Array], jax.Array]:
        one = jnp.eye(system.matrix.shape[-1], dtype=system.matrix.dtype)
        matrix = system.matrix + along(inverse.damping, system.matrix) * one
        handed, image = layer.handed, layer.image
        found = nearest.solved(image, handed, matrix, inverse.value)
        failed = inverse.failed.any()
        plain = jnp.where(inverse.failed, inverse.value[:, 0, 0], 1).min()
        u = {
            path: jnp.where(failed, plain * handed[path], layer.terms * change)
            for path, change in found.change.items()
        }
        total = image(u).joined.sum((1, 2))
        return u, jnp.where(found.residual <= nearest.UNSOLVED, total, jnp.nan)

    return SolveOfMade(system, update)


def primal_system(layer: Layer, damping: Damping, xx: jax.Array, averaged: bool) -> ridge.System:
    """N (XᵀX + λI)⁻¹, for a second moment of the layer."""
    xx, rank = layer.cropped(xx), layer.rank(averaged)
    absolute, relative = damping
    if layer.block.grouped:  # a group without rows has no gradient: with any λ, nothing to solve
        empty = jnp.trace(xx, axis1=1, axis2=2) == 0
        absolute = jnp.where(empty & (jnp.asarray(absolute) == 0), 1, absolute)
    return ridge.System(xx, absolute, rank, relative, layer.terms)


def preconditioned(
    layer: Layer, damping: Damping, inverse: jax.Array
) -> tuple[Matrices, jax.Array]:
    """The inverse's product with the updates, and the sum of its entries, (B,)."""
    weight, bias = layer.update
    if bias is not None and layer.joint_bias:
        u = ridge.solve(inverse, layer.update.joined)
        return Matrices.parted(u, True), u.sum((1, 2))
    u = ridge.solve(inverse, weight)
    if bias is not None:  # alone: its X is a column of ones
        ones = layer.block.rows_with_bias * (1 + damping.relative)
        if layer.capture.number is not None:  # of these, the part that are examples
            ones *= layer.capture.number / layer.block.rows
        bias *= layer.terms / (ones + damping.absolute)
    return Matrices(u, bias), u.sum((1, 2))


def dual(layer: Layer, damping: Damping) -> Solve:
    """U = N Xᵀ (XXᵀ + λI)⁻¹ Z̄, where the updates are the gradient."""
    rows, precision = layer.rows(), layer.block.precision
    dz = rows.dz.astype(gram.accumulator(rows.dz.dtype))

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        s = ridge.solve(inverse.value, dz)
        return product(rows.x, s, rows.h, precision), s.sum((1, 2))

    return Solve(_dual_system(layer, damping, precision), update)


def dual_of_changed(layer: Layer, damping: Damping) -> Solve:
    """U = N (XᵀX + λI)⁻¹ H for H = c G + R: the dual for G, Woodbury's identity for the rest R.

    (XᵀX + λI)⁻¹ R = (R - Xᵀ (XXᵀ + λI)⁻¹ X R) / λ, which needs the highest precision.
    """
    # R could pass through as it is, weight decay for example. But the primal preconditions it by
    # definition, and the two solvers would be different methods.
    n, handed = layer.terms, layer.update
    scale, rest, present = decomposed(handed, layer.gradient, layer.dtype)
    rows = layer.rows()
    x, h, dz = rows.x, rows.h, rows.dz.astype(gram.accumulator(rows.dz.dtype))
    outputs = einsum("bnd,bdo->bno", x.astype(dz.dtype), rest.weight, precision=gram.HIGHEST)
    if h is not None and rest.bias is not None:
        outputs += h[..., None].astype(dz.dtype) * rest.bias[:, None]

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        solution = ridge.solve(inverse.value, jnp.concatenate([dz, outputs], -1))
        sums = solution.sum((1, 2))
        failed = inverse.failed | ~jnp.isfinite(sums)
        limit = jnp.where(inverse.failed, inverse.value[:, 0, 0], 1)
        of_gradient, of_rest = jnp.split(solution, 2, -1)
        scaled = product(x, along(scale, of_gradient) * of_gradient, h)
        spanned = product(x, of_rest, h)

        def total(u: jax.Array, r: jax.Array, s: jax.Array, plain: jax.Array) -> jax.Array:
            outside = (n * r - s) / along(inverse.damping, r)
            u = u + jnp.where(along(present, r), outside, 0)
            return jnp.where(along(failed, u), along(limit, plain) * plain, u)

        return jax.tree.map(total, scaled, rest, spanned, finite(handed)), sums

    system = _dual_system(layer, damping, gram.HIGHEST)
    # Without damping, the rest has no solution outside the span of the rows.
    damped = (jnp.asarray(damping.absolute) > 0) | (jnp.asarray(damping.relative) > 0)
    solvable = damped | ~present
    return Solve(system._replace(solvable=solvable), update)


def diagonal(layer: Layer, damping: Damping, counts: jax.Array) -> tuple[Matrices, jax.Array]:
    """U = N H / (counts + λ), row by row: a lookup's XᵀX is the diagonal of counts.

    Returns:
      U, or H where U is not finite; and whether that happened, () bool.
    """
    weight = layer.update.weight
    mean = ridge.mean_eigenvalue(counts, layer.rank())
    added = jnp.broadcast_to(damping.absolute + damping.relative * mean, counts.shape[:1])
    divisor = counts + along(added, counts)
    u = jnp.where(weight == 0, 0, layer.terms * weight / divisor[..., None])
    failed = ~jnp.isfinite(u).all()
    return Matrices(jnp.where(failed, weight, u), None), failed


def _dual_system(layer: Layer, damping: Damping, precision: lax.PrecisionLike) -> ridge.System:
    """N (XXᵀ + λI)⁻¹."""
    rows, rank = layer.rows(), layer.rank()
    if layer.capture.number is None:
        xx = gram.outer(rows.x, None, precision)
        return ridge.System(xx, damping.absolute, rank, damping.relative, layer.terms, rows.h)
    xx = gram.outer(rows.x, rows.h, precision)
    # Rows of zeros, which are no examples, have no part in U, but must not be singular.
    zero = (diagonal_of(xx) == 0)[:, None]
    filled = xx + jnp.eye(xx.shape[-1], dtype=xx.dtype) * zero
    return ridge.System(filled, damping.of(xx, rank), rank, gain=layer.terms)
