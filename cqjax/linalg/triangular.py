"""Inverses of symmetric matrices.

Small diagonal blocks are factorised by LAPACK. Everything else is matrix products, which run in
XLA's own threads and suit accelerators.

LAPACK's triangular solves run in threads of OpenBLAS, and so do its factorisations from about 200
rows on. On a CPU these threads fight XLA's for the cores. On busy cores, a training step with
`cho_solve` took 2.5 to 16 times as long as SGD's step, though its arithmetic is 5 % more; with the
products below it took 1.19 times as long.
"""

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.linalg import lapack

# 128 is below the size from which LAPACK uses threads of its own. On busy cores, nine 256 x 256
# Cholesky factorisations took 85 ms in the median and up to 3.7 s; by blocks of 128, with the
# inverse factors, 6 ms and 15 ms.
BLOCK = 128
"""The largest number of rows that LAPACK factorises in one piece."""

# The loop's body is compiled once for all its trips, and compiling goes with the number of
# different operations. Unrolling it gained nothing. A loop for every size, by block sweeps, took 20
# to 60 % longer to run up to 800 rows.
_LOOPED = 32
"""The largest number of rows of a triangle that `_inverse_small` inverts, in a loop."""


def inverse(matrix: jax.Array) -> jax.Array:
    """Inverts symmetric positive definite matrices A = LLᵀ, as A⁻¹ = L⁻ᵀL⁻¹.

    Args:
      matrix: A, (B, m, m), of which only the lower triangle is read.

    Returns:
      A⁻¹, (B, m, m); NaN for each A that is not positive definite.
    """
    return _gram_of_lower(inverse_factor(matrix))


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """Inverts the Cholesky factors L of symmetric positive definite matrices M = LLᵀ.

    Larger matrices are split into four blocks. With A = L₁L₁ᵀ, C = K L₁ᵀ and D - KKᵀ = L₂L₂ᵀ, the
    matrix [[A, Cᵀ], [C, D]] has L⁻¹ = [[L₁⁻¹, 0], [-L₂⁻¹ K L₁⁻¹, L₂⁻¹]].

    Args:
      matrix: M, (B, m, m), of which only the lower triangle is read.

    Returns:
      L⁻¹, (B, m, m); NaN for each M that is not positive definite.
    """
    size = matrix.shape[-1]
    if size <= BLOCK:
        return inverse_lower(_cholesky(matrix))
    half = _half(size)
    first = inverse_factor(matrix[:, :half, :half])
    k = _product(matrix[:, half:, :half], first.mT)
    second = inverse_factor(matrix[:, half:, half:] - _product(k, k.mT))
    below = -_product(_product(second, k), first)
    above = jnp.zeros((len(matrix), half, size - half), matrix.dtype)
    return jnp.block([[first, above], [below, second]])


def _cholesky(matrix: jax.Array) -> jax.Array:
    """The factors L of symmetric positive definite matrices LLᵀ: (B, m, m).

    Only the lower triangle is read.
    """

    def factorise(matrix: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(matrix, symmetrize_input=False)

    return lapack.in_calls(factorise, matrix)


def inverse_lower(factor: jax.Array) -> jax.Array:
    """Inverts lower triangular matrices L: (B, m, m).

    The inverses of small diagonal blocks come first. Then each two neighbouring blocks are joined
    to one of twice the size, until one block is left:
    [[A, 0], [C, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ C A⁻¹, D⁻¹]].

    This takes the place of LAPACK's `triangular_solve`, even for few rows: with 16 it is fast when
    timed alone, but made whole training steps 40 % slower.
    """
    batch, size = factor.shape[:2]
    # The identity fills the matrix up to a power of two: it changes no other entry of the inverse.
    padded = 1 << (size - 1).bit_length()
    identity = jnp.eye(padded, dtype=factor.dtype)[None].repeat(batch, 0)
    factor = identity.at[:, :size, :size].set(factor)
    block = min(padded, _LOOPED)
    pairs = padded // block
    diagonal = jnp.diagonal(factor.reshape(batch, pairs, block, pairs, block), axis1=1, axis2=3)
    small = jnp.moveaxis(diagonal, -1, 1).reshape(-1, block, block)
    inverses = _inverse_small(small).reshape(batch, pairs, block, block)
    while block < padded:
        pairs = padded // (2 * block)
        grid = factor.reshape(batch, pairs, 2, block, pairs, 2, block)
        below = jnp.moveaxis(jnp.diagonal(grid[:, :, 1, :, :, 0], axis1=1, axis2=3), -1, 1)
        a, d = inverses[:, 0::2], inverses[:, 1::2]
        c = -_product(d, _product(below, a))
        top = jnp.concatenate([a, jnp.zeros_like(a)], -1)
        inverses = jnp.concatenate([top, jnp.concatenate([c, d], -1)], -2)
        block *= 2
    return inverses[:, 0, :size, :size]


def _inverse_small(factor: jax.Array) -> jax.Array:
    """`inverse_lower` for few rows, as a loop over whole matrices.

    Let M hold the inverses of the diagonal blocks, and C the entries of L between each two blocks
    that are joined next. Then M - M C M holds the inverses of the joined blocks.
    """
    size = factor.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]
    one = jnp.eye(size, dtype=factor.dtype)[None]
    start = one / jnp.diagonal(factor, axis1=1, axis2=2)[..., None]

    def join(level: jax.Array, inverse: jax.Array) -> jax.Array:
        # Blocks have 2^level rows: a shifted index is a block's number, shifted once more a pair's.
        same_pair = (row >> (level + 1)) == (column >> (level + 1))
        between = same_pair & ((row >> level) > (column >> level))
        below = jnp.where(between[None], factor, 0)
        return inverse - _product(inverse, _product(below, inverse))

    return lax.fori_loop(0, (size - 1).bit_length(), join, start)


def _gram_of_lower(factor: jax.Array) -> jax.Array:
    """LᵀL of lower triangular matrices L: (B, m, m).

    Larger matrices are split into four blocks, since the products with zeros are then left out.
    """
    size = factor.shape[-1]
    if size <= BLOCK:
        return _product(factor.mT, factor)
    half = _half(size)
    first, second = factor[:, :half, :half], factor[:, half:, half:]
    below = factor[:, half:, :half]
    corner = _gram_of_lower(first) + _product(below.mT, below)
    across = _product(below.mT, second)
    return jnp.block([[corner, across], [across.mT, _gram_of_lower(second)]])


def _half(size: int) -> int:
    """The largest size less than `size` that is `BLOCK` times a power of two."""
    return BLOCK << ((size - 1) // BLOCK).bit_length() - 1


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # An inverse magnifies rounding errors by up to the condition number (3e7 in one of ResNet-20's
    # layers). So TF32 and bfloat16, an accelerator's defaults, are too coarse.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
