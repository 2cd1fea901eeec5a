"""Flax's training state, for transformations that take the argument `captures`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from cqjax.capture.captures import Captures
from cqjax.transforms.extra_args import bind_extra_args


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState`, which passes captures on to the transformation.

    A training step takes `loss, grads, captures = cqjax.value_and_grad(loss_fn)(state.params, ...)`
    and `state.apply_gradients(grads=grads, captures=captures)`. Everything else is Flax's:
    `create`, `replace`, further fields by subclassing, and serialisation. So is the collection
    `_overwrite_with_gradient` of 8-bit layers, which gradients overwrite. If there is one, the
    parameters are under "params" beside it, and so are their paths in the captures.

    Examples:
      >>> import cqjax, flax.linen as nn, jax, jax.numpy as jnp
      >>> from cqjax.training import TrainState
      >>> model, x, y = nn.Dense(1), jnp.eye(4), jnp.arange(4.0)[:, None]
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=model.init(jax.random.key(0), x)["params"],
      ...     tx=cqjax.csgd(1.0, damping=1e-5, relative_damping=0.0, max_change=None),
      ... )
      >>> @jax.jit
      ... def step(state, x, y):
      ...     def loss_fn(params, x, y):
      ...         return 0.5 * jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
      ...
      ...     loss, grads, captures = cqjax.value_and_grad(loss_fn)(state.params, x, y)
      ...     return state.apply_gradients(grads=grads, captures=captures), loss
      >>> for _ in range(2):
      ...     state, loss = step(state, x, y)
      >>> print(f"step {state.step}, loss {loss:.6f}")
      step 2, loss 0.000000
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        captures: Captures | None = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainState:
        """Updates `step`, `params` and `opt_state`, and replaces other fields.

        Args:
          grads: the gradients, of the structure of `params`.
          captures: the last result of the `cqjax.value_and_grad` that gave the gradients.
          extra_args: further arguments for the transformation's `update`: `value`, `value_fn`, ...
          **kwargs: new values of other fields.

        Returns:
          The new state.
        """
        # Flax's own method passes no extra arguments to `update`. So they are bound beforehand.
        bound = bind_extra_args(self.tx, captures=captures, **(extra_args or {}))
        tx = _within_params(bound) if OVERWRITE_WITH_GRADIENT in grads else bound
        state = super(TrainState, self.replace(tx=tx)).apply_gradients(grads=grads, **kwargs)
        return state.replace(tx=self.tx)

    @classmethod
    def create(
        cls, *, apply_fn: Callable[..., Any], params: Any, tx: Any, **kwargs: Any
    ) -> TrainState:
        """Creates a state at step 0, with the transformation's initial state.

        Args:
          apply_fn: usually the model's `apply`.
          params: the parameters.
          tx: the transformation.
          **kwargs: values of a subclass's further fields.

        Returns:
          The state.
        """
        rooted = _within_params(tx) if OVERWRITE_WITH_GRADIENT in params else tx
        state = super().create(apply_fn=apply_fn, params=params, tx=rooted, **kwargs)
        return state.replace(tx=tx)


def _within_params(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps a transformation of {"params": tree} as one of `tree`.

    Flax hands the transformation `tree`, but the captures' paths begin with "params".
    """

    def init(params: Any) -> optax.OptState:
        return tx.init({"params": params})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = tx.update({"params": updates}, state, {"params": params})
        return updates["params"], state

    return optax.GradientTransformation(init, update)
