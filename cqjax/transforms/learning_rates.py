"""Two learning rates: one for what is solved for, one for everything else."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cqjax.capture.captures import Captures
from cqjax.capture.checks import check_rate
from cqjax.solves.layers import Layers, is_masked


class ScaleByLearningRatesState(NamedTuple):
    """State of `scale_by_learning_rates`: () int32, the number of updates so far."""

    count: chex.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def scale_by_learning_rates(
    covered: optax.ScalarOrSchedule, uncovered: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus a learning rate: one for captured layers, one for the rest.

    Args:
      covered: a number or a schedule, for the parameters of layers that were captured.
      uncovered: the same for all others, as scales of normalisation layers.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    Raises:
      TypeError: a rate is neither a number nor a schedule.

    Examples:
      >>> import cqjax, jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     return jnp.mean((x @ params["w"]) * params["scale"])
      >>> params = {"scale": jnp.ones(2), "w": jnp.ones((2, 2))}
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, jnp.eye(2))
      >>> tx = cqjax.scale_by_learning_rates(covered=1.0, uncovered=0.1)
      >>> updates, _ = tx.update(grads, tx.init(params), captures=captures)
      >>> print(updates["w"][0] / grads["w"][0], updates["scale"] / grads["scale"])
      [-1. -1.] [-0.1 -0.1]
    """
    check_rate(covered, "covered")
    check_rate(uncovered, "uncovered")

    def init(params: optax.Params) -> ScaleByLearningRatesState:
        del params
        return ScaleByLearningRatesState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        captures: Captures | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        layers = Layers(updates, captures, "scale_by_learning_rates", params)
        paths = {path for layer in layers.values() for path in layer.block.paths}
        leaves, tree = jax.tree.flatten(updates, is_leaf=is_masked)
        scaled = []
        for path, leaf in zip(layers.paths, leaves, strict=True):
            rate = covered if path in paths else uncovered
            rate = rate(state.count) if callable(rate) else rate
            scaled.append(leaf if is_masked(leaf) else -jnp.asarray(rate, leaf.dtype) * leaf)
        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.unflatten(tree, scaled), ScaleByLearningRatesState(count)

    return optax.GradientTransformationExtraArgs(init, update)
