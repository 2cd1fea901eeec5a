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
    alone = [i for i in first if i in second and i in result and a.shape[first.index(i)] == 1]
    if alone:  # of axes of length one, XLA would compile what made the operands once more
        a = lax.squeeze(a, [first.index(i) for i in alone])
        b = lax.squeeze(b, [second.index(i) for i in alone])
        first, second, inner = (_without(letters, alone) for letters in (first, second, result))
        product = einsum(f"{first},{second}->{inner}", a, b, precision, preferred_element_type)
        return lax.expand_dims(product, [result.index(i) for i in alone])
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


def diagonal(matrix: jax.Array) -> jax.Array:
    """The diagonals of square matrices, (B, m, m): (B, m)."""
    # `jnp.diagonal` is a `gather`, which takes longer to compile.
    one = lax.broadcasted_iota(jnp.int32, matrix.shape, 1) == lax.broadcasted_iota(
        jnp.int32, matrix.shape, 2
    )
    return jnp.where(one, matrix, 0).sum(-1)


def _without(letters: str, some: list[str]) -> str:
    return "".join(letter for letter in letters if letter not in some)
