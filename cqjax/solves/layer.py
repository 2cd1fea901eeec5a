"""One layer, as a transformation sees it: what came in for it, and what was captured.

The updates that reach a transformation are the gradient, unless an earlier member of the chain
changed it. A method that computes from rows, not from the updates, would lose that change: so
a layer's record shows both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cqjax.capture.block import SPANNING, Block
from cqjax.capture.captures import Capture
from cqjax.capture.origins import Origin, origin_of
from cqjax.capture.statistics import Rows
from cqjax.linalg.gram import accumulator
from cqjax.solves import nearest
from cqjax.solves.matrices import Matrices, product


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One weight W, with the bias b that is added to its output: what came in, what was captured.

    Its arrays are matrices with an axis B in front, for the weights that are solved for side by
    side: groups of a convolution, members of an ensemble, layers scanned over.

    Attributes:
      label: its name: the weight's path, several joined by +, numbered where slices of one
        parameter are weights of their own.
      capture: what was captured of it.
      terms: N, the number of terms that the loss averages over: N Z̄ is what each example's own
        loss asks of the layer's output. Where all examples share the rows, N over their number.
      has_bias: whether a bias is updated together with the weight.
    """

    label: str
    capture: Capture
    terms: float | jax.Array
    has_bias: bool
    _updates: Mapping[str, jax.Array]

    @property
    def block(self) -> Block:
        """The static description: sizes B, n (`rows`), d (`features`), o (`outputs`), and more."""
        return self.capture.block

    @property
    def other(self) -> Layer | None:
        """The layer of Y = DWᵀ, whose weight is Wᵀ, where the loss has such products; else None."""
        if self.capture.other is None:
            return None
        bias = self.capture.other.block.bias
        has_bias = bias is not None and set(bias.view.paths) <= self._updates.keys()
        return dataclasses.replace(self, capture=self.capture.other, has_bias=has_bias)

    @property
    def joint_bias(self) -> bool:
        """Whether the bias is solved for in one system with the weight."""
        return joint_bias(self.block, not self.has_bias)

    @property
    def size(self) -> int:
        """Features that are solved for together: d, or d + 1 with a bias among them."""
        return self.block.features + self.joint_bias

    def rank(self, averaged: bool = False) -> jax.Array:
        """How many eigenvalues of XᵀX may differ from zero: (), or (B,).

        A batch's own has no more of them than there are rows; an average of many may have all.
        """
        rank = jnp.asarray(self.block.live + self.joint_bias)
        if not averaged:
            rank = jnp.minimum(rank, self.capture.row_counts())
        return jnp.maximum(rank, 1)

    @property
    def few(self) -> jax.Array | bool:
        """Whether this batch's rows may not span the features: (), (B,), or known while tracing.

        `Block.spans` says what comes of it. Here rows that are no examples do not count.
        """
        if not self.block.spans or self.capture.number is None:
            return not self.block.spans
        return self.capture.number < SPANNING * self.block.features

    @property
    def update(self) -> Matrices:
        """The layer's part of the updates that the transformation was handed, in ≥ float32.

        They are taken for a gradient: where the loss multiplies parameters by constants c, they are
        divided by c, which gives the gradient with respect to the weight that the product sees.
        Where the loss makes the weight of parameters, it is the shortest one that gives theirs.
        """
        if self.made:
            return nearest.of_weight(self.image, _exact(self._updates))
        return self._gradient(self._updates)

    @property
    def made(self) -> bool:
        """Whether the loss makes the weight of parameters, W = f(V)."""
        return self.capture.function is not None

    @property
    def image(self) -> nearest.Image:
        """The linear map from changes of V, and of the bias, to those of W and the bias."""
        assert self.capture.function is not None
        return nearest.Image(self.block, self.capture.function, self.has_bias)

    @property
    def handed(self) -> dict[str, jax.Array]:
        """The updates that the transformation was handed for the layer's parameters, by path."""
        return _exact(self._updates)

    @property
    def dtype(self) -> jnp.dtype:
        """That of the updates, the coarsest if they differ: what came before rounded to it."""
        return max((leaf.dtype for leaf in self._updates.values()), key=lambda t: jnp.finfo(t).eps)

    @property
    def change(self) -> Matrices:
        """The same, taken for a change of the parameters: how the product's weight changes.

        To first order, where the loss makes the weight of parameters.
        """
        return self.image(_exact(self._updates)) if self.made else self._matrices(self._updates)

    @property
    def value(self) -> Matrices:
        """The same, taken for values of the parameters: what the product's weight is.

        Where the loss makes the weight of parameters, it is that of the loss's evaluation.
        """
        function, arrays = self.capture.function, dict(self._updates)
        if function is not None:
            assert self.block.view.made is not None
            arrays[self.block.view.made] = function(function.parameters)
        return self._matrices(arrays)

    @property
    def gradient(self) -> Matrices:
        """The part of the gradient that comes from the layer's products: XᵀZ̄.

        The loss may use the weight elsewhere too. Then it takes the rows.
        """
        if self.block.exact:
            return self._gradient(self.capture.gradients)
        rows = self.rows()
        return product(rows.x, rows.dz, rows.h)

    @property
    def is_gradient(self) -> bool:
        """Whether the updates are the gradient, as far as tracing can tell: the same arrays."""
        return all(leaf is self.capture.gradients[path] for path, leaf in self._updates.items())

    @property
    def origins(self) -> set[Origin | None]:
        """Where those updates come from that are not the captured gradient, as far as is known.

        That of another call is told from a copy of this one's by the captures: theirs is no copy.
        """
        pairs = ((leaf, self.capture.gradients[path]) for path, leaf in self._updates.items())
        return {
            origin_of(leaf)
            for leaf, gradient in pairs
            if leaf is not gradient
            and (origin_of(leaf), origin_of(gradient)) != (Origin.GRADIENT, None)
        }

    def cosine(self) -> jax.Array:
        """The cosine of updates and gradient of the weight, unsigned, (); NaN if one is zero."""
        # Of the weight alone: a bias before a normalisation has a gradient of rounding errors.
        pairs = [
            [array.astype(accumulator(array.dtype)) for array in (self._updates[p], g)]
            for p, g in self.capture.gradients.items()
            if p in self.block.view.paths
        ]

        def length(i: int) -> jax.Array:
            return jnp.sqrt(sum(jnp.sum(jnp.square(pair[i])) for pair in pairs))

        common = sum(jnp.sum(update * gradient) for update, gradient in pairs)
        return jnp.abs(common) / length(0) / length(1)

    def differs(self) -> jax.Array:
        """Whether any entry of the updates differs from the gradient: () bool."""
        gradients = self.capture.gradients
        different = [jnp.any(leaf != gradients[path]) for path, leaf in self._updates.items()]
        return jnp.stack(different).any()

    def rows(self) -> Rows:
        """X: (B, n, d), Z̄: (B, n, o), and h: (B, n), None without a bias that is updated.

        Raises:
          ValueError: they were not captured, or are not all: the loss has products Y = DWᵀ, too.
        """
        self._check_one_side()
        rows = self.capture.rows()
        return rows if self.has_bias else dataclasses.replace(rows, h=None)

    def second_moment(self) -> jax.Array:
        """XᵀX, with a joint bias as the last feature: (B, size, size). A lookup's diagonal: (B, d).

        Raises:
          ValueError: it was not captured, or is not all: the loss has products Y = DWᵀ, too.
        """
        self._check_one_side()
        return self.cropped(self.capture.second_moment())

    def cropped(self, moment: jax.Array) -> jax.Array:
        """A second moment without a constant feature for a bias that is not updated."""
        if self.block.statistic.diagonal:
            return moment
        return moment[:, : self.size, : self.size]

    def overflows(self, result: Matrices) -> jax.Array | bool:
        """Whether a result, finite in at least float32, is not so in its parameters' dtype: (B,).

        False where that is the dtype it has.
        """
        dtype = self._updates[self.block.view.paths[0]].dtype
        if dtype == result.weight.dtype:
            return False

        def lost(part: jax.Array) -> jax.Array:
            return ~jnp.isfinite(part.astype(dtype)).all(tuple(range(1, part.ndim)))

        weight = lost(result.weight)
        if result.bias is None:
            return weight
        return weight | jnp.repeat(lost(result.bias), len(weight) // len(result.bias))

    def _check_one_side(self) -> None:
        """Refuses to show one of two sides as if it were all.

        Raises:
          ValueError: says where both are.
        """
        if self.capture.other is not None:
            raise ValueError(
                f"{self.label} is used both ways, as XW and as DWᵀ, and this method asks for X "
                "alone; expected a method that takes both (layer.capture.second_moment() and "
                f'layer.other.capture.second_moment()), or skip="{self.block.view.paths[0]}"'
            )

    def _matrices(self, arrays: Mapping[str, jax.Array]) -> Matrices:
        arrays = _exact(arrays)
        bias = self.block.bias_matrix(arrays) if self.has_bias else None
        return Matrices(self.block.weight_matrix(arrays), bias)

    def _gradient(self, arrays: Mapping[str, jax.Array]) -> Matrices:
        arrays = _exact(arrays)
        bias = self.block.bias_gradient(arrays) if self.has_bias else None
        return Matrices(self.block.weight_gradient(arrays), bias)


def _exact(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: array.astype(accumulator(array.dtype)) for path, array in arrays.items()}


def joint_bias(block: Block, masked: bool) -> bool:
    """Whether a block has a bias, not masked, that is solved for in one system with its weight."""
    return block.bias is not None and block.parts is None and not masked
