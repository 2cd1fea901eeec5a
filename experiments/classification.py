"""A network's first weights, its loss, and how well it does on some examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import core

EVALUATION_BATCH = 1000  # images at once

LossFn = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""Takes parameters, the network's state, images and labels to the mean loss and the next state."""

Each = Callable[[jax.Array, jax.Array], jax.Array]
"""Takes outputs and what they should be to a value for each term of the loss's mean."""

Metric = Callable[[Any, Any], float]
"""Takes parameters and the network's state to a number."""


def initialise(model: Any, seed: int, images: np.ndarray | jax.Array) -> tuple[Any, Any]:
    """The first parameters of a Flax network, and its state (running averages, if any)."""
    state, params = core.pop(model.init(jax.random.key(seed), images[:1]), "params")
    return params, state


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of each label."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether each label has the greatest logit."""
    return logits.argmax(axis=-1) == labels


def mean_over_batch(model: Any, of: Each, **call: Any) -> LossFn:
    """The loss that is the mean of a Flax network's values; `call` goes to its `__call__`."""

    def loss_fn(
        params: Any, model_state: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Any]:
        outputs, model_state = model.apply(
            {"params": params, **model_state}, images, mutable=["batch_stats"], **call
        )
        return of(outputs, labels).mean(), model_state

    return loss_fn


def cross_entropy(model: Any, **call: Any) -> LossFn:
    """The mean cross-entropy of a Flax network's logits; `call` goes to its `__call__`."""
    return mean_over_batch(model, cross_entropies, **call)


def mean_loss(model: Any, images: np.ndarray, labels: np.ndarray) -> Metric:
    """The metric that is the mean cross-entropy on some images."""
    return mean_of(model, cross_entropies, images, labels)


def accuracy(model: Any, images: np.ndarray, labels: np.ndarray) -> Metric:
    """The metric that is the fraction of some images that are classified correctly."""
    return mean_of(model, correct, images, labels)


def mean_of(model: Any, of: Each, images: np.ndarray, labels: np.ndarray) -> Metric:
    """The metric that is the mean of a function of outputs and labels over some examples."""
    cuts = range(EVALUATION_BATCH, len(labels), EVALUATION_BATCH)
    batches = [
        (jnp.asarray(some_images), jnp.asarray(their_labels))
        for some_images, their_labels in zip(
            np.split(images, cuts), np.split(labels, cuts), strict=True
        )
    ]

    @jax.jit
    def each(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return of(model.apply(variables, images), labels)

    def metric(params: Any, model_state: Any) -> float:
        variables = {"params": params, **model_state}
        values = [each(variables, *batch) for batch in batches]
        return float(np.concatenate(values).mean(dtype=np.float64))

    return metric
