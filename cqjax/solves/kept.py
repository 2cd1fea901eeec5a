"""What is kept between steps: moving averages of XᵀX, and inverses.

Both come from other batches' rows. For a new batch they are of use only where a batch's rows span
the features (`Block.spans`). Of normal rows, λ = 1e-3 and n = 70 rows of d = 64
features, an inverse that was kept for five steps made updates of norm 450 to 780, and an average
that saw one in five batches of n = 8 rows made them 3e5, where the exact ones have norm 5 to 16. No
solve fails then. So such weights are solved for with each batch's own rows. So are weights that the
loss uses both ways, as XW and as DWᵀ.
"""

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
from cqjax.linalg import ridge
from cqjax.solves.layer import Layer, joint_bias
from cqjax.solves.layers import Layers, labelled, masked_paths
from cqjax.solves.matrices import along
from cqjax.solves.solve import Damping, primal_system

_T = TypeVar("_T")
_Side = TypeVar("_Side", Block, Capture)

GROWTH = 4
"""Times by which a kept inverse may grow, in the mean of its features, from one to the next. Of the
values tried, ten missed a batch of equal rows at λ = 0.1; four was never reached in 900 steps of
ordinary training. It may shrink by the square of this: features may grow fast at the start, but
one example with an input of 1e18 makes an inverse of nearly nothing."""


class Moment(NamedTuple):
    """A moving average of XᵀX / N. Divided by N, batches of different sizes can be mixed.

    Attributes:
      total: (B, d, d), or a lookup's diagonal (B, d): the weighted sum of what has entered.
      weight: (B,), the sum of these weights: the average is the quotient of the two.
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


class Renewed(NamedTuple):
    """What `update_inverses` makes, by label.

    Attributes:
      kept: the inverses to be kept.
      own: those for this batch, (B, d, d).
      failed: (B,) bool, whether the attempt at one failed.
    """

    kept: dict[str, Kept]
    own: dict[str, jax.Array]
    failed: dict[str, jax.Array]


def transposed(label: str) -> str:
    """The label of a weight's transpose."""
    return f"{label}ᵀ"


def sides(by_label: Mapping[str, _Side]) -> dict[str, _Side]:
    """Blocks or captures, and those of transposed weights (their `other`), by label."""
    result = dict(by_label)
    for label, side in by_label.items():
        if side.other is not None:
            result[transposed(label)] = side.other
    return result


def empty_moments(plan: Plan, params: optax.Params, both_sides: bool = False) -> dict[str, Moment]:
    """Averages of nothing yet, for all weights but those masked or with too large an XᵀX.

    Those that the loss uses both ways are among them if `both_sides` says so.
    """
    moments, blocks = {}, _unmasked(plan, params)
    if both_sides:
        blocks = sides(blocks)
    for label, block in blocks.items():
        if (both_sides or block.other is None) and block.small(block.by_moments().solver):
            total = jnp.zeros(block.moment_shape, block.dtype)
            moments[label] = Moment(total, jnp.zeros(block.batch, block.dtype))
    return moments


def empty_inverses(
    plan: Plan, params: optax.Params, update_every: int, averaged: bool
) -> dict[str, Kept]:
    """Identities for the weights of which an inverse is kept.

    It must be of use for other rows, and without averages cost less than a solve in each step.
    """
    masked, inverses = masked_paths(params, plan.blocks), {}
    for label, block in _unmasked(plan, params).items():
        useful = not block.statistic.diagonal and block.spans and block.small("primal")
        useful = useful and block.other is None and not block.view.made  # these need XᵀX itself
        if useful and (averaged or _cheaper_kept(block, update_every)):
            bias = block.bias is not None and not masked.isdisjoint(block.bias.view.paths)
            size = block.features + joint_bias(block, masked=bias)
            one = jnp.eye(size, dtype=block.dtype)
            identities = jnp.broadcast_to(one, (block.batch, size, size))
            none = jnp.zeros(block.batch, bool)
            inverses[label] = Kept(identities, none, ~none)
    return inverses


def _unmasked(plan: Plan, params: optax.Params) -> dict[str, Block]:
    masked = masked_paths(params, plan.blocks)
    labels = zip(labelled(plan.blocks), plan.blocks, strict=True)
    return {label: block for label, block in labels if masked.isdisjoint(block.view.paths)}


def _cheaper_kept(block: Block, update_every: int) -> bool:
    """Whether products with a kept inverse, renewed now and then, cost less than exact solves."""
    product = 2 * block.batch * block.size("primal") ** 2 * block.outputs
    renewal = block.flops("primal") - product
    return product + renewal / update_every < block.flops(block.solver)


def if_due(
    period: int | None,
    count: jax.Array,
    renew: Callable[[], _T],
    kept: _T,
    lacking: jax.Array | bool = False,
) -> _T:
    """A new value in one of `period` updates, or where there is none yet; else the kept one."""
    if period is None or period == 1:
        return renew()
    return lax.cond((count % period == 0) | lacking, renew, lambda: kept)


@jax.custom_batching.custom_vmap
def _any(flags: jax.Array) -> jax.Array:
    """Whether any flag is true; under `jax.vmap`, of any member.

    So a condition on it is the same for all members. `jax.lax.cond` then remains a branch, where it
    would become a selection that computes both sides.
    """
    return flags.any()


@_any.def_vmap
def _of_all_members(
    axis_size: int, in_batched: Sequence[bool], flags: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _any(flags), False


def update_moments(
    moments: Mapping[str, Moment],
    layers: Layers,
    decay: chex.Numeric,
    period: int | None,
    count: jax.Array,
) -> tuple[dict[str, Moment], dict[str, jax.Array]]:
    """The averages after this batch, if its turn has come. Moments that are not finite stay out.

    Where a batch does not span the features, every batch enters. So does each until one has.

    Returns:
      The averages, and (B,) bool, whether this batch's moments were left out though due.
    """

    def added(average: Moment, layer: Layer) -> tuple[Moment, jax.Array]:
        moment = layer.capture.second_moment() / layer.terms
        axes = tuple(range(1, moment.ndim))
        good = jnp.isfinite(moment).all(axes)
        total = jnp.where(
            jnp.expand_dims(good, axes), decay * average.total + (1 - decay) * moment, average.total
        )
        weight = jnp.where(good, decay * average.weight + (1 - decay), average.weight)
        new = Moment(total.astype(average.total.dtype), weight.astype(average.weight.dtype))
        return new, ~good

    # Each weight has a condition of its own, which XLA can take as soon as its inputs are there.
    # One for all of them would keep the inputs of all layers until the end: for ResNet-20 that took
    # 2.5 times SGD's temporary memory, and this takes 1.2.
    def maybe(label: str, average: Moment) -> tuple[Moment, jax.Array]:
        layer = layers[label]
        due = 1 if layer.few is True else period
        kept = average, jnp.zeros(len(average.weight), bool)
        lacking = _any((average.weight == 0) | layer.few)
        return if_due(due, count, lambda: added(average, layer), kept, lacking)

    results = {label: maybe(label, average) for label, average in moments.items()}
    return (
        {label: average for label, (average, _) in results.items()},
        {label: left_out for label, (_, left_out) in results.items()},
    )


def second_moment(moments: Mapping[str, Moment], layer: Layer) -> jax.Array:
    """A layer's XᵀX: N times its average, or the batch's where none is kept.

    As long as nothing has entered the average, it is infinite: the update is zero then.
    """
    if layer.label not in moments:
        return layer.capture.second_moment()
    total, weight = moments[layer.label]
    weight = jnp.expand_dims(weight, tuple(range(1, total.ndim)))
    return jnp.where(weight > 0, layer.terms * total / weight, jnp.inf)


def update_inverses(
    inverses: Mapping[str, Kept],
    moments: Mapping[str, Moment],
    layers: Layers,
    damping: Damping,
    period: int,
    count: jax.Array,
    spread_over: NamedSharding | None = None,
) -> Renewed:
    """The inverses, renewed if their turn has come; the old one where the new one fails.

    Until an attempt succeeds, there is one in each update. It fails, too, where the inverse has
    grown `GROWTH` times since the last, or shrunk by the square of that: a batch whose rows are all
    alike, or one of which is out of all proportion, says nothing of others. If the next attempt
    agrees, it is accepted.

    A batch with too few rows for the features has an inverse of its own, which is not kept; if its
    turn had come, it is the next batch's. Where tracing shows that the rows are too few, the weight
    is left to the solve without `update_every`.
    """
    due = count % period == 0
    unused = {
        label: old._replace(lacking=old.lacking | due)
        for label, old in inverses.items()
        if layers[label].few is True
    }
    used = {label: old for label, old in inverses.items() if label not in unused}
    few = {label: jnp.zeros_like(old.found) | layers[label].few for label, old in used.items()}
    wanted = {label: _any(old.lacking | few[label]) for label, old in used.items()}

    def matrix(label: str, old: jax.Array) -> jax.Array:
        layer = layers[label]

        def new() -> jax.Array:
            return layer.cropped(second_moment(moments, layer)).astype(old.dtype)

        return if_due(period, count, new, jnp.zeros_like(old), wanted[label])

    matrices = {label: matrix(label, old.inverse) for label, old in used.items()}

    def renew() -> Renewed:
        systems = [
            primal_system(layers[label], damping, xx, label in moments)
            for label, xx in matrices.items()
        ]
        kept, own, events = {}, {}, {}
        found = ridge.inverses(systems, spread_over)
        for (label, old), new in zip(used.items(), found, strict=True):
            value, unkept = new.value.astype(old.inverse.dtype), few[label]
            attempted = due | old.lacking
            failed = new.failed | (~old.lacking & _is_odd(new.value, old.inverse))
            replaces = along(attempted & ~unkept & ~(failed & old.found), value)
            kept[label] = Kept(
                jnp.where(replaces, value, old.inverse),
                old.found | (attempted & ~unkept & ~failed),
                jnp.where(attempted, failed | unkept, old.lacking),
            )
            events[label] = attempted & (new.repaired | failed)
            if layers[label].few is not False:
                own[label] = jnp.where(along(unkept, value), value, kept[label].inverse)
                events[label] = jnp.where(unkept, new.repaired, events[label])
        return Renewed(kept, own, events)

    same = {label: old.inverse for label, old in used.items() if layers[label].few is not False}
    never = {label: jnp.zeros_like(old.found) for label, old in used.items()}
    some = jnp.stack(list(wanted.values())).any() if wanted else False
    kept, own, events = if_due(period, count, renew, Renewed(used, same, never), some)
    for_batch = {label: new.inverse for label, new in kept.items()} | own
    return Renewed({label: {**kept, **unused}[label] for label in inverses}, for_batch, events)


def _is_odd(new: jax.Array, old: jax.Array) -> jax.Array:
    """Whether the diagonals of inverses have grown `GROWTH` times, or shrunk by its square: (B,).

    In the geometric mean: a few features that were always zero in one of two batches make no
    difference.
    """
    ratio = jnp.diagonal(new, axis1=1, axis2=2) / jnp.diagonal(old, axis1=1, axis2=2)
    change = jnp.log(ratio).mean(-1)
    return (change > math.log(GROWTH)) | (change < -2 * math.log(GROWTH))


def check(
    moments: Mapping[str, Moment],
    inverses: Mapping[str, Kept],
    layers: Layers,
    averages: bool,
) -> None:
    """Refuses captures for which the state was not made.

    Raises:
      ValueError: names the weight, and what is wrong.
    """
    remedy = "make the plan with the same loss and arguments as cqjax.value_and_grad"
    for label in {**moments, **inverses}:
        if label not in layers:
            raise ValueError(
                f"scale_by_consequentialism: the state has statistics of {label}, which was not "
                f"captured; {remedy}"
            )
    for label, layer in layers.items():
        kept = layer.block.other is None and layer.block.small("primal")
        if averages and kept and label not in moments:
            raise ValueError(
                f"scale_by_consequentialism: {label} was captured, but is not in the plan that the "
                f"state was made with; {remedy}"
            )
        shapes = []
        if label in moments:
            shapes.append((moments[label].total.shape, layer.block.moment_shape))
        if label in inverses:
            square = (layer.block.batch, layer.size, layer.size)
            shapes.append((inverses[label].inverse.shape, square))
        for got, expected in shapes:
            if got != expected:
                raise ValueError(
                    f"scale_by_consequentialism: the state has statistics of shape {got} for "
                    f"{label}; expected {expected}: {remedy}"
                )
