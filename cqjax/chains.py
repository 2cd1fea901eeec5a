"""What the optimizers of `cqjax.aliases` have in common: the parts of their chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cqjax.capture.checks import check_rate
from cqjax.capture.plan import Plan
from cqjax.transforms.clip_by_output_change import clip_by_output_change
from cqjax.transforms.consequentialism import Schedule, scale_by_consequentialism
from cqjax.transforms.learning_rates import scale_by_learning_rates

Optimizer = optax.GradientTransformationExtraArgs
Mask = optax.Params | Callable[[optax.Params], Any] | None
Rule = optax.GradientTransformation
Rate = optax.ScalarOrSchedule


def solve(
    damping: Schedule,
    relative_damping: Schedule,
    plan: Plan | None,
    update_every: int | None,
    ema_decay: float | None,
) -> Optimizer:
    """Consequentialism, with the options that the optimizers have."""
    return scale_by_consequentialism(
        damping=damping,
        relative_damping=relative_damping,
        plan=plan,
        update_every=update_every,
        ema_decay=ema_decay,
    )


def decay(weight_decay: Any, mask: Mask) -> list[Rule]:
    """Decoupled weight decay, if there is any. A traced number may be some."""
    check_rate(weight_decay, "weight_decay")
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    return [] if none else [optax.add_decayed_weights(weight_decay, mask)]


def limit(max_change: float | None, rate: Rate = 1.0, times: float = 1.0) -> list[Rule]:
    """So many times the trust region, if there is one, for updates taken at this rate.

    There is one before a rule with a memory, too, since what it takes in stays: Adam takes 80,000
    steps to forget one update of 1e18. And a rate that is too high multiplies what momentum has
    taken in.
    """
    if max_change is None:
        return []
    return [clip_by_output_change(times * max_change, learning_rate=rate)]


def step(
    learning_rate: Rate, max_change: float | None, uncovered: Rate | None = None, times: float = 1
) -> list[Rule]:
    """What ends a chain: minus the rate, that of uncovered parameters if it is another, a limit.

    The limit comes first where it can: after the rate, XLA would compute a scaled copy of each
    update for it.
    """
    check_rate(learning_rate, "learning_rate")
    if uncovered is None:
        rate = learning_rate if max_change is None else _finite(learning_rate)
        rates = optax.scale_by_learning_rate(rate)
        return [*limit(max_change, learning_rate, times), rates]
    check_rate(uncovered, "uncovered_learning_rate")
    return [scale_by_learning_rates(learning_rate, uncovered), *limit(max_change, times=times)]


def _finite(rate: Any) -> Any:
    """The rate, or zero where it is not finite: the limit has made such a step zero."""
    if callable(rate):
        return lambda count: _finite(rate(count))
    return jnp.where(jnp.isfinite(rate), rate, 0) if isinstance(rate, jax.Array) else rate


def accumulated(learning_rate: Rate, momentum: Any) -> Rate:
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
