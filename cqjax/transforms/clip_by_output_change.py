"""A trust region: a bound on how far one step moves the outputs of each layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from cqjax.capture.captures import Captures
from cqjax.capture.checks import check_number
from cqjax.linalg import joined
from cqjax.linalg.gram import HIGHEST, accumulator
from cqjax.linalg.products import einsum
from cqjax.solves.automatic import with_automatic_axes
from cqjax.solves.kept import transposed
from cqjax.solves.layer import Layer
from cqjax.solves.layers import Layers, is_masked
from cqjax.solves.matrices import Matrices, along
from cqjax.solves.output_squares import Request, request, squares

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
    initialisation has them, or ±1/√o for a table whose rows have o entries; its length is the mean
    over the signs, and in a convolution as if each entry of the input were seen equally often. So a
    layer may start from zero. The inputs X are those of the loss's
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
    in a convolution those of 16 examples. So the cost is a product of few rows with 16 columns.
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
        sizes = [(layer.block.outputs, layer.block.features) for layer in layers.values()]
        widest = max(itertools.chain(*sizes), default=0)  # a transpose's outputs are features
        signs = _signs(state.count, widest)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        sides: dict[str, tuple[Layer, Matrices]] = {}
        for label, layer in layers.items():
            own = weights[label]
            sides[label] = layer, own.value
            if layer.other is not None and own.other is not None:
                sides[transposed(label)] = layer.other, own.other.value
        others = layers.others
        shorten = functools.partial(_shortening, max_change, rate)
        of_layers = _of_layers(shorten, sides, signs)
        of_others = _of_others(shorten, others, weights.others)
        factors = {label: each.factor for label, each in joined.split(of_layers).items()}
        shortened = {path: each.factor for path, each in joined.split(of_others).items()}
        results, both = {}, {}
        for label, layer in layers.items():
            factor = factors[label]
            other = layer.other
            if other is not None:  # the shorter of what the two sides allow
                factor = jnp.minimum(factor, factors[transposed(label)])
                both[label] = ~(factor == 1)
                if (bias := other.change.bias) is not None:
                    others |= other.block.scatter_bias(_times(factor, bias))
            if layer.made:  # of several weights side by side, the one that is shortened most
                others |= {path: factor.min() * step for path, step in layer.handed.items()}
            else:
                results[label] = Matrices(*(_times(factor, part) for part in layer.change))
        for path, step in layers.others.items():
            others[path] = (shortened[path].reshape(()) * step).astype(step.dtype)
        count = jnp.asarray(optax.safe_increment(state.count))
        events = [each._replace(result=each.result.shortened) for each in of_layers + of_others]
        clipped = layers.counted(events, without=both) + layers.counts(both)
        return layers.replaced(results, others), ClipByOutputChangeState(
            count, state.clipped + clipped
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Lengths(NamedTuple):
    """Squared lengths of what an update does and of what there is, (B,) each.

    Attributes:
      moved: ‖X ΔW‖², at a rate of one.
      now: ‖XW‖².
      start: ‖XW₀‖².
    """

    moved: jax.Array
    now: jax.Array
    start: jax.Array


class _Shortening(NamedTuple):
    """By what updates are multiplied, and whether that is not one: (B,) each."""

    factor: jax.Array
    shortened: jax.Array


_Shorten = Callable[[_Lengths], _Shortening]


def _of_layers(
    shorten: _Shorten, sides: Mapping[str, tuple[Layer, Matrices]], signs: jax.Array
) -> list[joined.Results]:
    """What shortens the updates of layers with these weights, by label."""

    def combine(array: jax.Array) -> jax.Array:
        columns = _combinations(signs, array.shape[-1], array.dtype)
        subscripts = "bo,ok->bk" if array.ndim == 2 else "bdo,ok->bdk"
        return einsum(subscripts, array, columns, HIGHEST, accumulator(array.dtype))

    def shortening(each: tuple[Request, Request, jax.Array]) -> _Shortening:
        *requests, start = each
        moved, now = (squares(some, combine) for some in requests)
        lengths = moved.outputs, now.outputs.astype(moved.outputs.dtype), now.inputs * start
        return shorten(_Lengths(*lengths))

    requests = {}
    for label, (layer, weights) in sides.items():
        # Weights of ±1/√d give, in the mean of the signs, each row's length times √o. A table
        # starts with 1 / √(its row's length): of d entries, a one-hot row reads but one.
        block = layer.block
        size = block.outputs if block.statistic.diagonal else block.features * (block.parts or 1)
        moved, now = (
            request(layer.capture, each if layer.joint_bias else each._replace(bias=None), combine)
            for each in (layer.change, weights)
        )
        inputs = now[0].inputs
        start = jnp.full(inputs.shape, block.outputs / size, inputs.dtype)
        requests[label] = moved, now, start
    return joined.calls(shortening, requests)


def _of_others(
    shorten: _Shorten, steps: Mapping[str, jax.Array], weights: Mapping[str, jax.Array]
) -> list[joined.Results]:
    """What shortens the updates of parameters that no layer covers, by path.

    Their lengths are root mean squares. They start from ones.
    """

    def shortening(each: tuple[jax.Array, jax.Array]) -> _Shortening:
        moved, now = map(_mean_squares, each)
        return shorten(_Lengths(moved, now.astype(moved.dtype), jnp.ones_like(moved)))

    return joined.each(shortening, {path: (step, weights[path]) for path, step in steps.items()})


def _mean_squares(arrays: jax.Array) -> jax.Array:
    squares = jnp.square(jnp.abs(arrays).astype(accumulator(arrays.dtype)))
    return jnp.mean(squares, tuple(range(1, arrays.ndim)))


def _shortening(max_change: Any, rate: Any, lengths: _Lengths) -> _Shortening:
    """The factor that makes √moved, at this rate, at most `max_change` times the other lengths."""
    moved, now, start = lengths
    moved *= jnp.square(jnp.asarray(rate, moved.dtype))
    allowed = jnp.square(jnp.asarray(max_change, now.dtype)) * jnp.maximum(now, start)
    # Not so where the length is NaN or infinite: then the factor makes the update zero.
    within = (moved <= allowed) & jnp.isfinite(moved)
    factor = jnp.sqrt(jnp.where(within, 1, allowed) / jnp.where(within, 1, moved))
    return _Shortening(factor, ~(factor == 1))


def _signs(count: jax.Array, number: int) -> jax.Array:
    """±1 for so many outputs and each probe, (number, PROBES), that look random in each update.

    They are bits of hashed numbers. JAX's own generators would take as long to compile as dozens of
    layers.
    """
    # The finalizer of MurmurHash3 (Appleby, 2011), whose bits depend on all bits of a number.
    x = jnp.arange(number * PROBES, dtype=jnp.uint32).reshape(number, PROBES)
    x += count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return 1 - 2 * (x >> jnp.uint32(31)).astype(jnp.int8)


def _combinations(signs: jax.Array, outputs: int, dtype: Any) -> jax.Array:
    """Columns whose products with the outputs have the outputs' length, in the mean: (o, PROBES).

    For few outputs, they are the outputs themselves, and zeros.
    """
    if outputs <= PROBES:
        return jnp.eye(outputs, PROBES, dtype=dtype)
    return signs[:outputs].astype(dtype) / PROBES**0.5


def _times(factors: jax.Array, array: jax.Array | None) -> Any:
    """The product; each factor is for as many of the array's matrices as there are to each."""
    if array is None:
        return None
    times = len(array) // len(factors)
    return along(factors if times == 1 else jnp.repeat(factors, times), array) * array
