"""Gram matrices, in at least float32."""

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which statistics of arrays of `dtype` are kept: float32, or float64 for it."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def outer(
    x: jax.Array, h: jax.Array | None = None, precision: lax.PrecisionLike = HIGHEST
) -> jax.Array:
    """XXᵀ of rows x: (B, n, d) -> (B, n, n), or of [X, h] with a further feature h: (B, n)."""
    product = _contract("bnd,bmd->bnm", x, precision)
    if h is None:
        return product
    column = h.astype(product.dtype)
    return product + column[:, :, None] * column[:, None]


def inner(
    x: jax.Array, h: jax.Array | None = None, precision: lax.PrecisionLike = HIGHEST
) -> jax.Array:
    """XᵀX of rows x: (B, n, d) -> (B, d, d), or of [X, h], (B, d+1, d+1), with h: (B, n)."""
    if h is not None:
        x = jnp.concatenate([x, h[..., None]], -1)
    return _contract("bnd,bne->bde", x, precision)


def _contract(subscripts: str, x: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    return jnp.einsum(
        subscripts,
        x,
        x,
        precision=precision,
        preferred_element_type=accumulator(x.dtype),
    )
