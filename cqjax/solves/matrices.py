"""A layer's part of an update as matrices, and their algebra."""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from cqjax.linalg.gram import HIGHEST
from cqjax.linalg.products import einsum

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
    def parted(cls, joined: jax.Array, has_bias: bool) -> Matrices:
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
    weight = einsum("bnd,bno->bdo", x.astype(z.dtype), z, precision=precision)
    if h is None:
        return Matrices(weight, None)
    return Matrices(weight, einsum("bn,bno->bo", h.astype(z.dtype), z, precision=precision))


def decomposed(update: Matrices, gradient: Matrices, dtype: jnp.dtype) -> Decomposed:
    """Splits an update into a multiple of the gradient and the rest.

    A gradient that was only scaled (clipped by its norm, say) leaves a rest at the level of
    rounding, which 1/λ would blow up. Such a rest counts as none. So does what was really added but
    is as small, since its size alone does not tell it from rounding: in bfloat16 a weight decay
    whose length is below 0.8 % of the gradient's.

    Args:
      update: H.
      gradient: G.
      dtype: that to which H was rounded.
    """
    # Divided by the largest entries first: squares may overflow or vanish where they do not.
    (size, h), (size_of_gradient, g) = _scaled(update), _scaled(gradient)
    squared = _inner(g, g)
    scale = jnp.where(squared > 0, _inner(h, g) / squared, 0)
    rest = jax.tree.map(lambda h, g: h - along(scale, g) * g, h, g)
    own = jnp.finfo(dtype)
    relative = max(float(own.eps), 4 * float(jnp.finfo(squared.dtype).eps))
    # Numbers below the smallest normal one are rounded to multiples of the smallest of all. A
    # float16 gradient that a loss scale of 1,000 is taken off from often has such entries.
    absolute = float(own.eps) * float(own.tiny) / size
    entries = sum(part.size for part in jax.tree.leaves(update)) / len(size)
    # Written with ~ and <=, so that a rest that is NaN is present.
    present = ~(_inner(rest, rest) <= relative**2 * _inner(h, h) + entries * jnp.square(absolute))
    rest = jax.tree.map(lambda r: jnp.where(along(present, r), along(size, r) * r, 0), rest)
    return Decomposed(scale * (size / size_of_gradient), rest, present)


def along(batch: jax.Array, array: jax.Array) -> jax.Array:
    """Numbers (B,), shaped to go with an array (B, ...)."""
    return batch.reshape(-1, *(1,) * (array.ndim - 1))


def finite(tree: _Tree) -> _Tree:
    """The tree with zeros for entries that are not finite."""
    return jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, 0), tree)


def _scaled(a: Matrices) -> tuple[jax.Array, Matrices]:
    """The size of the largest entry, or 1 if that is zero, (B,), and all entries divided by it."""
    parts = [jnp.abs(part).max(tuple(range(1, part.ndim))) for part in jax.tree.leaves(a)]
    size = functools.reduce(jnp.maximum, parts)
    size = jnp.where(size == 0, 1, size)
    return size, jax.tree.map(lambda part: part / along(size, part), a)


def _inner(a: Matrices, b: Matrices) -> jax.Array:
    total = einsum("bdo,bdo->b", a.weight, b.weight, precision=HIGHEST)
    if a.bias is None or b.bias is None:
        return total
    return total + einsum("bo,bo->b", a.bias, b.bias, precision=HIGHEST)
