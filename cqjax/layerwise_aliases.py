"""Back-matching's optimizer, and those that the papers compare theirs with."""

from __future__ import annotations

from collections.abc import Sequence

import optax

from cqjax.back_matching.chain import ChainLayer
from cqjax.back_matching.transform import Factors, scale_by_back_matching
from cqjax.capture.checks import check_rate
from cqjax.capture.plan import Plan
from cqjax.transforms.layerwise_rates import scale_by_lsalr
from cqjax.transforms.nlms import scale_by_nlms

Optimizer = optax.GradientTransformationExtraArgs


def back_matching_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    *,
    plan: Plan | Sequence[ChainLayer] | None = None,
    factors: Factors = "chain",
    refresh_every: int = 100,
    decay: float = 0.9,
) -> Optimizer:
    """Momentum SGD with back-matching's layer-wise rates, in the order that the paper found best.

    Weight decay comes first, so that each layer's rate applies to the decay too. Then come the
    rates, and then momentum.

    Args:
      learning_rate: a number or a schedule. It is a fraction of SGD's, since the layers' rates are
        relative to the top layer's: for LeNet on CIFAR-10 the paper has 0.02, and 0.1 for SGD.
      momentum: decay of the accumulated update; None for none.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: the multiple of the weights that is added to their gradient (the paper: 5e-4).
      plan: as for `scale_by_back_matching`; so are the arguments below.
      factors: "chain" or "measured".
      refresh_every: the number of updates from one measurement to the next.
      decay: that of the measurements' moving average.

    Returns:
      A transformation whose `update` takes `params`. Without a plan it also takes `captures`, and
      with measured factors `value_fn`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((jax.nn.relu(x @ params["w1"]) @ params["w2"] - y) ** 2)
      >>> params = {"w1": jnp.eye(2), "w2": jnp.array([[0.1], [0.1]])}
      >>> x, y = jnp.eye(2), jnp.ones((2, 1))
      >>> tx = cqjax.back_matching_sgd(0.05, plan=cqjax.plan(loss_fn)(params, x, y))
      >>> state = tx.init(params)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{loss_fn(params, x, y):.1f}")
      0.0

    References:
      Zhang, Chen and Liu (2018), Algorithm 1, sections 3.2 and 4.1.
    """
    check_rate(learning_rate, "learning_rate")
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        scale_by_back_matching(plan, factors=factors, refresh_every=refresh_every, decay=decay),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def lsalr(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
) -> Optimizer:
    """Momentum SGD with the layer-specific adaptive rates (LSALR) of Singh et al.

    It has the settings with which Zhang, Chen and Liu compare their method. Weight decay comes
    first: it is part of the gradient whose norm sets a layer's rate, and that rate applies to it.

    Args:
      learning_rate: η, a number or a schedule (Zhang, Chen and Liu: 0.1; Singh et al.: 0.006).
      momentum: decay of the accumulated update; None for none.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: the multiple of the weights that is added to their gradient.

    Returns:
      A transformation whose `update` takes `params`.

    Examples:
      >>> import cqjax, jax.numpy as jnp
      >>> grads = {"near": jnp.array([3.0, 4.0]), "far": jnp.array([3e-6, 4e-6])}
      >>> tx = cqjax.lsalr(0.1, momentum=None, weight_decay=0.0)
      >>> updates, _ = tx.update(grads, tx.init(grads), grads)
      >>> for layer in grads:
      ...     print(layer, f"{-(updates[layer] / grads[layer])[0]:.3f}")
      near 0.118
      far 1.321

    References:
      Singh et al. (2015). Zhang, Chen and Liu (2018), section 4.1.
    """
    check_rate(learning_rate, "learning_rate")
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        scale_by_lsalr(),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def nlms(learning_rate: optax.ScalarOrSchedule, eps: float = 1e-3) -> Optimizer:
    """NLMS (normalised least mean squares), extended to layers and mini-batches row by row.

    This is the first attempt of Paeedeh and Ghiasi-Shirazi, who show that it is unstable. On one
    example, each step multiplies the error by 1 - μ: from μ = 2 on, it grows without end. In a
    batch it may do so at a smaller rate, by as much as rows are alike: n equal rows act like a rate
    of nμ. `optax.chain(cqjax.nlms(0.1), cqjax.clip_by_output_change())` has a bound.

    Args:
      learning_rate: μ < 2, a number or a schedule.
      eps: ε of `scale_by_nlms`.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`. The captures must hold
      rows, as those of `cqjax.value_and_grad(loss_fn, capture=cqjax.Rows)` do.

    Raises:
      ValueError: the rate is a number from 2 on.

    References:
      Paeedeh and Ghiasi-Shirazi (2020), Eqs. 49 and 50.
    """
    check_rate(learning_rate, "learning_rate")
    if isinstance(learning_rate, int | float) and learning_rate >= 2:
        raise ValueError(
            f"nlms: learning_rate={learning_rate}: expected less than 2, since each step "
            "multiplies an example's error by 1 minus the rate"
        )
    return optax.chain(scale_by_nlms(eps), optax.sgd(learning_rate))
