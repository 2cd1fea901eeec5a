"""Statistics that outlive a batch: moving averages of XᵀX, and inverses that are kept."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cqjax.capture.block import Block
from cqjax.capture.captures import Capture
from cqjax.capture.plan import Plan
from cqjax.linalg import gram, ridge
from cqjax.transforms.incoming import Incoming, joint_bias, labelled, masked_paths
from cqjax.transforms.solves import Damping, primal_system

_Kept = TypeVar("_Kept")


class Moment(NamedTuple):
    """A moving average of XᵀX / N.

    Attributes:
      total: (B, d, d), or a lookup's diagonal (B, d): the sum of what came in, each times the share
        that is left of it.
      weight: (B,), the sum of these shares: the average is the quotient of the two.
    """

    total: jax.Array
    weight: jax.Array


def no_moments(plan: Plan, params: optax.Params) -> dict[str, Moment]:
    """Averages of nothing yet, for all weights but those masked or with too large an XᵀX."""
    moments = {}
    for label, block in _unmasked(plan, params).items():
        if not block.small("primal"):
            continue
        size = block.size("primal")
        square = () if block.solver == "diagonal" else (size,)
        total = jnp.zeros((block.batch, size, *square), _dtype(block))
        moments[label] = Moment(total, jnp.zeros(block.batch, _dtype(block)))
    return moments


def no_inverses(
    plan: Plan, params: optax.Params, update_every: int, averaged: bool
) -> dict[str, jax.Array]:
    """Identities for the weights of which an inverse is kept.

    It must be of use for other rows, and without averages cost less than a solve in each step.
    """
    masked, inverses = masked_paths(params, plan.blocks), {}
    for label, block in _unmasked(plan, params).items():
        useful = block.solver != "diagonal" and block.spans and block.small("primal")
        if useful and (averaged or _cheaper_kept(block, update_every)):
            size = block.features + joint_bias(block, masked)
            one = jnp.eye(size, dtype=_dtype(block))
            inverses[label] = jnp.broadcast_to(one, (block.batch, size, size))
    return inverses


def _unmasked(plan: Plan, params: optax.Params) -> dict[str, Block]:
    masked = masked_paths(params, plan.blocks)
    labels = zip(labelled(plan.blocks), plan.blocks, strict=True)
    return {label: block for label, block in labels if masked.isdisjoint(block.view.paths)}


def _dtype(block: Block) -> jnp.dtype:
    site = block.sites[0]
    return gram.accumulator((site.z if block.solver == "diagonal" else site.x)[1])


def _cheaper_kept(block: Block, update_every: int) -> bool:
    product = 2 * block.batch * block.size("primal") ** 2 * block.outputs
    renewed = block.flops("primal") - product
    return product + renewed / update_every < block.flops(block.solver)


def every(period: int | None, count: jax.Array, renew: Callable[[], _Kept], kept: _Kept) -> _Kept:
    """Something new in every so many updates, and the first; else what there is."""
    if period is None or period == 1:
        return renew()
    return lax.cond(count % period == 0, renew, lambda: kept)


def averaged(
    moments: Mapping[str, Moment],
    incoming: Incoming,
    decay: chex.Numeric,
    period: int | None,
    count: jax.Array,
) -> dict[str, Moment]:
    """The averages, every so often with this batch's moments; without those that are not finite.

    Where a batch does not span the features, each one enters.
    Each weight has a condition of its own, which XLA can take when its inputs are there: all in one
    would keep them till the end.
    """

    def added(average: Moment, capture: Capture) -> Moment:
        moment = capture.second_moment() / incoming.batch_size
        axes = tuple(range(1, moment.ndim))
        good = jnp.isfinite(moment).all(axes)
        total = jnp.where(
            jnp.expand_dims(good, axes), decay * average.total + (1 - decay) * moment, average.total
        )
        weight = jnp.where(good, decay * average.weight + (1 - decay), average.weight)
        return Moment(total.astype(average.total.dtype), weight.astype(average.weight.dtype))

    def maybe(label: str, average: Moment) -> Moment:
        capture = incoming.captures[label]
        due = period if capture.block.spans else 1
        return every(due, count, lambda: added(average, capture), average)

    return {label: maybe(label, average) for label, average in moments.items()}


def second_moment(moments: Mapping[str, Moment], incoming: Incoming, label: str) -> jax.Array:
    """A weight's XᵀX: N times its average, or the batch's where there is none."""
    if label not in moments:
        return incoming.captures[label].second_moment()
    total, weight = moments[label]
    axes = tuple(range(1, total.ndim))
    return incoming.batch_size * total / jnp.expand_dims(weight, axes)


def renewed(
    inverses: Mapping[str, jax.Array],
    moments: Mapping[str, Moment],
    incoming: Incoming,
    damping: Damping,
    period: int,
    count: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The inverses, every so often of what the moments are then; the old where there is none.

    Returns:
      The inverses, and (B,) bool, whether the attempt at one failed.
    """

    def system(label: str, old: jax.Array) -> jax.Array:
        xx = functools.partial(second_moment, moments, incoming, label)
        size = old.shape[-1]
        none = jnp.zeros_like(old)
        return every(period, count, lambda: xx()[:, :size, :size].astype(old.dtype), none)

    matrices = {label: system(label, old) for label, old in inverses.items()}

    def renew() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        systems = [
            primal_system(incoming, incoming.captures[label], damping, xx, label in moments)
            for label, xx in matrices.items()
        ]
        kept, repaired = {}, {}
        for (label, old), new in zip(inverses.items(), ridge.inverses(systems), strict=True):
            failed = jnp.expand_dims(new.failed, (1, 2))
            kept[label] = jnp.where(failed, old, new.value.astype(old.dtype))
            repaired[label] = new.repaired
        return kept, repaired

    never = {label: jnp.zeros(len(old), bool) for label, old in inverses.items()}
    return every(period, count, renew, (dict(inverses), never))


def check(
    moments: Mapping[str, Moment],
    inverses: Mapping[str, jax.Array],
    incoming: Incoming,
    averages: bool,
) -> None:
    """Refuses captures for which the state was not made.

    Raises:
      ValueError: names the weight, and what is wrong.
    """
    remedy = "make the plan with the same loss and arguments as cqjax.value_and_grad"
    kept = {label: average.total.shape for label, average in moments.items()}
    for label in {**moments, **inverses}:
        if label not in incoming.captures:
            raise ValueError(
                f"scale_by_consequentialism: the state has statistics of {label}, which was not "
                f"captured; {remedy}"
            )
    for label, capture in incoming.captures.items():
        if averages and capture.block.small("primal") and label not in moments:
            raise ValueError(
                f"scale_by_consequentialism: {label} was captured, but is not in the plan that the "
                f"state was made with; {remedy}"
            )
        block, shapes = capture.block, []
        if label in moments:
            size = block.size("primal")
            square = () if block.solver == "diagonal" else (size,)
            shapes.append((kept[label], (block.batch, size, *square)))
        if label in inverses:
            size = block.features + incoming.joint_bias(block)
            shapes.append((inverses[label].shape, (block.batch, size, size)))
        for got, expected in shapes:
            if got != expected:
                raise ValueError(
                    f"scale_by_consequentialism: the state has statistics of shape {got} for "
                    f"{label}; expected {expected}: {remedy}"
                )
