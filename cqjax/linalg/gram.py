"""Gram matrices XXᵀ and XᵀX, in at least float32."""

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.linalg.products import einsum

# The default precision. Rounding X to TF32 or bfloat16 in the Gram matrix did no harm in training.
# But three bfloat16 products (a TPU's "high") gave one that was not positive. And the same option
# is for the product of Xᵀ and the solution, which needs float32 where rows are nearly equal.
HIGHEST = lax.Precision.HIGHEST


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype for statistics of arrays of `dtype`: float64 for float64, otherwise float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def outer(
    x: jax.Array, h: jax.Array | None = None, precision: lax.PrecisionLike = HIGHEST
) -> jax.Array:
    """XXᵀ, the inner products of rows with one another.

    Args:
      x: B matrices X of n rows, (B, n, d).
      h: a further feature of each row, (B, n); None for none.
      precision: of the products.

    Returns:
      XXᵀ, or [X, h][X, h]ᵀ, (B, n, n).
    """
    # All of XXᵀ: computing half of it saved a fifth of the time, but compiled for 0.2 s more.
    product = _contract("bnd,bmd->bnm", x, precision)
    if h is None:
        return product
    # As a term of its own, h spares the copy of X that joining the two would need.
    column = h.astype(product.dtype)
    return product + column[:, :, None] * column[:, None]


def inner(
    x: jax.Array, h: jax.Array | None = None, precision: lax.PrecisionLike = HIGHEST
) -> jax.Array:
    """XᵀX, the inner products of features with one another.

    Args:
      x: B matrices X of n rows, (B, n, d).
      h: a further feature of each row, (B, n); None for none.
      precision: of the products.

    Returns:
      XᵀX, (B, d, d), or [X, h]ᵀ[X, h], (B, d+1, d+1).
    """
    if h is not None:
        x = jnp.concatenate([x, h[..., None]], -1)
    return _contract("bnd,bne->bde", x, precision)


def sketched(x: jax.Array, rows: int) -> jax.Array:
    """Fewer rows with nearly the same XᵀX: sums of rows, with random signs.

    Where the signs are independent, the mean of the result's second moment is XᵀX (a count sketch:
    Charikar, Chen and Farach-Colton, 2002). They are the same in each call. So the errors of
    different batches are independent only as far as these are in random order.

    Args:
      x: B matrices X of n rows, (B, n, d).
      rows: the number m of rows that are wanted.

    Returns:
      Between m and 2m rows, (B, ., d), or X where it has fewer than 2m.
    """
    batch, number, features = x.shape
    together = number // rows
    if together < 2:
        return x
    signs = jax.random.rademacher(jax.random.key(0), (number, 1), x.dtype)
    length = -(-number // together)
    # The rows of a sum are far apart: neighbours are often alike, as the positions of one text.
    x = jnp.pad(signs * x, ((0, 0), (0, together * length - number), (0, 0)))
    return x.reshape(batch, together, length, features).sum(1)


def _contract(subscripts: str, x: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    return einsum(
        subscripts,
        x,
        x,
        precision=precision,
        preferred_element_type=accumulator(x.dtype),  # else 16-bit operands have 16-bit sums
    )
