"""The homework of Jawahar (2019): two Gaussians, the 2-3-5-3-1 network, training, pruning."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

import cqjax
from experiments.scans import descend
from experiments.training import shuffled_batches

SIZES = (2, 3, 5, 3, 1)
WEIGHTS = 2 * 3 + 3 * 5 + 5 * 3 + 3 * 1
TRAINING, VALIDATION, TEST = 200, 200, 1000
BATCH = 20
DECAY = 0.1  # the part of itself that a small weight loses in each step before it is removed
INITIALISATIONS = ("zeros", "ones", "random", "Xavier")
GAUSSIANS = ("apart", "around")
RATES = {
    "SGD": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "momentum": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "Adam": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "C-SGD": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
}

Params = list[tuple[jax.Array, jax.Array]]
Examples = tuple[jax.Array, jax.Array]


def gaussians(key: jax.Array, kind: str) -> Examples:
    """Points `(n, 2)` of two Gaussians, half of each, and classes -1 and 1, `(n,)`.

    If they are "apart", a straight line divides them nearly as well as any curve. If they are
    "around", one lies around the other, and no line divides them.
    """
    n = TRAINING + VALIDATION + TEST
    t = jnp.where(jnp.arange(n) % 2 == 0, 1.0, -1.0)
    noise = jax.random.normal(key, (n, 2))
    if kind == "apart":
        return t[:, None] + noise @ jnp.array([[1.0, 0.0], [0.6, 0.8]]), t
    return jnp.where(t[:, None] > 0, 0.5, 2.0) * noise, t


def initial(key: jax.Array, kind: str) -> Params:
    """The network's first weights; its biases are zero."""

    def weights(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if kind in {"zeros", "ones"}:
            return jnp.full(shape, float(kind == "ones"))
        make = jax.nn.initializers
        return (make.glorot_normal() if kind == "Xavier" else make.normal(1.0))(key, shape)

    shapes = list(zip(SIZES, SIZES[1:], strict=False))
    keys = jax.random.split(key, len(shapes))
    return [(weights(k, s), jnp.zeros(s[1:])) for k, s in zip(keys, shapes, strict=True)]


def outputs(params: Params, x: jax.Array) -> jax.Array:
    """The network's outputs `(n,)`: sigmoids in the hidden layers, a linear output."""
    for w, b in params[:-1]:
        x = jax.nn.sigmoid(x @ w + b)
    return (x @ params[-1][0] + params[-1][1])[:, 0]


def squared(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
    """The mean squared error."""
    return jnp.mean((t - outputs(params, x)) ** 2)


def hinge(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
    """The mean hinge loss, max(0, 1 - t o)."""
    return jnp.mean(jax.nn.relu(1 - t * outputs(params, x)))


LOSSES = {"squared": squared, "hinge": hinge}


def accuracy(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
    """The part of the points whose outputs have the right sign."""
    return jnp.mean(outputs(params, x) * t > 0)


def optimizer(method: str, rate: Any) -> optax.GradientTransformation:
    """The method at a rate."""
    return {
        "SGD": optax.sgd(rate),
        "momentum": optax.sgd(rate, momentum=0.9),
        "Adam": optax.adam(rate),
        "C-SGD": cqjax.csgd(rate, damping=1e-3, relative_damping=0.0, max_change=None),
    }[method]


def setting(key: jax.Array, kind: str, first: str) -> tuple[Params, Examples]:
    """A seed's first parameters, and all points."""
    data, weights = jax.random.split(key)
    return initial(weights, first), gaussians(data, kind)


def orders(seeds: int, points: int, steps: int) -> np.ndarray:
    """Indices of the training points in each step's batch, `(seeds, steps, batch)`."""
    return np.stack([shuffled_batches(seed, points, BATCH, steps) for seed in range(seeds)])


def split(examples: Examples) -> tuple[Examples, Examples, Examples]:
    """The points to train on, to choose rates by, and to test."""
    ends = (0, TRAINING, TRAINING + VALIDATION, None)
    first, second, third = (
        tuple(array[a:b] for array in examples) for a, b in zip(ends, ends[1:], strict=False)
    )
    return first, second, third  # pyright: ignore[reportReturnType]


def train(
    loss_fn: Callable[..., jax.Array],
    rule: optax.GradientTransformation,
    params: Params,
    examples: Examples,
    order: jax.Array,
    every: int,
    decay: Any = 0.0,
) -> tuple[Params, dict[str, jax.Array]]:
    """Train on the batches of an order `(steps, batch)`, and measure every few steps."""
    training, validation, test = split(examples)

    def regularised(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
        return loss_fn(params, x, t) + decay * optax.tree.norm(params, squared=True)

    def measure(params: Params) -> dict[str, jax.Array]:
        return {
            "training_loss": loss_fn(params, *training),
            "validation_loss": loss_fn(params, *validation),
            "training_accuracy": accuracy(params, *training),
            "accuracy": accuracy(params, *test),
            "squared_norm": optax.tree.norm(params, squared=True),
        }

    batches = tuple(array[order] for array in training)
    differentiate = cqjax.value_and_grad(regularised)
    params, history = descend(differentiate, rule, params, batches, measure, every=every)
    last = measure(params)
    return params, {k: jnp.append(v, last[k]) for k, v in history.items()}


def unequal(params: Params) -> jax.Array:
    """The greatest difference between the incoming weights of two neurons of a hidden layer."""
    return jnp.max(jnp.stack([jnp.max(jnp.ptp(w, axis=1)) for w, _ in params[:-1]]))


def smallest(params: Params, count: jax.Array) -> Any:
    """True for the `count` smallest weights. Biases do not count."""
    weights, rebuild = ravel_pytree([w for w, _ in params])
    small = rebuild((jnp.argsort(jnp.argsort(jnp.abs(weights))) < count).astype(weights.dtype))
    return [(w > 0, jnp.zeros(b.shape, bool)) for w, (_, b) in zip(small, params, strict=True)]


def without(params: Params, small: Any) -> Params:
    """The parameters, with zeros in place of the small ones."""
    return jax.tree.map(lambda s, p: jnp.where(s, 0, p), small, params)


def shrinking(
    rule: optax.GradientTransformation, small: Any, by: float
) -> optax.GradientTransformation:
    """The rule, but in each step small weights lose a part of themselves instead."""

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
    """Remove the smallest weights at once, and train the rest.

    Args:
      rule: The optimizer.
      params: The parameters to start from, for each count.
      examples: All points.
      order: Indices of each step's training points, `(steps, batch)`.
      counts: How many weights to remove.

    Returns:
      The test accuracies `(counts, steps + 1)`.
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
    """Remove more and more weights, and retrain the rest. Returns test accuracies `(counts,)`.

    Each count starts from the network of the count before. First the smallest weights decay while
    the others are trained. Then they are removed, and the others are trained for as many steps.
    The arguments are those of `at_once`.
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
    """The parameters after the steps, and the test accuracies, first before any step."""
    training, _, test = split(examples)
    batches = tuple(array[order] for array in training)
    params, accuracies = descend(
        cqjax.value_and_grad(squared), rule, params, batches, lambda p: accuracy(p, *test)
    )
    return params, jnp.append(accuracies, accuracy(params, *test))
