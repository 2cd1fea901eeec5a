"""The papers' optimizers, as chains of a transformation of cqjax and one of Optax's rules."""

from __future__ import annotations

import optax

from cqjax import chains
from cqjax.capture.plan import Plan
from cqjax.chains import Mask, Optimizer
from cqjax.transforms.consequentialism import Schedule


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
    solve = chains.solve(damping, relative_damping, plan, update_every, ema_decay)
    # Consequentialism comes first, since it is cheapest for the gradient itself.
    before, rule = chains.limit(max_change, times=20), optax.scale_by_adam(b1, b2, eps)
    step = chains.step(learning_rate, max_change, uncovered_learning_rate)
    return optax.chain(solve, *before, rule, *chains.decay(weight_decay, mask), *step)


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
    solve = chains.solve(damping, relative_damping, plan, update_every, ema_decay)
    rule = [*chains.limit(max_change, learning_rate), *chains.decay(weight_decay, mask)]
    return optax.chain(solve, *rule, *chains.step(learning_rate, None))


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
    solve = chains.solve(damping, relative_damping, plan, update_every, ema_decay)
    acting = learning_rate if max_change is None else chains.accumulated(learning_rate, momentum)
    before, rule = chains.limit(max_change, acting), optax.trace(momentum)
    step = chains.step(learning_rate, max_change, times=1.5)
    return optax.chain(solve, *before, rule, *chains.decay(weight_decay, mask), *step)


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
    solve = chains.solve(damping, relative_damping, plan, update_every, ema_decay)
    acting = learning_rate if max_change is None else chains.accumulated(learning_rate, momentum)
    before, rule = chains.limit(max_change, acting), optax.trace(momentum, nesterov=True)
    step = chains.step(learning_rate, max_change, times=1.5)
    return optax.chain(solve, *before, rule, *chains.decay(weight_decay, mask), *step)


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
    solve = chains.solve(damping, relative_damping, plan, update_every, ema_decay)
    before, rule = chains.limit(max_change, times=20), optax.scale_by_rms(decay, eps)
    step = chains.step(learning_rate, max_change)
    return optax.chain(solve, *before, rule, *chains.decay(weight_decay, mask), *step)
