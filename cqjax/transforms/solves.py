"""The update that each block's solve makes: N (XᵀX + λI)⁻¹ H for whatever update H came in.

First every solve says which matrix is to be inverted, so that all can be inverted together, and
before the backward pass where they come of the inputs alone; then it makes its update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.capture.captures import Capture
from cqjax.linalg import gram, ridge
from cqjax.transforms.incoming import Incoming, Matrices, along, decomposed, finite, product


class Damping(NamedTuple):
    """λ, and what is added to it in units of the mean eigenvalue."""

    absolute: Any
    relative: Any

    def of(self, matrix: jax.Array, rank: int) -> Any:
        """The damping of a matrix, (B, m, m), of which `rank` eigenvalues may differ from zero."""
        if isinstance(self.relative, int | float) and self.relative == 0:
            return self.absolute
        diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
        return self.absolute + self.relative * ridge.mean_eigenvalue(diagonal, rank)


class Solve(NamedTuple):
    """A matrix to be inverted, and the update that its inverse makes.

    With the update comes a row of the solution, (B, o), in which it would show if it is not finite.
    """

    system: ridge.System
    update: Callable[[ridge.Inverse], tuple[Matrices, jax.Array]]


def primal(
    incoming: Incoming, capture: Capture, damping: Damping, xx: jax.Array, averaged: bool
) -> Solve:
    """U = N (XᵀX + λI)⁻¹ H, for a second moment of the block."""

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        return preconditioned(incoming, capture, damping, inverse.value)

    return Solve(primal_system(incoming, capture, damping, xx, averaged), update)


def primal_system(
    incoming: Incoming, capture: Capture, damping: Damping, xx: jax.Array, averaged: bool
) -> ridge.System:
    """N (XᵀX + λI)⁻¹, for a second moment of the block."""
    block = capture.block
    size = block.features + incoming.joint_bias(block)
    rank = size if averaged else min(block.rows, size)
    xx = xx[:, :size, :size]
    return ridge.System(xx, damping.of(xx, rank), rank, incoming.terms(block))


def preconditioned(
    incoming: Incoming, capture: Capture, damping: Damping, inverse: jax.Array
) -> tuple[Matrices, jax.Array]:
    """The inverse's product with the updates, and a row of it."""
    block = capture.block
    weight, bias = incoming.matrices(block)
    if bias is not None and incoming.joint_bias(block):
        u = ridge.solve(inverse, jnp.concatenate([weight, bias[:, None]], 1))
        return Matrices(u[:, : block.features], u[:, -1]), u[:, 0]
    u = ridge.solve(inverse, weight)
    if bias is not None:
        ones = block.rows_with_bias * (1 + damping.relative)
        bias *= incoming.terms(block) / (ones + damping.absolute)
    return Matrices(u, bias), u[:, 0]


def dual(incoming: Incoming, capture: Capture, damping: Damping) -> Solve:
    """U = N Xᵀ (XXᵀ + λI)⁻¹ Z̄, where the updates are the gradient."""
    block = capture.block
    rows, h, dz = _rows(incoming, capture)

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        s = ridge.solve(inverse.value, dz)
        return product(rows, s, h, block.precision), s[:, 0]

    return Solve(_dual_system(incoming, capture, damping, block.precision), update)


def dual_of_changed(incoming: Incoming, capture: Capture, damping: Damping) -> Solve:
    """U = N (XᵀX + λI)⁻¹ H for H = c G + R: the dual for G, Woodbury's identity for the rest R.

    (XᵀX + λI)⁻¹ R = (R - Xᵀ (XXᵀ + λI)⁻¹ X R) / λ, which needs the highest precision.
    """
    block, n = capture.block, incoming.terms(capture.block)
    handed = incoming.matrices(block)
    scale, rest, present = decomposed(handed, incoming.gradient(capture))
    rows, h, dz = _rows(incoming, capture)
    moved = jnp.einsum("bnd,bdo->bno", rows.astype(dz.dtype), rest.weight, precision=gram.HIGHEST)
    if h is not None and rest.bias is not None:
        moved += h[..., None].astype(dz.dtype) * rest.bias[:, None]

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        solution = ridge.solve(inverse.value, jnp.concatenate([dz, moved], -1))
        failed = inverse.failed | ~jnp.isfinite(solution[:, 0]).all(-1)
        limit = jnp.where(inverse.failed, inverse.value[:, 0, 0], 1)
        of_gradient, of_rest = jnp.split(solution, 2, -1)
        scaled = product(rows, along(scale, of_gradient) * of_gradient, h)
        spanned = product(rows, of_rest, h)

        def total(u: jax.Array, r: jax.Array, s: jax.Array, plain: jax.Array) -> jax.Array:
            outside = (n * r - s) / along(inverse.damping, r)
            u = u + jnp.where(along(present, r), outside, 0)
            return jnp.where(along(failed, u), along(limit, plain) * plain, u)

        return jax.tree.map(total, scaled, rest, spanned, finite(handed)), solution[:, 0]

    system = _dual_system(incoming, capture, damping, gram.HIGHEST)
    solvable = (jnp.asarray(system.damping) > 0) | ~present
    return Solve(system._replace(solvable=solvable), update)


def diagonal(
    incoming: Incoming, capture: Capture, damping: Damping, counts: jax.Array
) -> tuple[Matrices, jax.Array]:
    """U = N H / (counts + λ), row by row: a lookup's XᵀX is the diagonal of counts.

    Returns:
      U, or H where U is not finite; and whether that happened, () bool.
    """
    block = capture.block
    weight, _ = incoming.matrices(block)
    mean = ridge.mean_eigenvalue(counts, min(block.rows, block.features))
    added = jnp.broadcast_to(damping.absolute + damping.relative * mean, counts.shape[:1])
    divisor = counts + along(added, counts)
    u = jnp.where(weight == 0, 0, incoming.terms(block) * weight / divisor[..., None])
    failed = ~jnp.isfinite(u).all()
    return Matrices(jnp.where(failed, weight, u), None), failed


def _dual_system(
    incoming: Incoming, capture: Capture, damping: Damping, precision: lax.PrecisionLike
) -> ridge.System:
    """N (XXᵀ + λI)⁻¹."""
    block = capture.block
    rows, h, _ = _rows(incoming, capture)
    xx = gram.outer(rows, h, precision)
    rank = min(block.rows, block.features + incoming.has_bias(block))
    return ridge.System(xx, damping.of(xx, rank), rank, incoming.terms(block))


def _rows(incoming: Incoming, capture: Capture) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """X, h where the bias is solved for too, and Z̄ in at least float32."""
    rows = capture.rows()
    h = rows.h if incoming.has_bias(capture.block) else None
    return rows.x, h, rows.dz.astype(gram.accumulator(rows.dz.dtype))
