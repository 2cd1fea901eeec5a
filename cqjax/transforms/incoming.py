"""What a transformation is handed, matched with what was captured.

The updates that reach a transformation are the gradient, unless an earlier member of the chain
changed it. Where a method computes from rows, and not from the updates, this module says what has
become of the gradient, so that it is not lost.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cqjax.capture.block import Block
from cqjax.capture.captures import Capture, Captures, path_of
from cqjax.linalg import devices
from cqjax.linalg.gram import HIGHEST, accumulator

_Tree = TypeVar("_Tree")


class Matrices(NamedTuple):
    """A block's part of an update.

    Attributes:
      weight: (B, d, o).
      bias: (B, o), or None.
    """

    weight: jax.Array
    bias: jax.Array | None


class Incoming:
    """Updates by path, checked against the captures."""

    def __init__(self, updates: optax.Updates, captures: Any, method: str):
        """Matches `updates` with `captures`.

        Args:
          updates: what the transformation was handed; `optax.MaskedNode`s are left alone.
          captures: what it was passed as `captures`.
          method: its name, for errors.

        Raises:
          ValueError: no captures were passed, or they belong to other parameters.
          TypeError: they are none.
        """
        if captures is None:
            raise ValueError(
                f"{method}: no captures were passed. Take the gradient with "
                "cqjax.value_and_grad, which returns them last, and call "
                "update(grads, state, params, captures=captures)"
            )
        if not isinstance(captures, Captures):
            raise TypeError(
                f"{method}: captures is a {type(captures).__name__}; expected the last result of "
                "cqjax.value_and_grad"
            )
        self._method = method
        keyed, self._tree = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_masked)
        self.paths = [path_of(keys) for keys, _ in keyed]
        self._masked = masked_paths(updates, [capture.block for capture in captures.blocks])
        self._leaves = dict(zip(self.paths, (leaf for _, leaf in keyed), strict=True))
        labels = labelled([capture.block for capture in captures.blocks])
        self.captures = {
            label: capture
            for label, capture in zip(labels, captures.blocks, strict=True)
            if self._concerns(capture.block, method)
        }
        if captures.batch_size is None and self.captures:
            raise ValueError(
                f"{method}: the batch size could not be inferred, since the loss's arguments do "
                "not share one leading dimension. Pass batch_size= to cqjax.value_and_grad: the "
                'number of terms that the loss averages over (or loss_reduction="sum")'
            )
        self.batch_size = 1 if captures.batch_size is None else captures.batch_size
        self.examples = captures.examples

    def _concerns(self, block: Block, method: str) -> bool:
        """Whether the block's weight is among the updates that are not masked.

        Raises:
          ValueError: the updates are of other parameters, or have a part of the weight only.
        """
        for path, shape in block.shapes:
            if path in self._masked:
                continue
            if path not in self._leaves:
                raise ValueError(
                    f"{method}: the captures have a parameter {path}, which is not among the "
                    f"updates ({', '.join(self.paths)}): they were captured for other parameters; "
                    "take both from the same call of cqjax.value_and_grad"
                )
            leaf = self._leaves[path]
            if leaf.shape != shape:
                raise ValueError(
                    f"{method}: {path} has shape {leaf.shape} in the updates and {shape} in the "
                    "captures; take both from the same call of cqjax.value_and_grad (and the "
                    "same jax.vmap)"
                )
        masked = self._masked.intersection(block.view.paths)
        if masked and len(masked) < len(block.view.paths):
            raise ValueError(
                f"{method}: of the parameters {', '.join(block.view.paths)}, which form one "
                f"weight, {', '.join(sorted(masked))} are masked; mask all or none"
            )
        return not masked

    def terms(self, block: Block) -> float | jax.Array:
        """N, or what stands for it where all examples share the block's rows."""
        return block.terms(self.batch_size, self.examples)

    def has_bias(self, block: Block) -> bool:
        """Whether the block's bias is updated together with its weight."""
        return block.bias is not None and self._masked.isdisjoint(block.bias.view.paths)

    def joint_bias(self, block: Block) -> bool:
        """Whether it is solved for in one system with its weight."""
        return joint_bias(block, self._masked)

    def is_gradient(self, capture: Capture) -> bool:
        """Whether the updates are the gradient, as far as tracing can tell: the same arrays."""
        paths = self._updated(capture.block)
        return all(self._leaves[path] is capture.gradients[path] for path in paths)

    def changed(self, captures: Sequence[Capture]) -> jax.Array:
        """Whether any entry of the updates differs from the gradient, on any device: () bool."""
        differ = [
            jnp.any(self._leaves[path] != capture.gradients[path])
            for capture in captures
            for path in self._updated(capture.block)
        ]
        return devices.anywhere(jnp.stack(differ).any())

    def _updated(self, block: Block) -> list[str]:
        return [path for path in block.paths if path not in self._masked]

    def matrices(self, block: Block) -> Matrices:
        """The block's part of the updates, in at least float32."""
        return _matrices(block, self._leaves, self.has_bias(block))

    def gradient(self, capture: Capture) -> Matrices:
        """The part of the gradient that comes from the block's sites: XᵀZ̄."""
        block, bias = capture.block, self.has_bias(capture.block)
        if block.exact:
            return _matrices(block, capture.gradients, bias)
        rows = capture.rows()
        return product(rows.x, rows.dz, rows.h if bias else None)

    def counts(self, events: Mapping[str, jax.Array]) -> jax.Array:
        """How many events, () or (B,) bool, the blocks had: (P,) int32.

        P is the number of leaves of the updates' tree; a block's are counted at its first path.
        One more is counted for each parameter without a block whose update is not finite.
        """
        total = jnp.zeros(len(self.paths), jnp.int32)
        first = [(self.captures[label].block.view.paths[0], e) for label, e in events.items()]
        solved = {path for capture in self.captures.values() for path in capture.block.paths}
        others = [
            (path, ~jnp.isfinite(leaf).all())
            for path, leaf in self._leaves.items()
            if path not in solved | self._masked
        ]
        if not first and not others:
            return total
        paths, each = zip(*first, *others, strict=True)
        each = [
            devices.total(jnp.ravel(event).astype(jnp.int32), devices.varying(event))
            for event in each
        ]
        at = np.repeat([self.paths.index(path) for path in paths], [len(e) for e in each])
        return total.at[at].add(jnp.concatenate(each))

    def overflows(self, label: str, result: Matrices) -> jax.Array | bool:
        """Whether a result, finite in at least float32, is not so in its parameters' dtype: (B,).

        False where that is the dtype it has.
        """
        dtype = self._leaves[self.captures[label].block.view.paths[0]].dtype
        if dtype == result.weight.dtype:
            return False

        def lost(part: jax.Array) -> jax.Array:
            return ~jnp.isfinite(part.astype(dtype)).all(tuple(range(1, part.ndim)))

        weight = lost(result.weight)
        if result.bias is None:
            return weight
        return weight | jnp.repeat(lost(result.bias), len(weight) // len(result.bias))

    def check_counts(self, counts: jax.Array) -> None:
        """Refuses counts of a state that was made for other parameters.

        Raises:
          ValueError: there are not as many as the updates have leaves.
        """
        if counts.shape != (len(self.paths),):
            raise ValueError(
                f"{self._method}: the state has counts of shape {counts.shape}; expected "
                f"{(len(self.paths),)}, one for each of the updates ({', '.join(self.paths)}): "
                "make the state by init of the same parameters"
            )

    def replaced(self, results: Mapping[str, Matrices]) -> optax.Updates:
        """The updates, with the results for `self.captures` in the place of their parameters'.

        Entries of a parameter that no block covers keep their update. Those that are not finite,
        in the dtype of the parameter, become zero.
        """
        leaves = dict(self._leaves)
        for label, (weight, bias) in results.items():
            block = self.captures[label].block
            if not block.view.whole:
                weight = weight - self.matrices(block).weight
            for path, new in block.scatter(weight, bias).items():
                if path in block.view.paths and not block.view.whole:
                    new += leaves[path].astype(new.dtype)
                leaves[path] = new.astype(leaves[path].dtype)
        return jax.tree.unflatten(self._tree, [finite(leaves[path]) for path in self.paths])


def labelled(blocks: Sequence[Block]) -> list[str]:
    """A name for each block: its own, numbered where slices of one parameter are several blocks."""
    names, seen = [block.name for block in blocks], collections.Counter[str]()
    labels = []
    for name in names:
        labels.append(f"{name}[{seen[name]}]" if names.count(name) > 1 else name)
        seen[name] += 1
    return labels


def check_number(value: Any, name: str) -> None:
    """Refuses a Python number that is no damping; values that may be traced are not looked at.

    Raises:
      ValueError: it is negative, infinite or NaN.
    """
    if isinstance(value, int | float | np.number) and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value}: expected a finite number, zero or more")


def product(
    x: jax.Array, z: jax.Array, h: jax.Array | None, precision: jax.lax.PrecisionLike = HIGHEST
) -> Matrices:
    """[X, h]ᵀZ of rows x: (B, n, d), z: (B, n, o) and h: (B, n), or XᵀZ where h is None."""
    weight = jnp.einsum("bnd,bno->bdo", x.astype(z.dtype), z, precision=precision)
    if h is None:
        return Matrices(weight, None)
    return Matrices(weight, jnp.einsum("bn,bno->bo", h.astype(z.dtype), z, precision=precision))


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


def decomposed(incoming: Matrices, gradient: Matrices) -> Decomposed:
    """Splits what came in into a multiple of the gradient and the rest.

    A gradient that was only scaled (clipped by its norm, say) leaves a rest at the level of
    rounding, which counts as none.
    """
    squared = _inner(gradient, gradient)
    scale = jnp.where(squared > 0, _inner(incoming, gradient) / squared, 0)
    rest = jax.tree.map(lambda h, g: h - along(scale, g) * g, incoming, gradient)
    rounding = 4 * jnp.finfo(squared.dtype).eps
    present = ~(_inner(rest, rest) <= rounding**2 * _inner(incoming, incoming))
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


def _matrices(block: Block, arrays: Mapping[str, jax.Array], bias: bool) -> Matrices:
    def exact(array: jax.Array) -> jax.Array:
        return array.astype(accumulator(array.dtype))

    return Matrices(
        exact(block.weight_matrix(arrays)), exact(block.bias_matrix(arrays)) if bias else None
    )


def joint_bias(block: Block, masked: Set[str]) -> bool:
    """Whether a block has a bias that is solved for in one system with its weight."""
    if block.bias is None or block.parts is not None:
        return False
    return masked.isdisjoint(block.bias.view.paths)


def no_counts(params: optax.Params) -> jax.Array:
    """Zeros, (P,) int32, for the P leaves of the parameters, masked ones included."""
    return jnp.zeros(len(jax.tree.leaves(params, is_leaf=is_masked)), jnp.int32)


def masked_paths(tree: optax.Params, blocks: Iterable[Block]) -> frozenset[str]:
    """The paths at which `optax.masked` has taken a place, and those of blocks' parameters below.

    A mask may be a prefix of the parameters' tree: then it takes whole subtrees.
    """
    keyed = jax.tree.leaves_with_path(tree, is_leaf=is_masked)
    taken = {path_of(keys) for keys, leaf in keyed if is_masked(leaf)}
    paths = (path for block in blocks for path in block.paths)
    below = {path for path in paths if any(not t or path.startswith(f"{t}/") for t in taken)}
    return frozenset(taken | below)


def is_masked(leaf: Any) -> bool:
    """Whether `optax.masked` has taken a parameter's place."""
    return isinstance(leaf, optax.MaskedNode)
