"""Sylvester equations A U + U B + λ U = H with symmetric A and B, by their eigenvectors.

With A = P diag(a) Pᵀ and B = Q diag(b) Qᵀ, U = P [(Pᵀ H Q)ᵢⱼ / (aᵢ + bⱼ + λ)] Qᵀ.

A convolution and its transpose have windows. Then the two terms act on three axes of U, do not
commute, and have no eigenvectors in common: such equations are solved by conjugate gradients.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from cqjax.linalg import lapack, ridge, triangular


class Spectral(NamedTuple):
    """The eigendecompositions of symmetric, positive semi-definite matrices.

    Attributes:
      values: the eigenvalues, (B, m), at least 0.
      vectors: the eigenvectors, (B, m, m), as columns; None for a diagonal matrix.
      finite: (B,) bool, whether the matrix was. Else its values are zero.
    """

    values: jax.Array
    vectors: jax.Array | None
    finite: jax.Array


class Solution(NamedTuple):
    """The solutions of B equations.

    Attributes:
      value: U, (B, d, o).
      repaired: (B,) bool, whether λ was raised, or conjugate gradients did not converge.
      known: (B,) bool, whether both matrices are finite.
    """

    value: jax.Array
    repaired: jax.Array
    known: jax.Array


def decompositions(matrices: Sequence[jax.Array]) -> list[Spectral]:
    """The eigendecompositions of matrices (B, m, m), and of diagonals (B, m).

    Matrices of one size are decomposed together.
    """
    found = iter(ridge.batched_by_shape(_decomposed, [(m,) for m in matrices if m.ndim == 3]))
    return [Spectral(*next(found)) if m.ndim == 3 else _of_diagonal(m) for m in matrices]


def solve(left: Spectral, right: Spectral, damping: jax.Array, h: jax.Array) -> Solution:
    """Solves A U + U B + λ U = H.

    Where the smallest aᵢ + bⱼ + λ is less than 8 ε times the largest, the equation is singular to
    working precision. λ is raised there by `ridge.REPAIR_DAMPING` times the mean of aᵢ + bⱼ.

    Args:
      left: A, B matrices of d rows.
      right: B, as many of o rows.
      damping: λ, (B,).
      h: H, (B, d, o).
    """
    a, b = left.values, right.values
    least = a.min(-1) + b.min(-1) + damping
    singular = ~(least > 8 * jnp.finfo(a.dtype).eps * (a.max(-1) + b.max(-1)))
    mean = a.mean(-1) + b.mean(-1)
    damping = damping + jnp.where(singular, ridge.REPAIR_DAMPING * mean, 0)
    rotated = _between(_transposed(left.vectors), h, right.vectors)
    quotient = rotated / (a[:, :, None] + b[:, None, :] + damping[:, None, None])
    u = _between(left.vectors, quotient, _transposed(right.vectors))
    return Solution(u, singular, left.finite & right.finite)


ITERATIONS = 200
"""The most steps of conjugate gradients."""

UNSOLVED = 1e-2
"""The residual, relative to H, beyond which an equation counts as not solved."""


def solve_with_windows(
    left: jax.Array,
    right: jax.Array,
    damping: jax.Array,
    h: jax.Array,
    turned: Callable[[jax.Array], jax.Array],
    back: Callable[[jax.Array], jax.Array],
) -> Solution:
    """Solves A U + T⁻¹(B T(U)) + λ U = H by conjugate gradients.

    They are preconditioned by (A + μI)⁻¹, with μ the sum of λ and the mean eigenvalue of B. They
    end at a residual of ε^0.7 of H: 1e-5 in float32, 1e-11 in float64.

    Args:
      left: A, (1, d, d).
      right: B, (1, e, e).
      damping: λ, (1,).
      h: H, (1, d, o).
      turned: T⁻¹, from the other way's matrix, (1, e, c), to this one's, (1, d, o).
      back: T.
    """
    known = jnp.isfinite(left).all((1, 2)) & jnp.isfinite(right).all((1, 2))
    left, right, h = (jnp.where(known[:, None, None], part, 0) for part in (left, right, h))
    mean = damping + jnp.trace(right, axis1=1, axis2=2) / right.shape[-1]
    mean = jnp.where(mean > 0, mean, 1)[:, None, None]
    inverse = triangular.inverse(left + mean * jnp.eye(left.shape[-1], dtype=left.dtype))

    def operator(u: jax.Array) -> jax.Array:
        across = turned(_between(right, back(u), None))
        return _between(left, u, None) + across + damping[:, None, None] * u

    u, _ = cg(
        operator,
        h,
        tol=float(jnp.finfo(h.dtype).eps) ** 0.7,
        maxiter=ITERATIONS,
        M=lambda residual: _between(inverse, residual, None),
    )
    missing, wanted = (jnp.sum(jnp.square(r), (1, 2)) for r in (operator(u) - h, h))
    return Solution(u, ~(missing <= UNSOLVED**2 * wanted), known)


def _decomposed(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The fields of a `Spectral`."""
    finite = jnp.isfinite(matrix).all((1, 2))
    # What LAPACK does with infinities is not said.
    matrix = jnp.where(finite[:, None, None], matrix, 0)
    values, vectors = lapack.in_calls(_eigh, matrix)
    return jnp.maximum(values, 0), vectors, finite


def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


def _of_diagonal(values: jax.Array) -> Spectral:
    finite = jnp.isfinite(values).all(-1)
    return Spectral(jnp.where(finite[:, None], values, 0), None, finite)


def _between(left: jax.Array | None, matrix: jax.Array, right: jax.Array | None) -> jax.Array:
    """The product of three matrices, of which None is the identity."""
    if left is not None:
        matrix = jnp.matmul(left, matrix, precision=jax.lax.Precision.HIGHEST)
    if right is not None:
        matrix = jnp.matmul(matrix, right, precision=jax.lax.Precision.HIGHEST)
    return matrix


def _transposed(vectors: jax.Array | None) -> jax.Array | None:
    return None if vectors is None else vectors.mT
