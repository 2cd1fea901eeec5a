"""Networks without their smallest weights: at once, or by decaying and retraining (seed 002)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

import cqjax
from experiments.homework import Examples, Params, accuracy, split, squared
from experiments.scans import descend

DECAY = 0.1  # part of itself that a small weight loses in a step


def smallest(params: Params, count: jax.Array) -> Any:
    """True for so many smallest weights; biases are none of them."""
    weights, rebuild = ravel_pytree([w for w, _ in params])
    small = rebuild((jnp.argsort(jnp.argsort(jnp.abs(weights))) < count).astype(weights.dtype))
    return [(w > 0, jnp.zeros(b.shape, bool)) for w, (_, b) in zip(small, params, strict=True)]


def without(params: Params, small: Any) -> Params:
    """The parameters, zero where they are small."""
    return jax.tree.map(lambda s, p: jnp.where(s, 0, p), small, params)


def shrinking(
    rule: optax.GradientTransformation, small: Any, by: float
) -> optax.GradientTransformation:
    """The rule, but small weights lose a part of themselves each step."""

    def shrink(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda s, u, p: jnp.where(s, -by * p, u), small, updates, params)

    return optax.chain(rule, optax.stateless(shrink))


def at_once(
    rule: optax.GradientTransformation,
    params: Params,
    examples: Examples,
    order: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """Test accuracies `(counts, steps + 1)` when so many weights are removed and the rest trained.

    Args:
      rule: What to train with.
      params: Where to start, for each count.
      examples: All points.
      order: Indices of each step's training points, `(steps, batch)`.
      counts: How many weights to remove.
    """

    def pruned(count: jax.Array) -> jax.Array:
        small = smallest(params, count)
        return _retrained(shrinking(rule, small, 1.0), without(params, small), examples, order)[1]

    return jax.vmap(pruned)(counts)


def by_and_by(
    rule: optax.GradientTransformation,
    params: Params,
    examples: Examples,
    order: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """Test accuracies `(counts,)` when more and more weights decay, and the rest is retrained.

    For each count, from the network of the count before: as many steps in which the smallest
    weights decay while the others are trained, then as many without them. Arguments are as for
    `at_once`.
    """

    def further(params: Params, count: jax.Array) -> tuple[Params, jax.Array]:
        small = smallest(params, count)
        params, _ = _retrained(shrinking(rule, small, DECAY), params, examples, order)
        removed = without(params, small)
        params, accuracies = _retrained(shrinking(rule, small, 1.0), removed, examples, order)
        return params, accuracies[-1]

    return lax.scan(further, params, counts)[1]


def _retrained(
    rule: optax.GradientTransformation, params: Params, examples: Examples, order: jax.Array
) -> tuple[Params, jax.Array]:
    """The parameters after the steps, and the test accuracy from before the first."""
    training, _, test = split(examples)
    batches = tuple(array[order] for array in training)
    params, accuracies = descend(
        cqjax.value_and_grad(squared), rule, params, batches, lambda p: accuracy(p, *test)
    )
    return params, jnp.append(accuracies, accuracy(params, *test))
