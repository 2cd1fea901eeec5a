"""Weights of a product's rows: zero for rows that are no examples.

A convolution's rows are patches, which share entries of its input. So a weight is a whole
example's. Those of other products are (1, n), or (B, n) where they differ along B.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.program.forms import Convolution, Form, Lookup


def of_rows(form: Form, entries: Any) -> Any:
    """Which rows count: those of which any entry of the output does.

    Args:
      form: the product's form.
      entries: which entries of the output do, of length 1 along axes where all are alike.
    """
    part: Any = jnp if isinstance(entries, jax.Array) else np
    rows = form.output.groups[1]
    kept = rows[:1] if isinstance(form, Convolution) else (*form.output.groups[0], *rows)
    sizes: list[int] = []
    for axis, factors in enumerate(form.axes):
        if len(factors) == 1 and factors[0] in kept:
            sizes.append(entries.shape[axis])
        else:  # mixed along these factors
            entries = entries.any(axis, keepdims=True)
            sizes += [1] * len(factors)
    entries = entries.reshape(sizes)
    if isinstance(form, Convolution):
        return part.broadcast_to(entries.reshape(-1), (form.output.sizes[rows[0]],))
    batch = form.output.groups[0]
    alike = math.prod(sizes[i] for i in batch) == 1
    layout = form.output.narrowed(rows if alike else kept)
    return layout.pack(part.broadcast_to(entries, layout.sizes))[..., 0]


def shape(form: Form) -> tuple[int, ...]:
    """The shape of weights that are the same along B."""
    rows = form.output.groups[1]
    return (
        (form.output.sizes[rows[0]],)
        if isinstance(form, Convolution)
        else (1, form.output.shape[1])
    )


def counted(form: Form, weights: jax.Array) -> jax.Array:
    """How many rows have a weight: (), or (B,)."""
    found = jnp.count_nonzero(weights, -1).astype(jnp.float32)
    if isinstance(form, Convolution):
        return found * (form.output.shape[1] // len(weights))
    return found if len(found) > 1 else found[0]


def weighted(form: Form, x: jax.Array, weights: jax.Array) -> jax.Array:
    """The activation with its rows multiplied by weights."""
    if isinstance(form, Convolution):
        shape = [1] * x.ndim
        shape[form.lhs[0]] = len(weights)
        return x * weights.reshape(shape).astype(x.dtype)
    if isinstance(form, Lookup):
        return x  # indices: their counts are weighted
    batch, rows, _ = form.inputs.groups
    of_rows = form.inputs.narrowed((*batch, *rows) if len(weights) > 1 else rows)
    factors = of_rows.unpack(weights.astype(x.dtype), of_rows.sizes)
    return (x.reshape(form.inputs.sizes) * factors).reshape(x.shape)


def column(form: Form, h: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A feature with these weights, or one weight, as a column for each of B matrices: (B, n)."""
    if isinstance(form, Convolution) and h.ndim:
        h = jnp.repeat(h, shape[1] // len(h))
    return jnp.broadcast_to(h, shape)


def sampled(form: Form, h: jax.Array, number: int) -> jax.Array:
    """A feature of the rows that `form.times` looks at, so many of them: (), or (B or 1, m)."""
    if not h.ndim:
        return h
    if isinstance(form, Convolution):
        positions = math.prod(form.output.sizes[i] for i in form.output.groups[1][1:])
        every = -(-len(h) // (number // positions))
        return jnp.repeat(h[::every], positions)[None]
    return h[:, :: -(-h.shape[1] // number)]
