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

    def before(self, permutation: Sequence[int]) -> "Layout":
        """The layout, to the same matrices, of the array that a transpose makes this one's of.

        Its `sizes` are those of the array.
        """
        sizes = tuple(self.sizes[permutation.index(i)] for i in range(len(permutation)))
        groups = tuple(tuple(permutation[i] for i in group) for group in self.groups)
        return Layout(sizes, groups)

    def sorted(self, group: int) -> tuple["Layout", list[int]]:
        """The layout with one group's axes in ascending order, and how this changes their order."""
        axes = self.groups[group]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return self.reordered(group, order), order

    def reordered(self, group: int, order: Sequence[int]) -> "Layout":
        """The layout with one group's axes in another order."""
        groups = list(self.groups)
        groups[group] = tuple(groups[group][i] for i in order)
        return dataclasses.replace(self, groups=tuple(groups))

    @property
    def transposed(self) -> "Layout":
        """The layout of a weight's transpose: (B, o, d) for (B, d, o)."""
        batch, features, outputs = self.groups
        return dataclasses.replace(self, groups=(batch, outputs, features))

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
