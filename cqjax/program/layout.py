"""How the axes of an array become those of a matrix."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

_Array = TypeVar("_Array", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array's axes become those of a matrix form.

    Attributes:
      sizes: the array is reshaped to these first.
      groups: for each axis of the matrix form, which of the `sizes` it is the product of.
    """

    sizes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix form's shape."""
        return tuple(math.prod(self.sizes[i] for i in group) for group in self.groups)

    def narrowed(self, kept: Sequence[int]) -> "Layout":
        """The layout of arrays that have length 1 along all of the sizes but some."""
        sizes = tuple(n if i in kept else 1 for i, n in enumerate(self.sizes))
        return dataclasses.replace(self, sizes=sizes)

    def pack(self, array: _Array) -> _Array:
        """The matrix form of an array."""
        return array.reshape(self.sizes).transpose(self._order).reshape(self.shape)

    def unpack(self, matrix: _Array, shape: tuple[int, ...]) -> _Array:
        """The array of `shape` that `pack` turns into `matrix`."""
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        permuted = matrix.reshape([self.sizes[i] for i in self._order])
        return permuted.transpose(inverse).reshape(shape)

    def in_parts(self, axis: int, parts: int) -> "Layout":
        """The layout in which each of the equal parts of an axis is a matrix of its own."""
        sizes = (*self.sizes[:axis], parts, self.sizes[axis] // parts, *self.sizes[axis + 1 :])

        def renumbered(group: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i + (i >= axis) for i in group)

        batch, *others = map(renumbered, self.groups)
        return Layout(sizes, ((*batch, axis), *others))

    @property
    def _order(self) -> tuple[int, ...]:
        return tuple(itertools.chain(*self.groups))
