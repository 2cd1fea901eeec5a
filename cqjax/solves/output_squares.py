"""Squared lengths of what other weights would make of layers' inputs.

`request` makes arrays of one layer, which are small, and `squares` works on those of many layers
that are joined along their first axis: a step for each layer would have to be compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cqjax.capture.captures import Capture
from cqjax.capture.outputs import Outputs
from cqjax.linalg import devices, gram
from cqjax.linalg.products import diagonal, einsum
from cqjax.solves.matrices import Matrices

Combine = Callable[[jax.Array], jax.Array]
"""k linear combinations of outputs: of an array (B, ..., o) it makes (B, ..., k)."""


class Squares(NamedTuple):
    """Sums over a layer's rows, estimated by some of them where there are many, (B,) each.

    Attributes:
      outputs: those of the squares of all combinations of XV + hb.
      inputs: those of the squares of all entries of X.
    """

    outputs: jax.Array
    inputs: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["y", "h", "bias", "times", "inputs", "entries"],
    meta_fields=["axes"],
)
@dataclasses.dataclass(frozen=True)
class _OfRows:
    """What is summed up of `Outputs`, with the bias as it is, (B, o)."""

    y: jax.Array
    h: jax.Array | None
    bias: jax.Array | None
    times: jax.Array
    inputs: jax.Array
    entries: jax.Array
    axes: tuple[str, ...]

    def squares(self, combine: Combine) -> Squares:
        y = self.y
        if self.h is not None and self.bias is not None:
            # Added before anything is squared: it may undo a mean that is a thousand times as large
            # as what is left.
            y += self.h[..., None] * combine(self.bias)[:, None]
        found = Squares(jnp.square(y).sum((1, 2)) * self.times, self.inputs * self.entries)
        return devices.total(found, self.axes)


class _OfMoment(NamedTuple):
    """Columns V, and a second moment times them: (B, d, k), or with a bias (B, d+1, k); ‖X‖²."""

    columns: jax.Array
    product: jax.Array
    inputs: jax.Array

    def squares(self, combine: Combine) -> Squares:
        del combine
        found = (self.columns * self.product).sum((1, 2))
        # Rounding makes the difference of equal lengths negative as often as not.
        return Squares(jnp.maximum(found, 0), self.inputs)


Request = tuple[_OfRows | _OfMoment, ...]
"""Of each of a layer's sites, arrays with the axis B in front."""


def request(capture: Capture, weights: Matrices, combine: Combine) -> Request:
    """What `squares` needs for other weights V, (B, d, o), and a bias b, (B, o), of one layer."""
    weight, bias = combine(weights.weight), weights.bias
    return tuple(
        _of_rows(found, bias, capture.block.parts or 1)
        if isinstance(found, Outputs)
        else _of_moment(found.matrix, weight, bias, combine, capture.block.parts or 1)
        for found in capture.outputs(weight)
    )


def squares(request: Request, combine: Combine) -> Squares:
    """The squared lengths, summed over the sites."""
    parts = [part.squares(combine) for part in request]
    return jax.tree.map(lambda *each: functools.reduce(jnp.add, each), *parts)


def _of_rows(found: Outputs, bias: jax.Array | None, parts: int) -> _OfRows:
    y, h, times, inputs, entries, axes = found
    y, inputs = _merged(y, parts), _summed(inputs.astype(y.dtype), parts)
    times, entries = (jnp.full(len(y), each, y.dtype) for each in (times, entries))
    if h is None or bias is None:
        return _OfRows(y, None, None, times, inputs, entries, axes)
    h = h.reshape(1, 1) if not h.ndim else h
    h = jnp.broadcast_to(h.astype(y.dtype), (len(y), h.shape[1]))
    return _OfRows(y, h, bias.astype(y.dtype), times, inputs, entries, axes)


def _of_moment(
    moment: jax.Array, weight: jax.Array, bias: jax.Array | None, combine: Combine, parts: int
) -> _OfMoment:
    features = weight.shape[1]
    if moment.ndim == 2:
        inputs, product = moment.sum(-1), moment[..., None] * weight
        return _OfMoment(_merged(weight, parts), _merged(product, parts), _summed(inputs, parts))
    inputs = diagonal(moment)[:, :features].sum(-1)
    if moment.shape[1] > features:
        last = jnp.zeros_like(weight[:, 0]) if bias is None else combine(bias)
        weight = jnp.concatenate([weight, last[:, None]], 1)
    product = einsum("bde,bek->bdk", moment, weight, precision=gram.HIGHEST)
    return _OfMoment(_merged(weight, parts), _merged(product, parts), _summed(inputs, parts))


def _merged(array: jax.Array, parts: int) -> jax.Array:
    """Of weights in parts, which B counts, those of one weight one after the other."""
    return array.reshape(-1, parts * array.shape[1], array.shape[2])


def _summed(array: jax.Array, parts: int) -> jax.Array:
    return array.reshape(-1, parts).sum(1) if parts > 1 else array
