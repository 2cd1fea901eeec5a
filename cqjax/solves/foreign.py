"""Updates that come of something else than the gradient that was captured.

A solve sees the rows of one batch. It divides what they do not span by λ / N: a gradient of other
rows becomes an update of hundreds of times the right length. An earlier member of a chain may have
changed the gradient on purpose, so that "not the gradient" is no mistake by itself. What is certain
while tracing is refused. What may be meant is counted, by the updates' direction.
"""

import inspect
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from cqjax.capture.origins import Origin
from cqjax.solves.layer import Layer

COSINE = 0.9
"""Of updates and gradient: below it, the part with another direction is about half as long as the
rest. Clipping by norm leaves 1, and weak weight decay .998. Measured on digits with batches of 8 to
128: Adam before it has -.2 to .8, momentum -.4 to .96 from the second step on, a second solve .06
to .6, gradients of another batch 0 to .9, of other parameters -.2 to 1. Clipping by entry has .7
to .9, and its solution is not the gradient's either."""


def found(layers: Collection[Layer], method: str) -> dict[str, jax.Array]:
    """Which layers' updates point elsewhere than the gradient: () bool, by label.

    Costs nothing where tracing shows that the updates are the gradient. Warns of what is found, if
    nothing is traced.

    Args:
      layers: the layers, with their updates.
      method: the transformation's name, for messages.

    Raises:
      ValueError: the updates are certainly no gradient of this batch.
    """
    changed = [layer for layer in layers if not layer.is_gradient]
    _refuse(changed, method)
    if changed:
        given = [layer.change for layer in changed], [x.capture.gradients for x in changed]
        _compared(*lax.stop_gradient(given))
    events = {layer.label: layer.cosine() < COSINE for layer in changed}
    if not any(isinstance(event, Tracer) for event in events.values()):
        if elsewhere := [label for label, event in events.items() if event]:
            warnings.warn(
                f"{method}: the updates of {', '.join(elsewhere)} point elsewhere than the "
                f"gradient that was captured (cosine below {COSINE}). Take gradient and captures "
                "from the same call of cqjax.value_and_grad; let optax.scale_by_adam and the like "
                "follow, not precede; add microbatches up with cqjax.multi_steps",
                stacklevel=6,  # the caller of `update`, through `with_automatic_axes`
            )
    return events


def _refuse(changed: Collection[Layer], method: str) -> None:
    """Refuses updates whose source is known, and is not the captured gradient.

    Raises:
      ValueError: says what to do instead.
    """
    if changed and _in_multi_steps():
        raise ValueError(
            f"{method}: called by optax.MultiSteps, which hands on the mean gradient of several "
            "microbatches with the captures of the last alone; use cqjax.multi_steps, or put the "
            "microbatches into the loss"
        )
    for layer in changed:
        if Origin.SOLUTION in layer.origins:
            raise ValueError(
                f"{method}: the update of {layer.label} is a solve's result already: there are two "
                "in the chain (csgd, cadam and the other aliases contain one); keep one of them"
            )
        if Origin.GRADIENT in layer.origins:
            raise ValueError(
                f"{method}: the captures of {layer.label} are of another call of "
                "cqjax.value_and_grad than the gradient; take both from the same call"
            )


@jax.custom_batching.custom_vmap
def _compared(updates: Any, gradients: Any) -> jax.Array:
    """Nothing; but `jax.vmap` says here whether it maps over the updates, or the gradients alone.

    What was averaged over its axis is not mapped any more.
    """
    del updates, gradients
    return jnp.zeros(())


@_compared.def_vmap
def _refuse_averaged(size: int, mapped: Sequence[Any], *_: Any) -> tuple[jax.Array, bool]:
    updates, gradients = map(jax.tree.leaves, mapped)
    if all(gradients) and not any(updates):
        raise ValueError(
            f"the captures are those of {size} members of a jax.vmap, each with rows of its own, "
            "and the updates are the same for all: gradients that were averaged over the axis "
            "(lax.pmean). Average the losses instead, without a jax.vmap around the step: "
            "cqjax.value_and_grad(lambda params, batch: "
            "jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch)))"
        )
    return jnp.zeros(()), False


def _in_multi_steps() -> bool:
    """Whether `optax.MultiSteps` is calling.

    Only the call stack says so: to the transformation within, it looks like any wrapper with a
    condition (`optax.apply_if_finite`), and its mean like any change of the gradient.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not optax.MultiSteps.update.__code__:
        frame = frame.f_back
    return frame is not None
