"""Back-matching's layer-wise rates as a transformation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cqjax.back_matching.chain import ChainLayer
from cqjax.back_matching.rates import (
    PyTree,
    ValueFn,
    chain_rates,
    like,
    measured_factor,
    unit_rates,
)
from cqjax.back_matching.signals import signals
from cqjax.back_matching.units import back_matching_units
from cqjax.capture.captures import Captures
from cqjax.capture.checks import check_option
from cqjax.capture.plan import Plan
from cqjax.linalg import devices
from cqjax.linalg.gram import accumulator
from cqjax.solves.layers import is_masked
from cqjax.solves.matrices import finite

Factors = Literal["chain", "measured"]


class ScaleByBackMatchingState(NamedTuple):
    """State of `scale_by_back_matching`.

    Attributes:
      count: () int32, the number of updates so far.
      average: moving averages of the measured 1/m, for each layer with parameters: (), or (L,) for
        L layers that are scanned over. Empty for chains, as is the next.
      weight: what the averages are divided by, to make up for their start from zero; the same
        shapes.
      ignored: () int32, how many measurements were left out: not positive, or not finite.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    average: tuple[jax.Array, ...]
    weight: tuple[jax.Array, ...]
    ignored: jax.Array


def scale_by_back_matching(
    plan: Plan | Sequence[ChainLayer] | None = None,
    *,
    factors: Factors = "chain",
    refresh_every: int = 100,
    decay: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each layer the rate 1/(m s) that approximates back-matching propagation.

    Each update of a layer is multiplied by its rate: see `back_matching_rates`. Entries of the
    result that are not finite become zero. The paper found best to decay the weights before, and to
    apply momentum after it: `back_matching_sgd`.

    Args:
      plan: `cqjax.plan(loss_fn)(params, ...)`, for which shapes of arguments are enough; or the
        layers of a chain from the bottom to the top. Without it, `update` takes the keyword
        argument `captures`.
      factors: "chain" computes m from the weights, at each update, where each layer feeds one
        other. "measured" measures it, for any graph: `update` then takes the keyword argument
        `value_fn`, the loss of the batch as a function of the parameters alone. It is called, for
        two backward passes, in one of `refresh_every` updates.
      refresh_every: updates from one measurement to the next.
      decay: of the moving average of measurements of 1/m. One that is not positive and finite is
        left out, and counted. Before a layer's first one its m is 1.

    Returns:
      A transformation whose `update` takes `params`.

    Raises:
      ValueError: an argument is out of its range; in `update`, something is missing, or as
        `back_matching_rates`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x):
      ...     hidden = jax.nn.relu(x @ params["w1"])
      ...     return jnp.mean(((x + hidden) @ params["w2"]) ** 2)
      >>> params = {"w1": jnp.eye(3), "w2": jnp.full((3, 1), 0.5)}
      >>> x = jnp.ones((5, 3))
      >>> plan = cqjax.plan(loss_fn)(params, x)
      >>> tx = cqjax.scale_by_back_matching(plan, factors="measured")
      >>> state, grads = tx.init(params), jax.grad(loss_fn)(params, x)
      >>> updates, state = tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, x))
      >>> print(updates["w1"][0] / grads["w1"][0], updates["w2"][0] / grads["w2"][0])
      [4. 4. 4.] [1.]

    References:
      Zhang, Chen and Liu, Train feedforward neural network with layer-wise adaptive rate via
      approximating back-matching propagation, Algorithm 1 and section 3.2.
    """
    check_option(factors, ("chain", "measured"), "factors")
    if isinstance(refresh_every, int | float) and (refresh_every < 1 or refresh_every % 1):
        raise ValueError(f"refresh_every={refresh_every}: expected a whole number, one or more")
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: expected a number from 0 to below 1")
    if factors == "measured" and not isinstance(plan, Plan):
        raise ValueError(
            f'plan is a {type(plan).__name__}: factors="measured" needs plan=, made by '
            "cqjax.plan(loss_fn)(params, ...)"
        )
    measured = plan if factors == "measured" and isinstance(plan, Plan) else None

    def init(params: optax.Params) -> ScaleByBackMatchingState:
        dtype = accumulator(jnp.result_type(jnp.float32, *jax.tree.leaves(params)))

        def zeros() -> tuple[jax.Array, ...]:
            own_units = () if measured is None else back_matching_units(measured)
            return tuple(jnp.zeros(unit.stacked, dtype) for unit in own_units)

        return ScaleByBackMatchingState(
            jnp.zeros((), jnp.int32), zeros(), zeros(), jnp.zeros((), jnp.int32)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        captures: Captures | None = None,
        value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if plan is None and captures is None:
            raise ValueError(
                "scale_by_back_matching: no plan. Pass plan=cqjax.plan(loss_fn)(params, ...) to "
                "it, or captures= to update"
            )
        if params is None:
            raise ValueError(
                "scale_by_back_matching: no parameters; call update(grads, state, params)"
            )
        if measured is not None:
            state = _refreshed(state, measured, params, value_fn, refresh_every, decay)

        def scaled(updates: Any, captures: Any, params: Any, state: Any) -> optax.Updates:
            if measured is None:
                rates = chain_rates(captures if plan is None else plan, params)
            else:
                inverse = [
                    jnp.where(weight > 0, average / jnp.where(weight > 0, weight, 1), 1)
                    for average, weight in zip(state.average, state.weight, strict=True)
                ]
                rates = unit_rates(measured, inverse, measured=True)
            each = like(params, rates)
            return finite(jax.tree.map(lambda r, u: (r * u).astype(u.dtype), each, updates))

        updates = devices.automatic(scaled, updates, captures, params, state, like=updates)
        return updates, state._replace(count=jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def _refreshed(
    state: ScaleByBackMatchingState,
    plan: Plan,
    params: PyTree,
    value_fn: ValueFn | None,
    refresh_every: int,
    decay: float,
) -> ScaleByBackMatchingState:
    """The state with averages that a measurement has gone into, if one is due.

    Raises:
      ValueError: there is no loss to measure with, or parameters are masked.
    """
    if value_fn is None:
        raise ValueError(
            'scale_by_back_matching(factors="measured"): no loss to measure with. Call '
            "update(grads, state, params, value_fn=lambda params: loss_fn(params, ...))"
        )
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            'scale_by_back_matching(factors="measured"): some parameters are masked, and the loss '
            "needs all. Place it outside of the mask; skip= of cqjax.plan leaves some alone"
        )

    def measure() -> ScaleByBackMatchingState:
        average, weight, ignored = [], [], state.ignored
        of_layers = signals(value_fn, params, plan.flow)
        for unit, a, w in zip(back_matching_units(plan), state.average, state.weight, strict=True):
            new = measured_factor(unit, of_layers)
            good = jnp.isfinite(new) & (new > 0)
            average.append(jnp.where(good, decay * a + (1 - decay) * new, a).astype(a.dtype))
            weight.append(jnp.where(good, decay * w + (1 - decay), w).astype(w.dtype))
            ignored = ignored + jnp.sum(~good, dtype=jnp.int32)
        return state._replace(average=tuple(average), weight=tuple(weight), ignored=ignored)

    return lax.cond(state.count % refresh_every == 0, measure, lambda: state)
