"""Sylvester equations A U + U B + λ U = H with symmetric A and B, by their eigenvectors.

With A = P diag(a) Pᵀ and B = Q diag(b) Qᵀ, U = P [(Pᵀ H Q)ᵢⱼ / (aᵢ + bⱼ + λ)] Qᵀ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cqjax.linalg import lapack, ridge


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
      repaired: (B,) bool, whether λ was raised.
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


def _decomposed(matrix: jax.Array) -> Spectral:
    finite = jnp.isfinite(matrix).all((1, 2))
    # What LAPACK does with infinities is not said.
    matrix = jnp.where(finite[:, None, None], matrix, 0)
    values, vectors = lapack.in_calls(_eigh, matrix)
    return Spectral(jnp.maximum(values, 0), vectors, finite)


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
