"""All layers among the updates of a transformation: the way to write a new method."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cqjax.capture.block import Block
from cqjax.capture.captures import Capture, Captures
from cqjax.linalg import devices, joined
from cqjax.linalg.gram import accumulator
from cqjax.program.paths import by_path
from cqjax.solves import nearest
from cqjax.solves.automatic import with_automatic_axes
from cqjax.solves.layer import Layer
from cqjax.solves.matrices import Matrices, finite


class Layers(Mapping[str, Layer]):
    """A `Layer` for each captured weight among the updates, by its label.

    A method computes new matrices for each layer, and `replaced` puts them into the updates.
    Parameters that were not captured pass through. Without a state, `for_each_layer` does it all.

    Attributes:
      paths: the paths of all leaves of the updates, masked ones included.
      batch_size: N.
    """

    def __init__(
        self,
        updates: optax.Updates,
        captures: Any,
        method: str,
        params: optax.Params | None = None,
    ):
        """Matches `updates` with `captures`.

        Args:
          updates: what the transformation was handed; `optax.MaskedNode`s are left alone.
          captures: what it was passed as `captures`.
          method: its name, for errors.
          params: the parameters, if it was passed some.

        Raises:
          ValueError: no captures were passed, they belong to other parameters, or the batch size
            is unknown; the parameters are in another kind of tree.
          TypeError: they are none.
        """
        if captures is None:
            raise ValueError(
                f"{method}: no captures were passed. Take the gradient with "
                "cqjax.value_and_grad, which returns them last, and call "
                "update(grads, state, params, captures=captures). Flax's TrainState hands none on; "
                "cqjax.training.TrainState does"
            )
        if not isinstance(captures, Captures):
            raise TypeError(
                f"{method}: captures is a {type(captures).__name__}; expected the last result of "
                "cqjax.value_and_grad"
            )
        self._method = method
        self._tree = jax.tree.structure(updates, is_leaf=is_masked)
        self._leaves = by_path(updates, is_masked)
        self.paths = list(self._leaves)
        self._check_kind(updates, params)
        blocks = [capture.block for capture in captures.blocks]
        self._masked = masked_paths(updates, blocks)
        self.batch_size = 1 if captures.batch_size is None else captures.batch_size
        self._layers = {
            label: self._layer(label, capture, captures.examples)
            for label, capture in zip(labelled(blocks), captures.blocks, strict=True)
            if self._concerns(capture.block)
        }
        if captures.batch_size is None and self._layers:
            raise ValueError(
                f"{method}: the batch size could not be inferred, since the loss is no sum or mean "
                "over its terms, and its arguments do not share one leading dimension "
                f"({captures.unknown}). Pass batch_size= to "
                "cqjax.value_and_grad: the number of terms that the loss averages over (or "
                'loss_reduction="sum")'
            )

    def __getitem__(self, label: str) -> Layer:
        """The layer of this label."""
        return self._layers[label]

    def __iter__(self) -> Iterator[str]:
        """The labels, in the order of the captures."""
        return iter(self._layers)

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._layers)

    def _check_kind(self, updates: optax.Updates, params: optax.Params | None) -> None:
        """Refuses a `FrozenDict` for a `dict`, which no rule of Optax could map over together.

        Raises:
          ValueError: says what to do.
        """
        if jax.tree.structure(params, is_leaf=is_masked) == self._tree:
            return
        if list(by_path(params, is_masked)) == self.paths:
            raise ValueError(
                f"{self._method}: the updates are a {type(updates).__name__} and the parameters a "
                f"{type(params).__name__}, or parts of them are, with the same paths; expected "
                "trees of one kind: flax.core.unfreeze makes dicts of FrozenDicts"
            )

    def _layer(self, label: str, capture: Capture, examples: Any) -> Layer:
        block = capture.block
        return Layer(
            label=label,
            capture=capture,
            terms=block.terms(self.batch_size, examples),
            has_bias=block.bias is not None and self._masked.isdisjoint(block.bias.view.paths),
            _updates={p: self._leaves[p] for p in block.paths if p not in self._masked},
        )

    def _concerns(self, block: Block) -> bool:
        """Whether the block's weight is among the updates that are not masked.

        Raises:
          ValueError: the updates are of other parameters, or have a part of the weight only.
        """
        for path, shape in block.shapes:
            if path in self._masked:
                continue
            if path not in self._leaves:
                raise ValueError(
                    f"{self._method}: the captures have a parameter {path}, which is not among the "
                    f"updates ({', '.join(self.paths)}): they were captured for other parameters; "
                    "take both from the same call of cqjax.value_and_grad"
                )
            leaf = self._leaves[path]
            if leaf.shape != shape:
                raise ValueError(
                    f"{self._method}: {path} has shape {leaf.shape} in the updates and {shape} in "
                    "the captures; take both from the same call of cqjax.value_and_grad (and the "
                    "same jax.vmap)"
                )
        masked = self._masked.intersection(block.view.paths)
        if masked and len(masked) < len(block.view.paths):
            raise ValueError(
                f"{self._method}: of the parameters {', '.join(block.view.paths)}, which form one "
                f"weight, {', '.join(sorted(masked))} are masked; mask all or none"
            )
        return not masked

    @property
    def others(self) -> dict[str, jax.Array]:
        """The updates of parameters that no layer covers, by path; masked ones aside."""
        solved = {path for layer in self.values() for path in layer.block.paths}
        return {p: a for p, a in self._leaves.items() if p not in solved | self._masked}

    def replaced(
        self, results: Mapping[str, Matrices], others: Mapping[str, jax.Array] | None = None
    ) -> optax.Updates:
        """The updates, with results for layers in the place of their parameters' updates.

        Entries of a parameter that no layer covers keep their update, or are those of `others`.
        Those that are not finite, in the dtype of the parameter, become zero. Without a layer, so
        do those whose square is not: a rule that averages squares would have infinity for good.
        Where the loss makes a weight of parameters, theirs are the shortest updates that move it
        nearest to the result, to first order; or those of `others`, without a result.
        """
        others = self.in_their_dtypes({**self.others, **(others or {})})
        leaves = self._leaves | {
            p: jnp.where(jnp.isfinite(_square(a)), a, 0) for p, a in others.items()
        }
        for label, (weight, bias) in results.items():
            layer = self[label]
            if layer.made:
                new = nearest.of_parameters(layer.image, Matrices(weight, bias))
                leaves |= self.in_their_dtypes(new)
                continue
            whole = layer.block.view.whole
            if not whole:  # the difference is added, so that other entries stay
                weight = weight - layer.change.weight
            for path, new in layer.block.scatter(weight, bias).items():
                if path in layer.block.view.paths and not whole:
                    new += leaves[path].astype(new.dtype)
                leaves[path] = new.astype(leaves[path].dtype)
        return jax.tree.unflatten(self._tree, [finite(leaves[path]) for path in self.paths])

    def in_their_dtypes(self, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Arrays of parameters, by path, in the dtypes of their updates."""
        return {path: array.astype(self._leaves[path].dtype) for path, array in arrays.items()}

    def counts(self, events: Mapping[str, jax.Array]) -> jax.Array:
        """How many events, () or (B,) bool, the layers had, by label: (P,) int32.

        P is the number of leaves of the updates' tree; a layer's are counted at its first path.
        """
        found = {label: event.ravel() for label, event in events.items()}
        return self.counted(
            [joined.Results((label,), (event.size,), event) for label, event in found.items()]
        )

    def counted(self, events: Sequence[joined.Results], without: Collection[str] = ()) -> jax.Array:
        """The same, of (B,) bool that were found together, by layers' labels or other paths.

        Names of something else are left out, and so are some layers.
        """
        if not events:
            return jnp.zeros(len(self.paths), jnp.int32)
        places = {path: i for i, path in enumerate(self.paths)}
        places |= {label: places[layer.block.view.paths[0]] for label, layer in self.items()}
        places = {name: place for name, place in places.items() if name not in without}
        at = [
            place
            for labels, sizes, _ in events
            for place in np.repeat([places.get(str(label), -1) for label in labels], sizes)
        ]
        numbers = [_number(event) for _, _, event in events]
        own = jnp.arange(len(self.paths))[:, None] == np.asarray(at)[None]
        return jnp.where(own, jnp.concatenate(numbers)[None], 0).sum(1, dtype=jnp.int32)

    def lost(self) -> jax.Array:
        """1 for each parameter without a layer whose update has no finite length: (P,) int32."""

        def no_length(stack: jax.Array) -> jax.Array:
            return ~jnp.isfinite(_square(stack).sum(tuple(range(1, stack.ndim))))

        return self.counted(joined.each(no_length, self.others))

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


def _square(array: jax.Array) -> jax.Array:
    """An array's squares, in at least float32."""
    return jnp.square(jnp.abs(array).astype(accumulator(array.dtype)))


def _number(found: jax.Array) -> jax.Array:
    """1 where it is true, on each of the devices over which it varies."""
    return devices.total(found.astype(jnp.int32), devices.varying(found))


def for_each_layer(
    update: Callable[[Layer], Matrices | None], method: str
) -> optax.GradientTransformationExtraArgs:
    """A transformation that makes each layer's update on its own, and keeps no state.

    Parameters that were not captured pass through.

    Args:
      update: makes a layer's new update of its record; None leaves it as it is.
      method: the transformation's name, for errors.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    Examples:
      Each layer's gradient, divided by the mean square of its inputs:

      >>> import cqjax, jax.numpy as jnp
      >>> def divided(layer):
      ...     mean = jnp.trace(layer.second_moment(), axis1=1, axis2=2) / layer.block.rows
      ...     joined = layer.update.joined / mean[:, None, None]
      ...     return cqjax.Matrices.parted(joined, layer.has_bias)
      >>> def loss_fn(params, x):
      ...     return jnp.mean(x @ params["w"])
      >>> params, x = {"w": jnp.zeros((3, 1))}, 2 * jnp.eye(3)
      >>> tx = cqjax.for_each_layer(divided, "divided")
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
      >>> updates, _ = tx.update(grads, tx.init(params), captures=captures)
      >>> print((updates["w"] / grads["w"]).ravel())
      [0.25 0.25 0.25]
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    @with_automatic_axes
    def update_all(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        captures: Captures | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        layers = Layers(updates, captures, method, params)
        results = {label: update(layer) for label, layer in layers.items()}
        return layers.replaced({k: v for k, v in results.items() if v is not None}), state

    return optax.GradientTransformationExtraArgs(init, update_all)


def labelled(blocks: Sequence[Block]) -> list[str]:
    """A label for each block: its name, numbered where slices of one parameter are several."""
    names, seen = [block.name for block in blocks], collections.Counter[str]()
    number, labels = collections.Counter(names), []
    for name in names:
        labels.append(f"{name}[{seen[name]}]" if number[name] > 1 else name)
        seen[name] += 1
    return labels


def is_masked(leaf: Any) -> bool:
    """Whether `optax.masked` has taken a parameter's place."""
    return isinstance(leaf, optax.MaskedNode)


def masked_paths(tree: optax.Params, blocks: Iterable[Block]) -> set[str]:
    """The paths of `optax.masked`'s placeholders, and those of blocks' parameters below.

    A mask may be a prefix of the parameters' tree: then it takes whole subtrees.
    """
    masked = {path for path, leaf in by_path(tree, is_masked).items() if is_masked(leaf)}
    paths = (path for block in blocks for path in block.paths)
    return masked | {path for path in paths if not masked.isdisjoint(_above(path))}


def _above(path: str) -> list[str]:
    """The paths of the trees that a parameter is in."""
    return ["", *(path[:i] for i, character in enumerate(path) if character == "/")]
