"""Inverse Cholesky factors, by matrix products but for small blocks.

LAPACK's triangular solves, and its factorisations of more than about 200 rows, run in threads of
their own, which on a CPU fight XLA's for the cores: a step can then take ten times as long as its
arithmetic, or a thousand. Products do not, and suit accelerators.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Rows that LAPACK factorises at once."""


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """L⁻¹ of symmetric positive definite matrices LLᵀ: (B, m, m); NaN where they are not.

    By blocks: with A = L₁L₁ᵀ, C = K L₁ᵀ and D - KKᵀ = L₂L₂ᵀ,
    [[A, Cᵀ], [C, D]] has [[L₁⁻¹, 0], [-L₂⁻¹ K L₁⁻¹, L₂⁻¹]]. Only the lower triangle is read.
    """
    size = matrix.shape[-1]
    if size <= BLOCK:
        return inverse_lower(jnp.linalg.cholesky(matrix, symmetrize_input=False))
    half = BLOCK << ((size - 1) // BLOCK).bit_length() - 1
    first = inverse_factor(matrix[:, :half, :half])
    across = _product(matrix[:, half:, :half], first.mT)
    second = inverse_factor(matrix[:, half:, half:] - _product(across, across.mT))
    below = -_product(_product(second, across), first)
    above = jnp.zeros((len(matrix), half, size - half), matrix.dtype)
    return jnp.block([[first, above], [below, second]])


def inverse_lower(factor: jax.Array) -> jax.Array:
    """L⁻¹ of lower triangular matrices L: (B, m, m).

    Inverts the diagonal, then doubles the size of the diagonal blocks whose inverses are known:
    [[A, 0], [C, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ C A⁻¹, D⁻¹]].
    """
    batch, size = factor.shape[:2]
    padded = 1 << (size - 1).bit_length()
    grown = jnp.eye(padded, dtype=factor.dtype)[None].repeat(batch, 0)
    factor = grown.at[:, :size, :size].set(factor)
    inverses = 1 / jnp.diagonal(factor, axis1=1, axis2=2)[..., None, None]
    block = 1
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


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
