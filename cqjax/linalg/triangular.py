"""Triangular inverses by matrix products alone.

LAPACK's triangular solves run in threads of their own, which on a CPU fight XLA's for the cores: a
step can then take ten times as long as its arithmetic. Products do not, and suit accelerators.
"""

import jax
import jax.numpy as jnp
from jax import lax


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
