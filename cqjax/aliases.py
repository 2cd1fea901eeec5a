"""The paper's optimizers: consequentialism (or NLMS) first, then Optax's rule. Chains only."""

import optax

from cqjax.transforms.consequentialism import Schedule, scale_by_consequentialism
from cqjax.transforms.nlms import scale_by_nlms

Optimizer = optax.GradientTransformationExtraArgs


def _chain(damping: Schedule, relative_damping: Schedule, rule: optax.GradientTransformation):
    first = scale_by_consequentialism(damping, relative_damping=relative_damping)
    return optax.chain(first, rule)


def csgd(
    learning_rate: optax.ScalarOrSchedule,
    damping: Schedule = 1e-3,
    *,
    relative_damping: Schedule = 0.0,
) -> Optimizer:
    r"""C-SGD: stochastic gradient descent with consequentialism, :math:`W \leftarrow W - \mu U`.

    Args:
      learning_rate: μ, the fraction of each example's virtual error that a step removes from a
        layer's outputs; a number or a schedule.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    Examples:
      >>> import cqjax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> x, y = jnp.eye(2, 3), jnp.array([[4.0], [8.0]])
      >>> tx = cqjax.csgd(0.5, damping=0.0)
      >>> state = tx.init(params)
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
      >>> updates, state = tx.update(grads, state, params, captures=captures)
      >>> print((x @ optax.apply_updates(params, updates)["w"]).ravel())
      [2. 4.]

    References:
      Seed 000, Eq. 63 and section 5.
    """
    return _chain(damping, relative_damping, optax.sgd(learning_rate))


def cmomentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    damping: Schedule = 1e-3,
    *,
    relative_damping: Schedule = 0.0,
) -> Optimizer:
    """C-SGD with momentum: `optax.sgd(learning_rate, momentum)` after consequentialism.

    Args:
      learning_rate: μ, a number or a schedule.
      momentum: decay of the accumulated update.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    References:
      Seed 000, section 5.4.
    """
    return _chain(damping, relative_damping, optax.sgd(learning_rate, momentum))


def cnesterov(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    damping: Schedule = 1e-3,
    *,
    relative_damping: Schedule = 0.0,
) -> Optimizer:
    """C-Nesterov: `optax.sgd(learning_rate, momentum, nesterov=True)` after consequentialism.

    Args:
      learning_rate: μ, a number or a schedule.
      momentum: decay of the accumulated update (the paper's experiments have 0.95).
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    References:
      Seed 000, section 5.4.
    """
    rule = optax.sgd(learning_rate, momentum, nesterov=True)
    return _chain(damping, relative_damping, rule)


def crmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    eps: float = 1e-8,
    damping: Schedule = 1e-3,
    *,
    relative_damping: Schedule = 0.0,
) -> Optimizer:
    """C-RMSProp: `optax.rmsprop(learning_rate, decay, eps)` after consequentialism.

    Args:
      learning_rate: a number or a schedule.
      decay: of the average of squared updates.
      eps: added to the root of that average.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    References:
      Seed 000, abstract and section 5.
    """
    return _chain(damping, relative_damping, optax.rmsprop(learning_rate, decay, eps))


def cadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    damping: Schedule = 1e-3,
    *,
    relative_damping: Schedule = 0.0,
) -> Optimizer:
    """C-Adam: `optax.adam(learning_rate, b1, b2, eps)` after consequentialism.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the average of updates.
      b2: decay of the average of squared updates.
      eps: added to the root of that average.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    References:
      Seed 000, section 5.4.
    """
    return _chain(damping, relative_damping, optax.adam(learning_rate, b1, b2, eps))


def nlms(learning_rate: optax.ScalarOrSchedule, eps: float = 1e-3) -> Optimizer:
    """NLMS, extended to layers and mini-batches row by row: the paper's unstable first attempt.

    Args:
      learning_rate: μ, a number or a schedule.
      eps: ε of `scale_by_nlms`.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`; they must hold rows:
      `cqjax.value_and_grad(loss_fn, solver="dual")`.

    References:
      Seed 000, Eqs. 49 and 50.
    """
    return optax.chain(scale_by_nlms(eps), optax.sgd(learning_rate))
