"""Inverses of symmetric matrices, by matrix products but for small blocks.

LAPACK's triangular solves, and its factorisations of more than about 200 rows, run in threads of
their own, which on a CPU fight XLA's for the cores: a step can then take ten times as long as its
arithmetic, or a thousand. Products do not, and suit accelerators.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Rows that LAPACK factorises at once."""

_TOGETHER = 1 << 19
"""B m³ up to which a CPU factorises a batch in one call. In larger ones, up to jaxlib 0.11.1, a
thread of XLA's pool waits for others of it: for ever, where all of them do."""

_LOOPED = 32
"""Rows of a triangle up to which doubling is a loop, which is compiled once."""


def inverse(matrix: jax.Array) -> jax.Array:
    """A⁻¹ = L⁻ᵀL⁻¹ of symmetric positive definite A = LLᵀ: (B, m, m); NaN where it is not.

    Only the lower triangle is read.
    """
    return _gram_of_lower(inverse_factor(matrix))


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """L⁻¹ of symmetric positive definite matrices LLᵀ: (B, m, m); NaN where they are not.

    By blocks: with A = L₁L₁ᵀ, C = K L₁ᵀ and D - KKᵀ = L₂L₂ᵀ,
    [[A, Cᵀ], [C, D]] has [[L₁⁻¹, 0], [-L₂⁻¹ K L₁⁻¹, L₂⁻¹]]. Only the lower triangle is read.
    """
    size = matrix.shape[-1]
    if size <= BLOCK:
        return inverse_lower(_cholesky(matrix))
    half = _half(size)
    first = inverse_factor(matrix[:, :half, :half])
    across = _product(matrix[:, half:, :half], first.mT)
    second = inverse_factor(matrix[:, half:, half:] - _product(across, across.mT))
    below = -_product(_product(second, across), first)
    above = jnp.zeros((len(matrix), half, size - half), matrix.dtype)
    return jnp.block([[first, above], [below, second]])


def _cholesky(matrix: jax.Array) -> jax.Array:
    """L of symmetric positive definite matrices LLᵀ: (B, m, m). Only the lower triangle is read."""

    def together(matrix: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(matrix, symmetrize_input=False)

    if len(matrix) == 1 or len(matrix) * matrix.shape[-1] ** 3 <= _TOGETHER:
        return together(matrix)
    one_by_one = functools.partial(lax.map, together)
    return lax.platform_dependent(matrix, cpu=one_by_one, default=together)


def inverse_lower(factor: jax.Array) -> jax.Array:
    """L⁻¹ of lower triangular matrices L: (B, m, m).

    Inverts the diagonal, then doubles the size of the diagonal blocks whose inverses are known:
    [[A, 0], [C, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ C A⁻¹, D⁻¹]].
    """
    batch, size = factor.shape[:2]
    padded = 1 << (size - 1).bit_length()
    grown = jnp.eye(padded, dtype=factor.dtype)[None].repeat(batch, 0)
    factor = grown.at[:, :size, :size].set(factor)
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
    """`inverse_lower` in a loop over whole matrices M: M - M C M, C being what the blocks lack."""
    size = factor.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None]
    one = jnp.eye(size, dtype=factor.dtype)[None]
    start = one / jnp.diagonal(factor, axis1=1, axis2=2)[..., None]

    def double(level: jax.Array, inverse: jax.Array) -> jax.Array:
        pair = (row >> (level + 1)) == (column >> (level + 1))
        lower = pair & ((row >> level) > (column >> level))
        below = jnp.where(lower[None], factor, 0)
        return inverse - _product(inverse, _product(below, inverse))

    return lax.fori_loop(0, (size - 1).bit_length(), double, start)


def _gram_of_lower(factor: jax.Array) -> jax.Array:
    """LᵀL of lower triangular matrices L: (B, m, m)."""
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
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
