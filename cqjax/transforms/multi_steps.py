"""Microbatches in separate calls: gradients and second moments are added up to a whole batch's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cqjax.capture.block import Block
from cqjax.capture.captures import Capture, Captures
from cqjax.capture.checks import check_positive
from cqjax.capture.outputs import Moment
from cqjax.capture.plan import Plan, check_plan
from cqjax.capture.statistics import Rows
from cqjax.linalg.gram import accumulator
from cqjax.program.paths import by_path
from cqjax.solves import foreign, kept
from cqjax.solves.automatic import with_automatic_axes
from cqjax.solves.layers import Layers, labelled


class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
      mini_step: () int32, the microbatches since the last update: 0 just after one.
      gradient_step: () int32, the updates of `inner` so far.
      inner_state: the state of `inner`.
      gradients: the mean gradient of these microbatches, in at least float32.
      moments: the sum of each weight's XᵀX over them, (B, d, d), or a lookup's counts, (B, d);
        their mean for rows that all examples share, which are a whole batch's too.
      rows: likewise, how many of each weight's rows were examples, () or (B,) for groups.
      batch_size: (), the sum of their N.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_state: Any
    gradients: optax.Updates
    moments: dict[str, jax.Array]
    rows: dict[str, jax.Array]
    batch_size: jax.Array


def multi_steps(
    inner: optax.GradientTransformation, every_k: int, *, plan: Plan
) -> optax.GradientTransformationExtraArgs:
    r"""Updates once in `every_k` calls, as if their batches were one.

    `optax.MultiSteps` accumulates gradients; this accumulates second moments too. Microbatch i has
    a layer's rows :math:`X_i`, its gradient :math:`G_i` and :math:`N_i` terms. Only the last of
    `every_k` calls calls the inner transformation, with

    .. math::
      G = \frac{\sum_i N_i G_i}{N}, \quad X^T X = \sum_i X_i^T X_i, \quad N = \sum_i N_i,

    which are the whole batch's. The other calls return zeros. Microbatches may have different
    sizes. (`optax.MultiSteps` passes on the captures of the last microbatch alone: that is
    :math:`N_k (X_k^T X_k + \lambda I)^{-1} G`, which is wrong by as much as the last microbatch's
    rows differ from the others'.)

    With `loss_reduction="sum"`, a parameter without a solve gets the mean of the microbatches'
    gradients, and one with a solve gets the update of the sum.

    `inner` may be, or contain, everything that computes from :math:`X^T X` or from layers' rates.
    `update_every` and `ema_decay` then count updates, not calls. The solves are by the primal. What
    needs rows (`scale_by_nlms`) is refused: for it, put the microbatches into a `jax.lax.scan`
    within the loss, from which rows are captured. Other extra arguments are those of the last call
    alone: a line search's `value` and `value_fn` would not be the whole batch's.

    Args:
      inner: the transformation.
      every_k: how many microbatches make one batch.
      plan: what will be captured of a whole batch: `cqjax.plan` of the same loss and options as
        `cqjax.value_and_grad`, with arguments (shapes are enough) of the whole batch's size.
        Members of `inner` that keep statistics between updates have the same plan.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    Raises:
      ValueError: `every_k` is no positive integer; the plan has a weight whose XᵀX is too large; in
        `update`, there are no captures, they belong to other parameters or another plan, or the
        batch size is unknown; a member of `inner` needs rows.
      TypeError: the plan, or in `update` `captures`, is something else.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> x = jnp.array([[3.0, 1.0], [1.0, 2.0], [0.0, 1.0], [2.0, 0.0]])
      >>> y = x @ jnp.array([[5.0], [-2.0]])
      >>> params = {"w": jnp.zeros((2, 1))}
      >>> whole = cqjax.plan(loss_fn)(params, x, y)
      >>> exact = cqjax.csgd(1.0, relative_damping=0.0, max_change=None)
      >>> tx = cqjax.multi_steps(exact, 4, plan=whole)
      >>> state = tx.init(params)
      >>> for i in range(4):
      ...     one = x[i : i + 1], y[i : i + 1]
      ...     _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *one)
      ...     updates, state = tx.update(grads, state, params, captures=captures)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"].ravel().round(3))
      [0. 0.]
      [0. 0.]
      [0. 0.]
      [ 5. -2.]
    """
    _check(every_k, plan)
    wrapped = optax.with_extra_args_support(inner)

    def start(params: optax.Params, inner_state: Any, gradient_step: Any) -> MultiStepsState:
        """The state before the first microbatch of a batch."""
        moments = kept.empty_moments(plan, params, both_sides=True)
        blocks = kept.sides(dict(zip(labelled(plan.blocks), plan.blocks, strict=True)))
        return MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=gradient_step,
            inner_state=inner_state,
            gradients=jax.tree.map(lambda p: jnp.zeros_like(p, accumulator(p.dtype)), params),
            moments={label: moment.total for label, moment in moments.items()},
            rows={
                label: jnp.zeros(block.batch if block.grouped else ())
                for label, block in blocks.items()
                if label in moments
            },
            batch_size=jnp.zeros((), jnp.result_type(jnp.float32, *jax.tree.leaves(params))),
        )

    def init(params: optax.Params) -> MultiStepsState:
        return start(params, wrapped.init(params), jnp.zeros((), jnp.int32))

    @with_automatic_axes
    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        captures: Captures | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        layers = Layers(updates, captures, "multi_steps")
        foreign.found(layers.values(), "multi_steps")
        # In the state's dtype: N is in float64 where float32 parameters meet float64 weights.
        batch_size = state.batch_size + jnp.asarray(layers.batch_size, state.batch_size.dtype)
        share = layers.batch_size / batch_size
        moments, rows = _added(state.moments, state.rows, layers, share)
        gradients = jax.tree.map(
            lambda mean, g: mean + share.astype(mean.dtype) * (g.astype(mean.dtype) - mean),
            state.gradients,
            updates,
        )

        def step() -> tuple[optax.Updates, MultiStepsState]:
            mean = optax.tree.cast_like(gradients, updates)
            sums = tuple(_sums(plan, moments, rows, mean))
            # Examples are the whole batch's, as the plan is.
            whole = Captures(sums, batch_size, plan.examples, plan.parameters, plan.flow)
            new, inner_state = wrapped.update(
                mean, state.inner_state, params, captures=whole, **extra_args
            )
            count = jnp.asarray(optax.safe_increment(state.gradient_step))
            return optax.tree.cast_like(new, updates), start(updates, inner_state, count)

        def wait() -> tuple[optax.Updates, MultiStepsState]:
            new = MultiStepsState(
                state.mini_step + 1,
                state.gradient_step,
                state.inner_state,
                gradients,
                moments,
                rows,
                batch_size,
            )
            return optax.tree.zeros_like(updates), new

        return lax.cond(state.mini_step == every_k - 1, step, wait)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sites", "gradients", "number", "other", "function", "moment"],
    meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class _Sum(Capture):
    """What several calls captured of one weight: no statistic of a site, but their moments' sum."""

    moment: jax.Array

    def rows(self) -> Rows:
        raise ValueError(
            f"multi_steps adds up XᵀX, and the inner transformation needs the rows of "
            f"{self.block.name}: put the microbatches into the loss (a jax.lax.scan over them, "
            "with capture=cqjax.Rows) instead"
        )

    def second_moment(self) -> jax.Array:
        return self.moment

    def outputs(self, weight: jax.Array) -> tuple[Moment]:
        del weight
        return (Moment(self.moment),)


def _sums(
    plan: Plan,
    moments: Mapping[str, jax.Array],
    rows: Mapping[str, jax.Array],
    gradients: optax.Updates,
) -> list[_Sum]:
    """The captures of the plan's whole batch, for the weights that have a moment."""
    leaves = by_path(gradients)

    def total(label: str, block: Block) -> _Sum:
        own = {path: leaves[path] for path in block.paths if path in leaves}
        other = None if block.other is None else total(kept.transposed(label), block.other)
        return _Sum((), own, block.by_moments(), rows[label], other, None, moments[label])

    blocks = zip(labelled(plan.blocks), plan.blocks, strict=True)
    return [total(label, block) for label, block in blocks if label in moments]  # else masked


def _added(
    moments: Mapping[str, jax.Array],
    rows: Mapping[str, jax.Array],
    layers: Layers,
    share: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The sums of moments and of rows; where all examples share the rows, the means.

    Raises:
      ValueError: it is not what the plan says.
    """
    remedy = (
        "make the plan with the same loss and options as cqjax.value_and_grad (with max_dim=, "
        'solver="primal" for both)'
    )
    captures = kept.sides({label: layer.capture for label, layer in layers.items()})
    for label in moments.keys() ^ captures.keys():
        where = ("captured", "in the plan")
        has, lacks = where if label in captures else where[::-1]
        raise ValueError(f"multi_steps: {label} is {has} and not {lacks}: {remedy}")
    added, counts = {}, {}
    for label, total in moments.items():
        capture = captures[label]
        moment = capture.second_moment()
        if moment.shape != total.shape:
            raise ValueError(
                f"multi_steps: the second moment of {label} has shape {moment.shape}; expected "
                f"{total.shape}: {remedy}"
            )
        number, before = jnp.asarray(capture.row_counts()), rows[label]
        if capture.block.shared:
            moment, number = share * (moment - total), share * (number - before)
        added[label] = total + moment.astype(total.dtype)
        counts[label] = before + number.astype(before.dtype)
    return added, counts


def _check(every_k: Any, plan: Any) -> None:
    """Refuses arguments that cannot be meant.

    Raises:
      ValueError: names what is out of range, or too large.
      TypeError: the plan is none.
    """
    check_positive(every_k, "every_k")
    check_plan(plan)
    for block in plan.blocks:
        if block.view.made:
            raise ValueError(
                f"multi_steps: the loss makes the weight of {block.name} of parameters, by masks "
                "or otherwise, which may differ from one microbatch to the next; put the "
                'microbatches into the loss, or leave reparametrized="uncovered"'
            )
        if not block.statistic.diagonal and not block.small("primal"):
            raise ValueError(
                f"multi_steps: the plan solves for {block.name} by rows, since its XᵀX has "
                f"{block.size('primal')} features, more than max_dim={block.max_dim}; only XᵀX can "
                'be added up. Pass block_size= and solver="primal" with max_dim=, or skip='
            )
