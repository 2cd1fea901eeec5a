"""Sylvester equations A U + U B + λ U = H with symmetric, positive semi-definite A and B.

With A = P diag(a) Pᵀ and B = Q diag(b) Qᵀ, U = P [(Pᵀ H Q)ᵢⱼ / (aᵢ + bⱼ + λ)] Qᵀ.

A convolution and its transpose have windows. Then the two terms act on three axes of U, do not
commute, and have no eigenvectors in common: such equations are solved by conjugate gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from cqjax.linalg import definite, joined, lapack, ridge

FEW = 8
"""The most columns of U for which one inverse for each takes the place of A's eigenvectors. An
inverse costs 2 d³ operations, which suit a CPU's threads. Eigenvectors cost 9 d³, in LAPACK's: with
one thread as long as 2 to 11 inverses for d = 64 to 512, and up to 70 where threads fight."""

ITERATIONS = 200
"""The most steps of conjugate gradients."""

UNSOLVED = 1e-2
"""The residual, relative to H, beyond which an equation counts as not solved."""


class Equation(NamedTuple):
    """B equations A U + U B + λ U = H.

    Attributes:
      left: A, (B, d, d), or its diagonal, (B, d).
      right: B, (B, o, o), or its diagonal, (B, o).
      damping: λ, (B,).
      h: H, (B, d, o).
    """

    left: jax.Array
    right: jax.Array
    damping: jax.Array
    h: jax.Array

    @property
    def transposed(self) -> "Equation":
        """That for Uᵀ."""
        return Equation(self.right, self.left, self.damping, self.h.mT)


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


class Spectral(NamedTuple):
    """The eigendecompositions of B matrices.

    Attributes:
      values: the eigenvalues, (B, m), at least 0.
      vectors: the eigenvectors, (B, m, m), as columns; None for a diagonal matrix.
    """

    values: jax.Array
    vectors: jax.Array | None


def solve(equations: Sequence[Equation]) -> list[Solution]:
    """Solves equations. Matrices of one size are decomposed, or inverted, together.

    Where the smallest aᵢ + bⱼ + λ is less than 8 ε times the largest, an equation is singular to
    working precision. λ is raised there by `ridge.REPAIR_DAMPING` times the mean of aᵢ + bⱼ; where
    U has few columns, for each bⱼ by `ridge.inverses`.
    """
    # Of two sides, the one with few columns is on the right.
    turned = [eq.left.ndim == 3 and eq.left.shape[1] < eq.right.shape[1] for eq in equations]
    equations = [eq.transposed if t else eq for eq, t in zip(equations, turned, strict=True)]
    known = [_finite(eq.left) & _finite(eq.right) for eq in equations]
    # What LAPACK does with infinities is not said.
    equations = [
        eq._replace(left=_where(k, eq.left), right=_where(k, eq.right))
        for eq, k in zip(equations, known, strict=True)
    ]
    few = [eq.left.ndim == 3 and eq.right.shape[1] <= FEW for eq in equations]
    sides = [side for eq, f in zip(equations, few, strict=True) for side in eq[f:2]]
    found = iter(decompositions(sides))
    spectra = [[next(found) for _ in eq[f:2]] for eq, f in zip(equations, few, strict=True)]
    shifted = {i: _shifted(equations[i], *spectra[i]) for i, f in enumerate(few) if f}
    inverses = dict(zip(shifted, ridge.inverses(list(shifted.values())), strict=True))
    solutions = []
    for i, eq in enumerate(equations):
        if few[i]:
            u, repaired = _by_inverses(eq, inverses[i], *spectra[i])
        else:
            u, repaired = _by_eigenvectors(eq, *spectra[i])
        solutions.append(Solution(u.mT if turned[i] else u, repaired, known[i]))
    return solutions


def decompositions(matrices: Sequence[jax.Array]) -> list[Spectral]:
    """The eigendecompositions of matrices (B, m, m), and of diagonals (B, m), all finite."""
    found = iter(joined.batched(_decomposed, [m for m in matrices if m.ndim == 3]))
    return [Spectral(*next(found)) if m.ndim == 3 else Spectral(m, None) for m in matrices]


def solve_with_windows(
    equation: Equation,
    turned: Callable[[jax.Array], jax.Array],
    back: Callable[[jax.Array], jax.Array],
) -> Solution:
    """Solves A U + T⁻¹(B T(U)) + λ U = H, with one of each, by conjugate gradients.

    They are preconditioned by (A + μI)⁻¹, with μ the sum of λ and the mean eigenvalue of B. They
    end at a residual of ε^0.7 of H: 1e-5 in float32, 1e-11 in float64.

    Args:
      equation: A, (1, d, d), B, (1, e, e), λ, (1,), and H, (1, d, o).
      turned: T⁻¹, from the other way's matrix, (1, e, c), to this one's, (1, d, o).
      back: T.
    """
    known = _finite(equation.left) & _finite(equation.right)
    left, right, damping, h = equation
    left, right, h = (_where(known, part) for part in (left, right, h))
    mean = damping + jnp.trace(right, axis1=1, axis2=2) / right.shape[-1]
    mean = jnp.where(mean > 0, mean, 1)[:, None, None]
    inverse = definite.inverse(left + mean * jnp.eye(left.shape[-1], dtype=left.dtype))

    def operator(u: jax.Array) -> jax.Array:
        across = turned(_product(right, back(u)))
        return _product(left, u) + across + damping[:, None, None] * u

    u, _ = cg(
        operator,
        h,
        tol=float(jnp.finfo(h.dtype).eps) ** 0.7,
        maxiter=ITERATIONS,
        M=functools.partial(_product, inverse),
    )
    missing, wanted = (jnp.sum(jnp.square(r), (1, 2)) for r in (operator(u) - h, h))
    return Solution(u, ~(missing <= UNSOLVED**2 * wanted), known)


def _by_eigenvectors(eq: Equation, left: Spectral, right: Spectral) -> tuple[jax.Array, jax.Array]:
    """U, and whether λ was raised, (B,)."""
    a, b = left.values, right.values
    least = a.min(-1) + b.min(-1) + eq.damping
    singular = ~(least > 8 * jnp.finfo(a.dtype).eps * (a.max(-1) + b.max(-1)))
    mean = a.mean(-1) + b.mean(-1)
    damping = eq.damping + jnp.where(singular, ridge.REPAIR_DAMPING * mean, 0)
    rotated = eq.h if left.vectors is None else _product(left.vectors.mT, eq.h)
    rotated = rotated if right.vectors is None else _product(rotated, right.vectors)
    u = rotated / (a[:, :, None] + b[:, None, :] + damping[:, None, None])
    u = u if left.vectors is None else _product(left.vectors, u)
    return u if right.vectors is None else _product(u, right.vectors.mT), singular


def _shifted(eq: Equation, right: Spectral) -> ridge.System:
    """A + (bⱼ + λ) I, for each of B's eigenvalues: (B o, d, d)."""
    shifts = right.values + eq.damping[:, None]
    matrices = jnp.repeat(eq.left, shifts.shape[1], 0)
    return ridge.System(matrices, shifts.reshape(-1), eq.left.shape[1])


def _by_inverses(
    eq: Equation, inverse: ridge.Inverse, right: Spectral
) -> tuple[jax.Array, jax.Array]:
    """U, by a column of U Q for each of B's eigenvalues, and whether λ was raised, (B,)."""
    rotated = eq.h if right.vectors is None else _product(eq.h, right.vectors)
    batch, features, outputs = rotated.shape
    columns = rotated.mT.reshape(batch * outputs, features, 1)
    failed = inverse.failed[:, None, None]
    u = jnp.where(failed, jnp.nan, _product(inverse.value, columns))
    u = u.reshape(batch, outputs, features).mT
    repaired = inverse.repaired.reshape(batch, outputs).any(1)
    return u if right.vectors is None else _product(u, right.vectors.mT), repaired


def _decomposed(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, at least 0, and eigenvectors."""
    values, vectors = lapack.in_calls(_eigh, matrix)
    return jnp.maximum(values, 0), vectors


def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


def _finite(matrix: jax.Array) -> jax.Array:
    return jnp.isfinite(matrix).all(tuple(range(1, matrix.ndim)))


def _where(known: jax.Array, array: jax.Array) -> jax.Array:
    """Zero where it is not known."""
    return jnp.where(known.reshape(-1, *(1,) * (array.ndim - 1)), array, 0)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
