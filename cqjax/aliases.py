"""The papers' optimizers, as chains of a transformation of cqjax and one of Optax's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from cqjax.capture.checks import check_rate
from cqjax.capture.plan import Plan
from cqjax.transforms.clip_by_output_change import clip_by_output_change
from cqjax.transforms.consequentialism import Schedule, scale_by_consequentialism
from cqjax.transforms.learning_rates import scale_by_learning_rates

Optimizer = optax.GradientTransformationExtraArgs
Mask = optax.Params | Callable[[optax.Params], Any] | None
_Rule = optax.GradientTransformation
_Rate = optax.ScalarOrSchedule


def cadam(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask = None,
    uncovered_learning_rate: optax.ScalarOrSchedule | None = None,
    damping: Schedule = 0.0,
    relative_damping: Schedule = 0.1,
    max_change: float | None = 0.5,
    plan: Plan | None = None,
    update_every: int | None = None,
    ema_decay: float | None = None,
) -> Optimizer:
    """C-Adam: Adam after consequentialism. It is the one to try first.

    `scale_by_consequentialism` makes of each layer's gradient the update that moves the layer's
    outputs where the loss wants them. `optax.scale_by_adam` averages these updates, and divides
    them by the root of their mean square. What is not covered, such as the scales of normalisation
    layers, gets plain Adam. Adam takes in at most what would move a layer by 20 `max_change`.

    Args:
      learning_rate: a number or a schedule. In docs/choosing.md 0.01 is the best rate, or near it,
        for most networks.
      b1: decay of the average of updates.
      b2: decay of the average of squared updates.
      eps: added to the root of that average.
      weight_decay: the multiple of the weights that is added to the update before the rate, as in
        `optax.adamw`. It is not preconditioned.
      mask: which parameters decay, as in `optax.adamw`.
      uncovered_learning_rate: the rate of the parameters that are not covered, a number or a
        schedule. None for `learning_rate`.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.
      max_change: the part of their root mean square by which the outputs of a layer may move in one
        step, as `clip_by_output_change` measures it; None for no limit.
      plan: as in `scale_by_consequentialism`, which needs it for the two options below.
      update_every: updates from one inversion to the next, as in `scale_by_consequentialism`.
      ema_decay: decay of an average of XᵀX, as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the parameters and the keyword argument `captures`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2)
      >>> k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
      >>> params = {"w1": jax.random.normal(k1, (4, 16)), "w2": jax.random.normal(k2, (16, 1)) / 4}
      >>> x = jax.random.normal(k3, (64, 4))
      >>> y = jnp.sin(x[:, :1])
      >>> tx = cqjax.cadam()
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
      ...     updates, state = tx.update(grads, state, params, captures=captures)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     params, state, loss = step(params, state)
      >>> print(loss < 0.02)
      True

    References:
      Paeedeh and Ghiasi-Shirazi (2020), section 5.4. Kingma and Ba, Adam: a method for stochastic
      optimization (2015).
    """
    solve = _solve(damping, relative_damping, plan, update_every, ema_decay)
    # Consequentialism comes first, since it is cheapest for the gradient itself.
    before, rule = _limit(max_change, times=20), optax.scale_by_adam(b1, b2, eps)
    step = _step(learning_rate, max_change, uncovered_learning_rate)
    return optax.chain(solve, *before, rule, *_decay(weight_decay, mask), *step)


def csgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    mask: Mask = None,
    damping: Schedule = 0.0,
    relative_damping: Schedule = 0.1,
    max_change: float | None = 0.1,
    plan: Plan | None = None,
    update_every: int | None = None,
    ema_decay: float | None = None,
) -> Optimizer:
    r"""C-SGD: stochastic gradient descent with consequentialism, :math:`W \leftarrow W - \mu U`.

    U is the update of `scale_by_consequentialism`. It aims at each example's *virtual error*: for a
    row of a layer's output, N times the loss's gradient with respect to it, where N is the number
    of terms that the loss averages over. That is how much the example's own loss asks the output to
    move. The method is at its best in fully-connected layers with fewer rows than features.

    Args:
      learning_rate: μ, the fraction of each example's virtual error that a step removes from a
        layer's outputs; a number or a schedule.
      weight_decay: the multiple of the weights that is added to the update before the rate. It is
        neither preconditioned nor, with momentum, accumulated.
      mask: which parameters decay, as in `optax.adamw`.
      damping: λ of `scale_by_consequentialism`. The paper's 1e-3, for inputs in [0, 1], is
        `damping=1e-3, relative_damping=0.0`.
      relative_damping: as in `scale_by_consequentialism`.
      max_change: the part of their root mean square by which the outputs of a layer may move in one
        step, as `clip_by_output_change` measures it; None for no limit.
      plan: as in `scale_by_consequentialism`, which needs it for the two options below.
      update_every: updates from one inversion to the next, as in `scale_by_consequentialism`.
      ema_decay: decay of an average of XᵀX, as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the parameters and the keyword argument `captures`.

    Examples:
      >>> import cqjax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> x, y = jnp.eye(2, 3), jnp.array([[4.0], [8.0]])
      >>> tx = cqjax.csgd(0.5, relative_damping=0.0, max_change=None)
      >>> state = tx.init(params)
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
      >>> updates, state = tx.update(grads, state, params, captures=captures)
      >>> print((x @ optax.apply_updates(params, updates)["w"]).ravel())
      [2. 4.]

    References:
      Paeedeh and Ghiasi-Shirazi (2020), Eq. 63 and section 5.
    """
    solve = _solve(damping, relative_damping, plan, update_every, ema_decay)
    rule = [*_limit(max_change, learning_rate), *_decay(weight_decay, mask)]
    return optax.chain(solve, *rule, *_step(learning_rate, None))


def cmomentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    mask: Mask = None,
    damping: Schedule = 0.0,
    relative_damping: Schedule = 0.1,
    max_change: float | None = 0.1,
    plan: Plan | None = None,
    update_every: int | None = None,
    ema_decay: float | None = None,
) -> Optimizer:
    """C-SGD with momentum: `optax.trace` after consequentialism.

    With momentum β, an update that repeats adds up to 1 / (1 − β) times itself. So the rate that
    acts is μ / (1 − β): ten times μ by default. The limit `max_change` is for this rate; the
    step that is taken has one that is half as wide again.

    Args:
      learning_rate: μ, a number or a schedule.
      momentum: β, decay of the accumulated update.
      weight_decay: as in `csgd`; so are `mask` and all that follows.
      mask: which parameters decay.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.
      max_change: of `clip_by_output_change`; None for no limit.
      plan: as in `scale_by_consequentialism`.
      update_every: as in `scale_by_consequentialism`.
      ema_decay: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the parameters and the keyword argument `captures`.

    References:
      Paeedeh and Ghiasi-Shirazi (2020), section 5.4.
    """
    solve = _solve(damping, relative_damping, plan, update_every, ema_decay)
    acting = learning_rate if max_change is None else _accumulated(learning_rate, momentum)
    before, rule = _limit(max_change, acting), optax.trace(momentum)
    step = _step(learning_rate, max_change, times=1.5)
    return optax.chain(solve, *before, rule, *_decay(weight_decay, mask), *step)


def cnesterov(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    mask: Mask = None,
    damping: Schedule = 0.0,
    relative_damping: Schedule = 0.1,
    max_change: float | None = 0.1,
    plan: Plan | None = None,
    update_every: int | None = None,
    ema_decay: float | None = None,
) -> Optimizer:
    """C-Nesterov: `optax.trace` with Nesterov's momentum after consequentialism.

    With momentum β, an update that repeats adds up to 1 / (1 − β) times itself. So the rate that
    acts is μ / (1 − β): ten times μ by default. The limit `max_change` is for this rate; the
    step that is taken has one that is half as wide again.

    Args:
      learning_rate: μ, a number or a schedule.
      momentum: β, decay of the accumulated update (the paper's experiments use 0.95).
      weight_decay: as in `csgd`; so are `mask` and all that follows.
      mask: which parameters decay.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.
      max_change: of `clip_by_output_change`; None for no limit.
      plan: as in `scale_by_consequentialism`.
      update_every: as in `scale_by_consequentialism`.
      ema_decay: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the parameters and the keyword argument `captures`.

    References:
      Paeedeh and Ghiasi-Shirazi (2020), section 5.4.
    """
    solve = _solve(damping, relative_damping, plan, update_every, ema_decay)
    acting = learning_rate if max_change is None else _accumulated(learning_rate, momentum)
    before, rule = _limit(max_change, acting), optax.trace(momentum, nesterov=True)
    step = _step(learning_rate, max_change, times=1.5)
    return optax.chain(solve, *before, rule, *_decay(weight_decay, mask), *step)


def crmsprop(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.9,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask = None,
    damping: Schedule = 0.0,
    relative_damping: Schedule = 0.1,
    max_change: float | None = 0.5,
    plan: Plan | None = None,
    update_every: int | None = None,
    ema_decay: float | None = None,
) -> Optimizer:
    """C-RMSProp: `optax.scale_by_rms(decay, eps)` after consequentialism.

    Args:
      learning_rate: a number or a schedule.
      decay: of the average of squared updates.
      eps: added to the root of that average.
      weight_decay: as in `csgd`; so are `mask` and all that follows.
      mask: which parameters decay.
      damping: λ of `scale_by_consequentialism`.
      relative_damping: as in `scale_by_consequentialism`.
      max_change: of `clip_by_output_change`; None for no limit.
      plan: as in `scale_by_consequentialism`.
      update_every: as in `scale_by_consequentialism`.
      ema_decay: as in `scale_by_consequentialism`.

    Returns:
      A transformation whose `update` takes the parameters and the keyword argument `captures`.

    References:
      Paeedeh and Ghiasi-Shirazi (2020), abstract and section 5.
    """
    solve = _solve(damping, relative_damping, plan, update_every, ema_decay)
    before, rule = _limit(max_change, times=20), optax.scale_by_rms(decay, eps)
    step = _step(learning_rate, max_change)
    return optax.chain(solve, *before, rule, *_decay(weight_decay, mask), *step)


def _solve(
    damping: Schedule,
    relative_damping: Schedule,
    plan: Plan | None,
    update_every: int | None,
    ema_decay: float | None,
) -> Optimizer:
    return scale_by_consequentialism(
        damping=damping,
        relative_damping=relative_damping,
        plan=plan,
        update_every=update_every,
        ema_decay=ema_decay,
    )


def _decay(weight_decay: Any, mask: Mask) -> list[_Rule]:
    """Decoupled weight decay, if there is any. A traced number may be some."""
    check_rate(weight_decay, "weight_decay")
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    return [] if none else [optax.add_decayed_weights(weight_decay, mask)]


def _limit(max_change: float | None, rate: _Rate = 1.0, times: float = 1.0) -> list[_Rule]:
    """So many times the trust region, if there is one, for updates taken at this rate.

    There is one before a rule with a memory, too, since what it takes in stays: Adam takes 80,000
    steps to forget one update of 1e18. And a rate that is too high multiplies what momentum has
    taken in.
    """
    if max_change is None:
        return []
    return [clip_by_output_change(times * max_change, learning_rate=rate)]


def _step(
    learning_rate: _Rate, max_change: float | None, uncovered: _Rate | None = None, times: float = 1
) -> list[_Rule]:
    """What ends a chain: minus the rate, that of uncovered parameters if it is another, a limit.

    The limit comes first where it can: after the rate, XLA would compute a scaled copy of each
    update for it.
    """
    check_rate(learning_rate, "learning_rate")
    if uncovered is None:
        rates = optax.scale_by_learning_rate(learning_rate)
        return [*_limit(max_change, learning_rate, times), rates]
    check_rate(uncovered, "uncovered_learning_rate")
    return [scale_by_learning_rates(learning_rate, uncovered), *_limit(max_change, times=times)]


def _accumulated(learning_rate: _Rate, momentum: Any) -> _Rate:
    """The rate at which an update acts that momentum repeats.

    Raises:
      ValueError: without end, it has none.
    """
    check_rate(learning_rate, "learning_rate")
    if isinstance(momentum, int | float) and momentum >= 1:
        raise ValueError(
            f"momentum={momentum}: expected less than 1, since updates then add up without end, "
            "and max_change bounds what they add up to; or pass max_change=None"
        )
    if callable(learning_rate):
        return lambda count: learning_rate(count) / (1 - momentum)
    return learning_rate / (1 - momentum)
