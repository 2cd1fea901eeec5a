"""Extra arguments for transformations inside wrappers that do not pass any on."""

from __future__ import annotations

from typing import Any

import optax


def bind_extra_args(
    tx: optax.GradientTransformation, **extra_args: Any
) -> optax.GradientTransformation:
    """Gives a transformation its extra arguments now, instead of in `update`.

    Some wrappers take no extra arguments: `optax.lookahead`, `optax.contrib.sam`. A transformation
    is only a pair of functions. So it can be made and wrapped anew in every step, once the captures
    are known. The structure of its state does not depend on them.

    Args:
      tx: the transformation.
      **extra_args: arguments for its `update`: `captures=`, `value_fn=`, ...

    Returns:
      A transformation whose `update` takes no extra arguments.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> x, y = jnp.eye(2), jnp.array([[4.0], [8.0]])
      >>> def lookahead(**extra_args):  # fast steps of 1/2, and half-way back after two of them
      ...     exact = cqjax.csgd(0.5, relative_damping=0.0, max_change=None)
      ...     inner = cqjax.bind_extra_args(exact, **extra_args)
      ...     return optax.lookahead(inner, sync_period=2, slow_step_size=0.5)
      >>> params = optax.LookaheadParams.init_synced({"w": jnp.zeros((2, 1))})
      >>> state = lookahead().init(params)
      >>> for _ in range(2):
      ...     _, grads, captures = cqjax.value_and_grad(loss_fn)(params.fast, x, y)
      ...     updates, state = lookahead(captures=captures).update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params.fast["w"].ravel(), params.slow["w"].ravel())
      [2. 4.] [0. 0.]
      [1.5 3. ] [1.5 3. ]
    """
    wrapped = optax.with_extra_args_support(tx)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return wrapped.update(updates, state, params, **extra_args)

    return optax.GradientTransformation(tx.init, update)
