"""Gram matrices, in at least float32 and at the highest precision."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which statistics of arrays of `dtype` are kept: float32, or float64 for it."""
    return jnp.promote_types(dtype, jnp.float32)


def outer(x: jax.Array, h: jax.Array | None = None) -> jax.Array:
    """XXᵀ of rows x: (B, n, d) -> (B, n, n), or of [X, h] with a further feature h: (B, n)."""
    contract = _contraction(x.dtype)
    xx = contract("bnd,bmd->bnm", x, x)
    return xx if h is None else xx + contract("bn,bm->bnm", h, h)


def inner(x: jax.Array, h: jax.Array | None = None) -> jax.Array:
    """XᵀX of rows x: (B, n, d) -> (B, d, d), or of [X, h], (B, d+1, d+1), with h: (B, n)."""
    contract = _contraction(x.dtype)
    xx = contract("bnd,bne->bde", x, x)
    if h is None:
        return xx
    xh = contract("bnd,bn->bd", x, h)[..., None]
    hh = contract("bn,bn->b", h, h)[:, None, None]
    return jnp.block([[xx, xh], [jnp.swapaxes(xh, 1, 2), hh]])


def _contraction(dtype: jnp.dtype):
    return functools.partial(
        jnp.einsum,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulator(dtype),
    )
