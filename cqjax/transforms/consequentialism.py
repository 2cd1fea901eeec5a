"""Consequentialism: updates chosen by what they do to each layer's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from cqjax.capture.captures import Captures
from cqjax.capture.checks import check_number, check_positive
from cqjax.capture.origins import Origin, record
from cqjax.capture.plan import Plan, check_plan
from cqjax.linalg import devices
from cqjax.solves import foreign, kept
from cqjax.solves.all_layers import preconditioned
from cqjax.solves.automatic import with_automatic_axes
from cqjax.solves.kept import Kept, Moment
from cqjax.solves.layers import Layers, is_masked
from cqjax.solves.solve import Damping

Schedule = float | jax.Array | Callable[[chex.Numeric], chex.Numeric]


class ScaleByConsequentialismState(NamedTuple):
    """State of `scale_by_consequentialism`.

    Attributes:
      count: () int32, the number of updates so far.
      fallbacks: (P,) int32, how often a layer's solve failed, for each of the P leaves of the
        parameters' tree, in its order (those that `optax.masked` leaves out are among them): a
        layer's failures are counted at its weight, at the first parameter of a joined one. The
        total is their sum.
      foreign: (P,) int32, likewise: how often a layer's update came in with another direction than
        the captured gradient (a cosine below .9). Above 0, it was of another batch, or changed.
      moments: with `ema_decay`, the moving average of each weight's XᵀX / N.
      inverses: with `update_every`, N (XᵀX + λI)⁻¹, (B, d, d), of the weights that are not solved
        for anew in each step; whether there has been one, (B,), and whether the last attempt
        failed.
    """

    count: chex.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    fallbacks: jax.Array
    foreign: jax.Array
    moments: dict[str, Moment]
    inverses: dict[str, Kept]


def scale_by_consequentialism(
    *,
    damping: Schedule = 0.0,
    relative_damping: Schedule = 0.1,
    plan: Plan | None = None,
    update_every: int | None = None,
    ema_decay: float | None = None,
    capture_every: int | None = None,
    spread_over: NamedSharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each layer's gradient by the ridge pseudoinverse's update.

    Take a layer :math:`Z = XW`, with input rows :math:`X: (n, d)`; a bias counts as a further,
    constant feature. Let :math:`\bar Z = \partial L / \partial Z` and :math:`G = X^T \bar Z`, and
    let :math:`N` be the number of terms that the loss averages over. The update is

    .. math::
      U = N X^T (X X^T + \lambda I)^{-1} \bar Z = N (X^T X + \lambda I)^{-1} G.

    The *virtual error* of a row of outputs is N times its row of :math:`\bar Z`: what the row's own
    example asks of it. The step :math:`W \leftarrow W - \mu U` moves the batch's outputs by
    :math:`-\mu N \bar Z`: each by the fraction :math:`\mu` of its virtual error. That is exact
    where the rows of X are independent and λ = 0, and as near as least squares allow otherwise.
    :math:`\mu = 1` solves a linear layer with squared error in one step.

    Some rows belong to no single example: a table of positions that is looked up once for the whole
    batch. There :math:`\bar Z` is a sum over the examples already, so N is divided by their number.
    Such rows come of parameters, constants, or arguments without a row for each example, and are
    repeated for the examples; `cqjax.plan` notes them. A weight that has both such rows and the
    examples' own is solved for as if each example had a copy. Rows that the loss leaves out, by a
    mask or otherwise, are no examples.

    A loss may use a weight both ways, as :math:`Z = XW` and as :math:`Y = DW^T`: by gradients with
    respect to inputs in the loss, in tied embeddings and tied autoencoders. Then U solves the
    Sylvester equation

    .. math:: (X^T X) U + U (D^T D) + \lambda U = N G, \quad G = X^T \bar Z + \bar Y^T D,

    which makes :math:`\lVert X U - N \bar Z \rVert^2 + \lVert D U^T - N \bar Y \rVert^2 + \lambda
    \lVert U \rVert^2` least. It takes the eigenvectors of both matrices; of kernels that a
    convolution and its transpose share, conjugate gradients. Relative damping is in units of the
    mean eigenvalue of the equation. Such weights are solved for anew in every update.

    The transformation computes :math:`N (X^T X + \lambda I)^{-1} H` for whatever update :math:`H`
    it is handed. As the first member of a chain it is handed the gradient. Where rows were
    captured, it then takes the left form, which costs least. What an earlier member added to the
    gradient is preconditioned too, and so is a loss term on the weights themselves. Outside the
    span of the batch's inputs this makes it larger by up to :math:`N / \lambda`. So place the
    transformation first, and let weight decay follow it.

    With `reparametrized="nearest"` of `value_and_grad`, the loss may make W of parameters,
    :math:`W = f(V)`. Let J be the Jacobian of f at V. Then V moves W to first order by
    :math:`J \Delta V`, the gradient of V is :math:`G = J^T X^T \bar Z`, and the update of V
    minimises the layer's own ridge objective, posed in V:

    .. math::
      U_V = N (J^T (X^T X + \lambda I) J + \delta I)^{-1} G = \arg\min_D
      \lVert X J D - N \bar Z \rVert^2 + \lambda \lVert J D \rVert^2
      + \delta \lVert D \rVert^2.

    So :math:`J U_V` is nearest to the U of W, in the norm of what a change does to the outputs. For
    an f that is linear in V (masks, straight-through gradients), it is exact: the best of the W
    that f can make. A bias is solved for with V. The last term is small. It keeps V from long steps
    along directions that hardly move W: :math:`\delta = 10^{-3} \rho \bar a` with
    :math:`\rho = \lVert J G \rVert^2 / \lVert G \rVert^2` and the mean eigenvalue
    :math:`\bar a` of :math:`X^T X + \lambda I`. The solution is found by up to 100 conjugate
    gradients. They end at a relative residual of .002, in float64 of 1e-8; above .1 it counts as a
    solve that failed. `update_every` solves for such weights anew in every update.

    In 16-bit models the right form starts from a gradient that was rounded to 16 bits. Where the
    rows do not span all features, 1/λ magnifies the rounding. `solver="dual"` starts from the rows.
    It does so also where an earlier member only scaled the gradient: clipped it by its norm, or
    took a loss scale off. What such a member adds is lost if it is below 16 bits' rounding.

    Parameters that were not captured pass through unchanged. Call it under `jax.jit`, together with
    `cqjax.value_and_grad`.

    Solves are in float32, or float64 for float64 models, at the highest precision. A solve that
    fails, or whose matrix is singular to working precision, is repeated with its damping raised by
    1e-2 of the mean eigenvalue. If that fails too, the layer keeps its earlier inverse
    (`update_every`), else it gets its plain update. Where :math:`X^T X` is not finite it gets
    none. Entries of any update that are not finite become zero. The state counts such events, for
    each layer.

    Args:
      damping: the part of λ that is the same for all layers, at least 0, in units of the squared
        length of an input row; a number or a schedule of the update's count. The paper's λ is
        `damping=1e-3, relative_damping=0.0` for inputs in [0, 1], 1e-2 for standardised ones and
        3e-2 for convolutions.
      relative_damping: the part of λ that is in units of the mean of those eigenvalues of XᵀX that
        may differ from zero; a number or a schedule. λ is the sum of the two parts. One value
        carries over between layers, scales of inputs and batch sizes. On six kinds of work, 0.1 to
        1 made little difference; more of it fits less noise (docs/choosing.md).
      plan: what will be captured, made by `cqjax.plan` of the same loss and arguments as
        `cqjax.value_and_grad`. The next three options need it.
      update_every: updates from one inversion of :math:`X^T X + \lambda I` to the next. In between
        the inverse is kept, and applied to each batch's gradient. Without `ema_decay` it is the
        inverse of one batch. Two kinds of weights are solved for anew in every update: those for
        which that costs less than a product with an inverse, and those with fewer than twice as
        many rows in a batch as features, along whose rows an older inverse could be as large as
        1/λ. So is any weight in a batch with so few rows, whatever the plan's has. An attempt that
        fails is made again in the next update. So is one whose inverse is four times as large as
        the last, or a sixteenth of it.
      ema_decay: in [0, 1): the solves take N times the moving average of XᵀX / N, with its bias
        from starting at zero corrected. All weights are then solved for by the primal, but for
        those whose XᵀX `max_dim` forbids to invert: they are solved for by rows. With few rows in a
        batch, the first updates are larger than without an average, most of all when the batches
        together have about as many rows as features. `relative_damping` limits that.
      capture_every: with `ema_decay`, updates from one batch that enters the average to the next.
        Of weights with fewer than twice as many rows as features, each batch enters.
      spread_over: a sharding whose axes name devices that share out the inversions of matrices of
        equal size, and hand each other the inverses: under `jax.jit`, or within a `jax.shard_map`
        over these axes. None where each device inverts all.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    Raises:
      ValueError: an argument cannot be meant, or needs a plan; in `update`, there are no captures,
        they belong to other parameters or another plan, or the batch size is unknown.
      TypeError: the plan, or in `update` `captures`, is something else.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> x = jnp.array([[3.0, 1.0, 0.0], [1.0, 2.0, 1.0]])
      >>> y = jnp.array([[1.0], [-1.0]])
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> tx = optax.chain(
      ...     cqjax.scale_by_consequentialism(relative_damping=0.0), optax.sgd(1.0)
      ... )
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
      >>> updates, state = tx.update(grads, tx.init(params), params, captures=captures)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{loss_fn(params, x, y):.6f}")
      0.000000

    References:
      Paeedeh and Ghiasi-Shirazi, Improving the backpropagation algorithm with consequentialism
      weight updates over mini-batches (2020), Eqs. 58 to 63.
    """
    check_number(damping, "damping")
    check_number(relative_damping, "relative_damping")
    _check_kept(plan, update_every, ema_decay, capture_every)
    if spread_over is not None and not (
        isinstance(spread_over, NamedSharding) and devices.axes_of(spread_over)
    ):
        raise TypeError(
            f"spread_over={spread_over!r}: expected a jax.sharding.NamedSharding that names mesh "
            'axes, NamedSharding(mesh, PartitionSpec("data")) say'
        )

    def init(params: optax.Params) -> ScaleByConsequentialismState:
        moments, inverses = {}, {}
        if plan is not None and ema_decay is not None:
            moments = kept.empty_moments(plan, params)
        if plan is not None and update_every is not None:
            inverses = kept.empty_inverses(plan, params, update_every, ema_decay is not None)
        leaves = jax.tree.leaves(params, is_leaf=is_masked)
        none = jnp.zeros(len(leaves), jnp.int32)
        return ScaleByConsequentialismState(
            jnp.zeros((), jnp.int32), none, jnp.copy(none), moments, inverses
        )

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
        layers = Layers(updates, captures, "scale_by_consequentialism", params)
        layers.check_counts(state.fallbacks)
        elsewhere = layers.counts(foreign.found(layers.values(), "scale_by_consequentialism"))
        kept.check(state.moments, state.inverses, layers, ema_decay is not None)
        now = Damping(_at(damping, state.count), _at(relative_damping, state.count))
        moments, left_out = state.moments, {}
        inverses = kept.Renewed(state.inverses, {}, {})
        if ema_decay is not None:
            moments, left_out = kept.update_moments(
                moments, layers, ema_decay, capture_every, state.count
            )
        if update_every is not None:
            inverses = kept.update_inverses(
                state.inverses, moments, layers, now, update_every, state.count, spread_over
            )
        updates, failures = preconditioned(
            layers, now, moments, inverses.own, (left_out, inverses.failed), spread_over
        )
        record(jax.tree.leaves(updates), Origin.SOLUTION)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScaleByConsequentialismState(
            count, state.fallbacks + failures, state.foreign + elsewhere, moments, inverses.kept
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _at(value: Schedule, count: jax.Array) -> Any:
    return value(count) if callable(value) else value


def _check_kept(plan: Plan | None, update_every: Any, ema_decay: Any, capture_every: Any) -> None:
    """Refuses options that cannot be meant, or not without a plan.

    Raises:
      ValueError: names the option.
      TypeError: the plan is none.
    """
    periods = {"update_every": update_every, "capture_every": capture_every}
    for name, value in periods.items():
        if value is not None:
            check_positive(value, name, f' (optax.inject_hyperparams: static_args="{name}")')
    if isinstance(ema_decay, int | float | np.number) and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay={ema_decay}: expected at least 0 and less than 1")
    if capture_every is not None and ema_decay is None:
        raise ValueError(
            f"capture_every={capture_every} without ema_decay: it says how often the moving "
            "average is given a batch; update_every takes the batch that it comes with"
        )
    if plan is not None:
        check_plan(plan)
    if plan is None and (update_every is not None or ema_decay is not None):
        raise ValueError(
            "update_every and ema_decay keep statistics between updates, of which init must know "
            "the shapes: pass plan=cqjax.plan(loss_fn)(params, *args)"
        )
