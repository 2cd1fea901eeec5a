"""Products of matrices side by side."""

import jax
import jax.numpy as jnp
from jax import lax


def einsum(
    subscripts: str,
    a: jax.Array,
    b: jax.Array,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
    """`jnp.einsum` of two arrays, as one `lax.dot_general`, whose order of axes it must have.

    JAX's own makes a `jax.jit` in each call, and keeps it until `jax.clear_caches()`. In a process
    that traces update after update its memory would grow.

    Args:
      subscripts: letters of the axes, as in "bnd,bdo->bno". The result has those that both operands
        share, then those of `a` alone, then those of `b` alone.
      a: the first operand.
      b: the second.
      precision: as in `lax.dot_general`.
      preferred_element_type: likewise.
    """
    operands, result = subscripts.split("->")
    first, second = operands.split(",")
    batch = [axis for axis in first if axis in second and axis in result]
    summed = [axis for axis in first if axis in second and axis not in result]
    own = [axis for axis in first + second if axis in result and axis not in batch]
    assert [*batch, *own] == list(result), subscripts
    contracting = [first.index(i) for i in summed], [second.index(i) for i in summed]
    batching = [first.index(i) for i in batch], [second.index(i) for i in batch]
    dtype = jnp.result_type(a, b)
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (contracting, batching),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
