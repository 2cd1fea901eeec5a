"""A layer's part of an update as matrices, and their algebra."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cqjax.linalg.gram import HIGHEST

_Tree = TypeVar("_Tree")


class Matrices(NamedTuple):
    """A layer's part of an update.

    Attributes:
      weight: (B, d, o).
      bias: (B, o), or None.
    """

    weight: jax.Array
    bias: jax.Array | None

    @property
    def joined(self) -> jax.Array:
        """[W; b], (B, d+1, o), the bias as the last feature's weights; W where there is no bias."""
        if self.bias is None:
            return self.weight
        return jnp.concatenate([self.weight, self.bias[:, None]], 1)

    @classmethod
    def parted(cls, joined: jax.Array, has_bias: bool) -> "Matrices":
        """The inverse of `joined`."""
        return cls(joined[:, :-1], joined[:, -1]) if has_bias else cls(joined, None)


class Decomposed(NamedTuple):
    """H = c G + R, with R orthogonal to the gradient G.

    Attributes:
      scale: c, (B,).
      rest: R; zero where there is none.
      present: (B,) bool, whether there is a rest.
    """

    scale: jax.Array
    rest: Matrices
    present: jax.Array


def product(
    x: jax.Array, z: jax.Array, h: jax.Array | None, precision: jax.lax.PrecisionLike = HIGHEST
) -> Matrices:
    """[X, h]ᵀZ of rows x: (B, n, d), z: (B, n, o) and h: (B, n), or XᵀZ where h is None."""
    weight = jnp.einsum("bnd,bno->bdo", x.astype(z.dtype), z, precision=precision)
    if h is None:
        return Matrices(weight, None)
    return Matrices(weight, jnp.einsum("bn,bno->bo", h.astype(z.dtype), z, precision=precision))


def decomposed(update: Matrices, gradient: Matrices) -> Decomposed:
    """Splits an update into a multiple of the gradient and the rest.

    The multiple matters in float32. A gradient that was only scaled (clipped by its norm, say)
    leaves a rest at the level of rounding, which 1/λ would blow up. Such a rest counts as none.
    """
    squared = _inner(gradient, gradient)
    scale = jnp.where(squared > 0, _inner(update, gradient) / squared, 0)
    rest = jax.tree.map(lambda h, g: h - along(scale, g) * g, update, gradient)
    rounding = 4 * jnp.finfo(squared.dtype).eps
    # Written with ~ and <=, so that a rest that is NaN is present.
    present = ~(_inner(rest, rest) <= rounding**2 * _inner(update, update))
    rest = jax.tree.map(lambda r: jnp.where(along(present, r), r, 0), rest)
    return Decomposed(scale, rest, present)


def along(batch: jax.Array, array: jax.Array) -> jax.Array:
    """Numbers (B,), shaped to go with an array (B, ...)."""
    return batch.reshape(-1, *(1,) * (array.ndim - 1))


def finite(tree: _Tree) -> _Tree:
    """The tree with zeros for entries that are not finite."""
    return jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, 0), tree)


def _inner(a: Matrices, b: Matrices) -> jax.Array:
    total = jnp.einsum("bdo,bdo->b", a.weight, b.weight, precision=HIGHEST)
    if a.bias is None or b.bias is None:
        return total
    return total + jnp.einsum("bo,bo->b", a.bias, b.bias, precision=HIGHEST)
