"""Squared lengths of what other weights would make of layers' inputs, for all layers together."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cqjax.capture import outputs
from cqjax.capture.captures import Capture
from cqjax.capture.outputs import Moment, Outputs
from cqjax.linalg import devices, joined


class Weights(NamedTuple):
    """Weights, and a bias, for the inputs of one layer.

    Attributes:
      capture: what was captured of the layer.
      weight: V, (B, d, o).
      bias: (B, o); None for none.
    """

    capture: Capture
    weight: jax.Array
    bias: jax.Array | None


Combine = Callable[[jax.Array], jax.Array]
"""k linear combinations of outputs: of an array (B, ..., o) it makes (B, ..., k)."""


class Squares(NamedTuple):
    """Sums over a layer's rows, estimated by some of them where there are many.

    Attributes:
      outputs: those of the squares of all combinations of XV + hb, (B,).
      inputs: those of the squares of all entries of X, (B,).
    """

    outputs: jax.Array
    inputs: jax.Array


def squares(layers: Mapping[Hashable, Weights], combine: Combine) -> dict[Hashable, Squares]:
    """The squared lengths of combinations of the outputs, by label.

    A step for each layer takes as long to compile as one for all. So outputs of one shape are
    joined first: there are few of them.
    """
    of_rows: list[tuple[Weights, Outputs]] = []
    of_moments: list[tuple[Weights, Moment]] = []
    labels: tuple[list[Hashable], list[Hashable]] = [], []
    for label, own in layers.items():
        own = own._replace(weight=combine(own.weight))
        for found in own.capture.outputs(own.weight):
            if isinstance(found, Outputs):
                of_rows.append((own, found))
                labels[0].append(label)
            else:
                of_moments.append((own, found))
                labels[1].append(label)
    parts: dict[Hashable, list[Squares]] = {label: [] for label in layers}
    results = _of_rows(of_rows, combine), _of_moments(of_moments, combine)
    for label, part in zip(sum(labels, []), sum(results, []), strict=True):
        parts[label].append(part)
    return {label: jax.tree.map(_sum, *found) for label, found in parts.items()}


def _of_rows(each: Sequence[tuple[Weights, Outputs]], combine: Combine) -> list[Squares]:
    # The bias is added before anything is squared: it may undo a mean a thousand times as large as
    # what is left.
    def with_bias(y: Any, times: Any, inputs: Any, entries: Any, h: Any, bias: Any) -> Squares:
        return without(y + h[..., None] * combine(bias)[:, None], times, inputs, entries)

    def without(y: Any, times: Any, inputs: Any, entries: Any) -> Squares:
        return Squares(jnp.square(y).sum((1, 2)) * times, inputs * entries)

    arguments: dict[Any, dict[int, tuple[jax.Array, ...]]] = {with_bias: {}, without: {}}
    for i, (own, (y, h, times, inputs, entries, _)) in enumerate(each):
        scales = [jnp.full(len(y), scale, y.dtype) for scale in (times, entries)]
        some = y, scales[0], inputs.astype(y.dtype), scales[1]
        if h is None or own.bias is None:
            arguments[without][i] = some
        else:
            h = h.reshape(1, 1) if not h.ndim else h
            h = jnp.broadcast_to(h.astype(y.dtype), (len(y), h.shape[1]))
            arguments[with_bias][i] = *some, h, own.bias.astype(y.dtype)
    results: dict[int, Squares] = {}
    for function, some in arguments.items():
        found = joined.batched(function, *zip(*some.values(), strict=True))
        results |= zip(some, found, strict=True)
    return [devices.total(results[i], own.axes) for i, (_, own) in enumerate(each)]


def _of_moments(each: Sequence[tuple[Weights, Moment]], combine: Combine) -> list[Squares]:
    def lengths(columns: jax.Array, times: jax.Array) -> jax.Array:
        # Rounding makes the difference of equal lengths negative as often as not.
        return jnp.maximum((columns * times).sum(1), 0).sum(1)

    columns = []
    for own, (moment,) in each:
        bias = None if own.bias is None else combine(own.bias)
        columns.append(outputs.with_bias(own.weight, bias, moment))
    times = [outputs.times(m.matrix, c) for (_, m), c in zip(each, columns, strict=True)]
    found = joined.batched(lengths, columns, times)
    return [
        Squares(each_found, outputs.input_squares(moment.matrix, own.weight.shape[1]))
        for each_found, (own, moment) in zip(found, each, strict=True)
    ]


def _sum(*parts: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, parts)
