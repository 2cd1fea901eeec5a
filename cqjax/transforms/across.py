"""Statistics that outlive a batch: moving averages of XᵀX, and inverses that are kept."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from cqjax.capture.block import Block
from cqjax.capture.captures import Capture
from cqjax.capture.plan import Plan
from cqjax.linalg import gram, ridge
from cqjax.transforms.incoming import Incoming, joint_bias, labelled, masked_paths
from cqjax.transforms.solves import Damping, primal_system

_T = TypeVar("_T")

GROWTH = 4
"""Times by which a kept inverse may grow, in the mean of its features, from one to the next."""


class Moment(NamedTuple):
    """A moving average of XᵀX / N.

    Attributes:
      total: (B, d, d), or a lookup's diagonal (B, d): the sum of what came in, each times the share
        that is left of it.
      weight: (B,), the sum of these shares: the average is the quotient of the two.
    """

    total: jax.Array
    weight: jax.Array


class Kept(NamedTuple):
    """A kept inverse.

    Attributes:
      inverse: N (XᵀX + λI)⁻¹, (B, d, d), or what the failed attempts have left in its place.
      found: (B,) bool, whether there has been one.
      lacking: (B,) bool, whether the last attempt at one failed: the next update makes another.
    """

    inverse: jax.Array
    found: jax.Array
    lacking: jax.Array


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
) -> dict[str, Kept]:
    """Identities for the weights of which an inverse is kept.

    It must be of use for other rows, and without averages cost less than a solve in each step.
    """
    masked, inverses = masked_paths(params, plan.blocks), {}
    for label, block in _unmasked(plan, params).items():
        useful = block.solver != "diagonal" and block.spans and block.small("primal")
        if useful and (averaged or _cheaper_kept(block, update_every)):
            size = block.features + joint_bias(block, masked)
            one = jnp.eye(size, dtype=_dtype(block))
            identities = jnp.broadcast_to(one, (block.batch, size, size))
            none = jnp.zeros(block.batch, bool)
            inverses[label] = Kept(identities, none, ~none)
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


def every(
    period: int | None,
    count: jax.Array,
    renew: Callable[[], _T],
    kept: _T,
    lacking: jax.Array | bool = False,
) -> _T:
    """Something new in every so many updates, the first, and where it is lacking; else the old."""
    if period is None or period == 1:
        return renew()
    return lax.cond((count % period == 0) | lacking, renew, lambda: kept)


@jax.custom_batching.custom_vmap
def _anything(flags: jax.Array) -> jax.Array:
    """Whether any is true: under `jax.vmap` of any member, so that a condition remains one."""
    return flags.any()


@_anything.def_vmap
def _of_all_members(
    axis_size: int, in_batched: Sequence[bool], flags: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _anything(flags), False


def averaged(
    moments: Mapping[str, Moment],
    incoming: Incoming,
    decay: chex.Numeric,
    period: int | None,
    count: jax.Array,
) -> tuple[dict[str, Moment], dict[str, jax.Array]]:
    """The averages, every so often with this batch's moments; without those that are not finite.

    Where a batch does not span the features, each one enters; so it does as long as there is none.
    Each weight has a condition of its own, which XLA can take when its inputs are there: all in one
    would keep them till the end.

    Returns:
      The averages, and (B,) bool, whether this batch's moments were left out though due.
    """

    def added(average: Moment, capture: Capture) -> tuple[Moment, jax.Array]:
        moment = capture.second_moment() / incoming.terms(capture.block)
        axes = tuple(range(1, moment.ndim))
        good = jnp.isfinite(moment).all(axes)
        total = jnp.where(
            jnp.expand_dims(good, axes), decay * average.total + (1 - decay) * moment, average.total
        )
        weight = jnp.where(good, decay * average.weight + (1 - decay), average.weight)
        new = Moment(total.astype(average.total.dtype), weight.astype(average.weight.dtype))
        return new, ~good

    def maybe(label: str, average: Moment) -> tuple[Moment, jax.Array]:
        capture = incoming.captures[label]
        due = period if capture.block.spans else 1
        kept = average, jnp.zeros(len(average.weight), bool)
        lacking = _anything(average.weight == 0)
        return every(due, count, lambda: added(average, capture), kept, lacking)

    results = {label: maybe(label, average) for label, average in moments.items()}
    return (
        {label: average for label, (average, _) in results.items()},
        {label: left_out for label, (_, left_out) in results.items()},
    )


def second_moment(moments: Mapping[str, Moment], incoming: Incoming, label: str) -> jax.Array:
    """A weight's XᵀX: N times its average, or the batch's where none is kept.

    As long as nothing has entered the average, it is infinite: the update is zero then.
    """
    if label not in moments:
        return incoming.captures[label].second_moment()
    total, weight = moments[label]
    weight = jnp.expand_dims(weight, tuple(range(1, total.ndim)))
    return jnp.where(
        weight > 0, incoming.terms(incoming.captures[label].block) * total / weight, jnp.inf
    )


def renewed(
    inverses: Mapping[str, Kept],
    moments: Mapping[str, Moment],
    incoming: Incoming,
    damping: Damping,
    period: int,
    count: jax.Array,
    spread_over: NamedSharding | None = None,
) -> tuple[dict[str, Kept], dict[str, jax.Array]]:
    """The inverses, every so often of what the moments are then; the old where there is none.

    Until an attempt succeeds, there is one in each update. It fails, too, where the inverse has
    grown `GROWTH` times since the last: a batch whose rows are all alike says nothing of others.
    If the next one says the same, it is believed.

    Returns:
      The inverses, and (B,) bool, whether the attempt at one failed.
    """
    lacking = {label: _anything(old.lacking) for label, old in inverses.items()}

    def system(label: str, old: jax.Array) -> jax.Array:
        xx = functools.partial(second_moment, moments, incoming, label)
        size = old.shape[-1]
        none = jnp.zeros_like(old)

        def new() -> jax.Array:
            return xx()[:, :size, :size].astype(old.dtype)

        return every(period, count, new, none, lacking[label])

    matrices = {label: system(label, old.inverse) for label, old in inverses.items()}

    def renew() -> tuple[dict[str, Kept], dict[str, jax.Array]]:
        systems = [
            primal_system(incoming, incoming.captures[label], damping, xx, label in moments)
            for label, xx in matrices.items()
        ]
        kept, repaired = {}, {}
        found = ridge.inverses(systems, spread_over)
        for (label, old), new in zip(inverses.items(), found, strict=True):
            attempted = (count % period == 0) | old.lacking
            failed = new.failed | (~old.lacking & _grown(new.value, old.inverse))
            taken = jnp.expand_dims(attempted & ~(failed & old.found), (1, 2))
            kept[label] = Kept(
                jnp.where(taken, new.value.astype(old.inverse.dtype), old.inverse),
                old.found | (attempted & ~failed),
                jnp.where(attempted, failed, old.lacking),
            )
            repaired[label] = attempted & (new.repaired | failed)
        return kept, repaired

    never = {label: jnp.zeros_like(old.found) for label, old in inverses.items()}
    anything = jnp.stack(list(lacking.values())).any() if lacking else False
    return every(period, count, renew, (dict(inverses), never), anything)


def _grown(new: jax.Array, old: jax.Array) -> jax.Array:
    """Whether the diagonals of inverses have grown `GROWTH` times, in the geometric mean: (B,).

    A few features that were always zero in one of two batches make no difference.
    """
    ratio = jnp.diagonal(new, axis1=1, axis2=2) / jnp.diagonal(old, axis1=1, axis2=2)
    return jnp.log(ratio).mean(-1) > math.log(GROWTH)


def check(
    moments: Mapping[str, Moment],
    inverses: Mapping[str, Kept],
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
            shapes.append((inverses[label].inverse.shape, (block.batch, size, size)))
        for got, expected in shapes:
            if got != expected:
                raise ValueError(
                    f"scale_by_consequentialism: the state has statistics of shape {got} for "
                    f"{label}; expected {expected}: {remedy}"
                )
