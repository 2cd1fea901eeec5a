"""A trust region: a bound on how far one step moves the outputs of each layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cqjax.capture.captures import Captures
from cqjax.capture.checks import check_number
from cqjax.linalg.gram import accumulator
from cqjax.solves.automatic import with_automatic_axes
from cqjax.solves.layer import Layer
from cqjax.solves.layers import Layers, is_masked
from cqjax.solves.matrices import Matrices, along

_NAME = "clip_by_output_change"
PROBES = 8
"""Random combinations of a layer's outputs whose lengths are measured."""


class ClipByOutputChangeState(NamedTuple):
    """State of `clip_by_output_change`.

    Attributes:
      count: () int32, the number of updates so far.
      clipped: (P,) int32, how often an update was shortened, for each of the P leaves of the
        parameters' tree, in its order: a layer is counted at its weight.
    """

    count: chex.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    clipped: jax.Array


def clip_by_output_change(
    max_change: float = 0.5, *, learning_rate: optax.ScalarOrSchedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Shortens a layer's update where it would move the layer's outputs too far in one step.

    Take a layer :math:`Z = XW`; a bias counts as a further, constant feature. An update ΔW moves
    the outputs of this batch by :math:`X \Delta W`. Where

    .. math::
      \mu \lVert X \Delta W \rVert_F > c \max(\lVert X W \rVert_F, \lVert X W_0 \rVert_F),

    ΔW is multiplied by what makes the two sides equal. Here c is `max_change`, and μ the rate at
    which the update is taken: 1 where the transformation is the last in a chain. :math:`W_0` stands
    for a layer at its start: its entries are ±1/√d for d features, as large as LeCun's
    initialisation has them, or ±1/√o for a table whose rows have o entries. So a layer may start
    from zero. The inputs X are those of the loss's
    last evaluation: that the layers below change too is left out.

    There are two places for it. Last in a chain, it bounds the step that is taken, whatever made
    it: right for Adam. Before momentum, it keeps one bad batch from staying in the sum. There μ is
    the rate that acts on an update in the end, the learning rate divided by 1 − β. The aliases with
    a memory have it in both.

    Of a parameter that was not captured, such as the scales of a normalisation, the update is
    shortened where its root mean square would be more than c times that of the parameter, or c
    where the parameter's is less than 1. So an absurd example (an input of 1e9, say) moves these no
    further than those. An update whose square is not finite becomes zero.

    The lengths are estimated by 8 random combinations of the outputs, with factors of ±1. Their
    mean square is right, and its relative standard error is at most one half. For layers with up to
    8 outputs there is no such error. Of many rows some are looked at, evenly spaced: about 512, or
    in a convolution those of 16 examples. So the cost is a product of few rows with 24 columns.
    Where only XᵀX was captured, it serves instead. For a weight whose XᵀX is in diagonal blocks,
    the blocks' squares are added up. Where the loss makes W of parameters V
    (`reparametrized="nearest"`), ΔW is what the update of V does to first order, and that update is
    shortened; of weights side by side, all as much as the one that is shortened most.

    The state counts for each layer and parameter how often its update was shortened. At a
    well-chosen rate that is never, or in the first few steps.

    Args:
      max_change: c ≥ 0, the part of their own root mean square by which a step may move a layer's
        outputs.
      learning_rate: μ, a number or a schedule: by what the updates will yet be multiplied.

    Returns:
      A transformation whose `update` takes the parameters and the keyword argument `captures`.

    Raises:
      ValueError: `max_change` is negative. In `update`: there are no parameters or no captures,
        they belong to other parameters, or neither rows nor XᵀX were captured.
      TypeError: in `update`, `captures` are not the last result of `cqjax.value_and_grad`.

    Examples:
      >>> import cqjax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x):
      ...     return jnp.mean(x @ params["w"])
      >>> params, x = {"w": jnp.array([[2.0], [0.0]])}, jnp.eye(2)
      >>> tx = optax.chain(optax.sgd(100.0), cqjax.clip_by_output_change(0.25))
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
      >>> updates, state = tx.update(grads, tx.init(params), params, captures=captures)
      >>> change = x @ updates["w"]
      >>> print(f"{jnp.linalg.norm(change) / jnp.linalg.norm(x @ params['w']):.3f}")
      0.250

    References:
      It follows layer-wise bounds on the weights' own change, as in You, Gitman and Ginsburg, Large
      batch training of convolutional networks (2017), and Brock et al., High-performance
      large-scale image recognition without normalization (2021), Eq. 3. Lengths by random signs:
      Hutchinson, A stochastic estimator of the trace of the influence matrix (1989).
    """
    check_number(max_change, "max_change")
    check_number(learning_rate, "learning_rate")

    def init(params: optax.Params) -> ClipByOutputChangeState:
        leaves = jax.tree.leaves(params, is_leaf=is_masked)
        return ClipByOutputChangeState(jnp.zeros((), jnp.int32), jnp.zeros(len(leaves), jnp.int32))

    @with_automatic_axes
    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        captures: Captures | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError(
                f"{_NAME}: no parameters were passed, of which the outputs' size is computed; call "
                "update(grads, state, params, captures=captures)"
            )
        layers, weights = (Layers(tree, captures, _NAME) for tree in (updates, params))
        layers.check_counts(state.clipped)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        widest = max((max(x.block.outputs, x.block.features) for x in layers.values()), default=0)
        signs = jax.random.rademacher(key, (widest, PROBES), jnp.int8)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        results, events, others, shortened = {}, {}, layers.others, {}
        for label, layer in layers.items():
            factor = _factor(layer, weights[label].value, max_change, rate, signs)
            other, own = layer.other, weights[label].other
            if other is not None and own is not None:  # the shorter of what the two sides allow
                of_other = _factor(other, own.value, max_change, rate, signs)
                factor = jnp.minimum(factor, of_other)
                if (bias := other.change.bias) is not None:
                    others |= other.block.scatter_bias(_times(factor, bias))
            events[label] = ~(factor == 1)
            if layer.made:  # of several weights side by side, the one that is shortened most
                others |= {path: factor.min() * step for path, step in layer.handed.items()}
            else:
                results[label] = Matrices(*(_times(factor, part) for part in layer.change))
        for path, step in layers.others.items():
            factor = _factor_of_other(step, weights.others[path], max_change, rate)
            others[path] = (factor * step).astype(step.dtype)
            shortened[path] = ~(factor == 1)
        count = jnp.asarray(optax.safe_increment(state.count))
        return layers.replaced(results, others), ClipByOutputChangeState(
            count, state.clipped + layers.counts(events, shortened)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _factor(
    layer: Layer, weights: Matrices, max_change: Any, rate: Any, signs: jax.Array
) -> jax.Array:
    """What a layer's update is multiplied by: (B,), or (B / parts,)."""
    block, (step, bias) = layer.block, layer.change
    combine = _combinations(signs, block.outputs, step.dtype)
    # A table starts with 1 / √(its row's length): of d entries, a one-hot row reads but one.
    size = block.outputs if block.statistic.diagonal else block.features * (block.parts or 1)
    start = signs[: block.features].astype(step.dtype) / size**0.5
    start = jnp.broadcast_to(start, (len(step), *start.shape))
    columns = jnp.concatenate([step @ combine, weights.weight @ combine, start], -1)
    constant = None
    if bias is not None and weights.bias is not None and layer.joint_bias:
        constant = jnp.concatenate(
            [bias @ combine, weights.bias @ combine, jnp.zeros_like(start[:, 0])], -1
        )
    squares = layer.capture.squared_outputs(columns, constant)
    moved, now, start = jnp.split(squares, (combine.shape[1], 2 * combine.shape[1]), -1)
    own = jnp.maximum(now.sum(-1), block.outputs * start.mean(-1))
    moved = jnp.square(jnp.asarray(rate, moved.dtype)) * moved.sum(-1)
    if block.parts is not None:
        own, moved = (a.reshape(-1, block.parts).sum(-1) for a in (own, moved))
    return _shortening(moved, own, max_change)


def _factor_of_other(step: jax.Array, own: jax.Array, max_change: Any, rate: Any) -> jax.Array:
    """What an update is multiplied by of a parameter that no layer covers: ()."""

    def mean_square(array: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jnp.abs(array).astype(accumulator(array.dtype))))

    moved = mean_square(jnp.asarray(rate, accumulator(step.dtype)) * step)
    return _shortening(moved, jnp.maximum(mean_square(own), 1), max_change)


def _shortening(moved: jax.Array, own: jax.Array, max_change: Any) -> jax.Array:
    """The factor that makes √moved at most `max_change` times √own."""
    allowed = jnp.square(jnp.asarray(max_change, own.dtype)) * own
    # Not so where the length is NaN or infinite: then the factor makes the update zero.
    within = (moved <= allowed) & jnp.isfinite(moved)
    return jnp.sqrt(jnp.where(within, 1, allowed) / jnp.where(within, 1, moved))


def _combinations(signs: jax.Array, outputs: int, dtype: Any) -> jax.Array:
    """Columns whose products with the outputs have the outputs' length, in the mean: (o, k)."""
    if outputs <= PROBES:
        return jnp.eye(outputs, dtype=dtype)
    return signs[:outputs].astype(dtype) / PROBES**0.5


def _times(factors: jax.Array, array: jax.Array | None) -> Any:
    """The product; each factor is for as many of the array's matrices as there are to each."""
    if array is None:
        return None
    return along(jnp.repeat(factors, len(array) // len(factors)), array) * array
