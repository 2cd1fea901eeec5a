"""Who competes: those of the everyday work, and L-BFGS where each step sees all examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.classification import LossFn
from experiments.contest import Entrant
from experiments.everyday import entrants
from experiments.everyday.entrants import ADAM
from experiments.everyday.work import Work
from experiments.training import State, Step

LBFGS = "L-BFGS"


def everyone(
    work: Work, grids: Mapping[str, Sequence[float]], dampings: Sequence[float]
) -> list[Entrant]:
    """All entrants, Adam first.

    Args:
      work: What they learn.
      grids: The rates that are tried at first for each that takes part, by its option's name. Of
        L-BFGS, whose line search finds the rates, the numbers of updates to remember.
      dampings: Relative dampings with which C-Adam takes part once more.

    Returns:
      The entrants.
    """
    adam, *others = entrants.everyone(work, grids, dampings)
    assert adam.name == ADAM
    if "lbfgs" not in grids:
        return [adam, *others]

    def remembering(updates: float) -> tuple[Any, Step]:
        optimizer = optax.lbfgs(memory_size=round(updates))
        return optimizer, searching_step(work.loss_fn, optimizer)

    # Each further step of this grid takes three times as long: 1,000 updates, 87 seconds.
    lbfgs = Entrant(LBFGS, remembering, grids["lbfgs"], "other", extended=False)
    return [adam, lbfgs, *others]


def searching_step(loss_fn: LossFn, optimizer: Any) -> Step:
    """A step of an optimizer with a line search, which evaluates the loss as often as it likes."""

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        params, model_state, opt_state = state

        def value_fn(params: Any) -> jax.Array:
            return loss_fn(params, model_state, images, labels)[0]

        # The search has evaluated value and gradient where it ended.
        value, grads = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
        updates, opt_state = optimizer.update(
            grads, opt_state, params, value=value, grad=grads, value_fn=value_fn
        )
        return State(optax.apply_updates(params, updates), model_state, opt_state), jnp.asarray(
            value
        )

    return step
