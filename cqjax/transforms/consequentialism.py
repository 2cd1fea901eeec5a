"""Consequentialism: updates chosen by what they do to each layer's outputs (seed 000)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from cqjax.capture.block import Block
from cqjax.capture.captures import Capture, Captures
from cqjax.linalg import gram, ridge
from cqjax.transforms.incoming import (
    Incoming,
    Matrices,
    along,
    check_number,
    decomposed,
    finite,
    product,
)

Schedule = float | jax.Array | Callable[[chex.Numeric], chex.Numeric]


class ScaleByConsequentialismState(NamedTuple):
    """State of `scale_by_consequentialism`.

    Attributes:
      count: () int32, the number of updates so far.
      fallbacks: () int32, how often a layer's solve failed: it was then repeated with more damping,
        and if that failed too, the layer kept its plain update.
    """

    count: chex.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    fallbacks: jax.Array


def scale_by_consequentialism(
    damping: Schedule = 1e-3, *, relative_damping: Schedule = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each layer's gradient by the ridge pseudoinverse's update.

    For a layer :math:`Z = XW`, with :math:`X: (n, d)` (a bias counts as a further, constant
    feature), :math:`\bar Z = \partial L / \partial Z`, :math:`G = X^T \bar Z` and :math:`N` the
    number of terms that the loss averages, the update is

    .. math::
      U = N X^T (X X^T + \lambda I)^{-1} \bar Z = N (X^T X + \lambda I)^{-1} G,

    so that the step :math:`W \leftarrow W - \mu U` moves the batch's outputs by
    :math:`-\mu N \bar Z` (exactly where the rows of X are independent and λ = 0, and as nearly as
    least squares allow otherwise): each example's, by the fraction :math:`\mu` of what its own loss
    asks for. :math:`\mu = 1` solves a linear layer with squared error in one step.

    N assumes that each example has rows of its own. Where all share them (an embedding of positions
    looked up once for the batch), :math:`\bar Z` is a mean over the examples already, and U is up
    to N times too large: leave such parameters to `skip=`. `cqjax.plan` notes those whose number of
    rows is no multiple of N.

    It computes :math:`N (X^T X + \lambda I)^{-1} H` for whatever update :math:`H` it is handed.
    The first member of a chain is handed the gradient, and where rows were captured takes the left
    form, at the least cost. Where an earlier member, or a loss term on the weights themselves,
    added something to the gradient, it is preconditioned too; what lies outside the span of the
    batch's inputs then grows by up to :math:`N / \lambda`. So: place it first, and let weight
    decay follow it.

    In 16-bit models the primal starts from a gradient that was rounded to 16 bits, and where the
    rows do not span all features 1/λ magnifies the rounding: `solver="dual"` starts from the rows.

    Parameters that were not captured pass through unchanged. Call it under `jax.jit`, together with
    `cqjax.value_and_grad`. Solves are in float32 (float64 for
    float64 models) at the highest precision. One that fails is repeated with its damping raised by
    1e-2 of the mean eigenvalue; if that fails, the layer gets its plain update, with zeros for
    entries that are not finite. The state counts such events.

    Args:
      damping: λ ≥ 0, in units of the squared length of an input row; a number or a schedule of the
        update's count. The paper has 1e-3 for inputs in [0, 1], 1e-2 for standardised ones and
        3e-2 for convolutions.
      relative_damping: added to λ, in units of the mean of those eigenvalues of XᵀX that may differ
        from zero: carries over between layers, scales of inputs and batch sizes.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`.

    Raises:
      ValueError: a damping is negative or NaN; in `update`, there are no captures, they belong to
        other parameters, or the batch size is unknown.
      TypeError: in `update`, `captures` is something else.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> x = jnp.array([[3.0, 1.0, 0.0], [1.0, 2.0, 1.0]])
      >>> y = jnp.array([[1.0], [-1.0]])
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> tx = optax.chain(cqjax.scale_by_consequentialism(damping=0.0), optax.sgd(1.0))
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
      >>> updates, state = tx.update(grads, tx.init(params), params, captures=captures)
      >>> params = optax.apply_updates(params, updates)
      >>> print(f"{loss_fn(params, x, y):.6f}")
      0.000000

    References:
      Paeedeh and Ghiasi-Shirazi, Improving the backpropagation algorithm with consequentialism
      weight updates over mini-batches (seed 000), Eqs. 58 to 63.
    """
    check_number(damping, "damping")
    check_number(relative_damping, "relative_damping")

    def init(params: optax.Params) -> ScaleByConsequentialismState:
        del params
        return ScaleByConsequentialismState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        captures: Captures | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        incoming = Incoming(updates, captures, "scale_by_consequentialism")
        dampings = (_at(damping, state.count), _at(relative_damping, state.count))
        updates, fallbacks = _precondition(incoming, *dampings)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScaleByConsequentialismState(count, state.fallbacks + fallbacks)

    return optax.GradientTransformationExtraArgs(init, update)


def _at(value: Schedule, count: jax.Array) -> Any:
    return value(count) if callable(value) else value


def _precondition(
    incoming: Incoming, damping: Any, relative: Any
) -> tuple[optax.Updates, jax.Array]:
    """N (XᵀX + λI)⁻¹ H for every block, and how many solves failed."""
    dual = [c for c in incoming.captures if c.block.solver == "dual" and c.block.exact]

    def solve(changed: bool) -> tuple[optax.Updates, jax.Array]:
        return _solve(incoming, damping, relative, changed)

    if all(map(incoming.is_gradient, dual)):
        return solve(False)
    return lax.cond(incoming.changed(dual), lambda: solve(True), lambda: solve(False))


class _Problem(NamedTuple):
    """A block's linear system, and the update that its solution makes."""

    system: ridge.System
    update: Callable[[ridge.Inverse], tuple[Matrices, jax.Array]]


def _solve(
    incoming: Incoming, damping: Any, relative: Any, changed: bool
) -> tuple[optax.Updates, jax.Array]:
    """As `_precondition`, told whether the updates may differ from the gradient."""
    results: dict[int, Matrices] = {}
    problems: dict[int, _Problem] = {}
    fallbacks = jnp.zeros((), jnp.int32)
    for i, capture in enumerate(incoming.captures):
        block = capture.block
        if block.solver == "diagonal":
            results[i], failed = _diagonal(incoming, capture, damping, relative)
            fallbacks += failed.astype(jnp.int32)
        elif block.solver == "primal":
            problems[i] = _primal(incoming, capture, damping, relative)
        elif block.exact and not changed:
            problems[i] = _dual(incoming, capture, damping, relative)
        else:
            problems[i] = _dual_of_changed(incoming, capture, damping, relative)
    inverses = ridge.inverses([problem.system for problem in problems.values()])
    for (i, problem), inverse in zip(problems.items(), inverses, strict=True):
        results[i], failed = problem.update(inverse)
        fallbacks += jnp.sum(inverse.repaired | failed, dtype=jnp.int32)
    return incoming.replaced(results), fallbacks


def _system(
    block: Block,
    matrix: jax.Array,
    bias: bool,
    damping: Any,
    relative: Any,
    gain: Any,
) -> ridge.System:
    """N (A + λI)⁻¹ with A = XXᵀ or XᵀX, (B, m, m)."""
    rank = min(block.rows, block.features + bias)
    if not (isinstance(relative, int | float) and relative == 0):
        trace = jnp.trace(matrix, axis1=1, axis2=2)
        damping = damping + relative * ridge.mean_eigenvalue(trace, rank)
    return ridge.System(matrix, damping, rank, gain)


def _primal(incoming: Incoming, capture: Capture, damping: Any, relative: Any) -> _Problem:
    """U = N (XᵀX + λI)⁻¹ H."""
    block, bias = capture.block, incoming.has_bias(capture.block)
    weight, added = incoming.matrices(block)
    d = block.features + bias
    right = weight if added is None else jnp.concatenate([weight, added[:, None]], 1)
    xx = capture.second_moment()[:, :d, :d]

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        u, failed = ridge.solve(inverse, right)
        return Matrices(u[:, : block.features], u[:, -1] if bias else None), failed

    system = _system(block, xx, bias, damping, relative, incoming.batch_size)
    return _Problem(system, update)


def _dual(incoming: Incoming, capture: Capture, damping: Any, relative: Any) -> _Problem:
    """U = N Xᵀ (XXᵀ + λI)⁻¹ Z̄."""
    bias = incoming.has_bias(capture.block)
    rows = capture.rows()
    h = rows.h if bias else None
    dz = rows.dz.astype(gram.accumulator(rows.dz.dtype))

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        s, failed = ridge.solve(inverse, dz)
        return product(rows.x, s, h), failed

    xx, n = gram.outer(rows.x, h), incoming.batch_size
    return _Problem(_system(capture.block, xx, bias, damping, relative, n), update)


def _dual_of_changed(incoming: Incoming, capture: Capture, damping: Any, relative: Any) -> _Problem:
    """U = N (XᵀX + λI)⁻¹ H for H = c G + R: the dual for G, Woodbury's identity for the rest R.

    (XᵀX + λI)⁻¹ R = (R - Xᵀ (XXᵀ + λI)⁻¹ X R) / λ.
    """
    block, bias = capture.block, incoming.has_bias(capture.block)
    handed, n = incoming.matrices(block), incoming.batch_size
    scale, rest, present = decomposed(handed, incoming.gradient(capture))
    rows = capture.rows()
    h = rows.h if bias else None
    dz = rows.dz.astype(gram.accumulator(rows.dz.dtype))
    moved = jnp.einsum("bnd,bdo->bno", rows.x.astype(dz.dtype), rest.weight, precision="highest")
    if h is not None and rest.bias is not None:
        moved += h[..., None].astype(dz.dtype) * rest.bias[:, None]

    def update(inverse: ridge.Inverse) -> tuple[Matrices, jax.Array]:
        solution, failed = ridge.solve(inverse, jnp.concatenate([dz, moved], -1))
        of_gradient, of_rest = jnp.split(solution, 2, -1)
        scaled = product(rows.x, along(scale, of_gradient) * of_gradient, h)
        spanned = product(rows.x, of_rest, h)

        def total(u: jax.Array, r: jax.Array, s: jax.Array, plain: jax.Array) -> jax.Array:
            outside = (n * r - s) / along(inverse.damping, r)
            u = u + jnp.where(along(present, r), outside, 0)
            return jnp.where(along(failed, u), plain, u)

        return jax.tree.map(total, scaled, rest, spanned, finite(handed)), failed

    system = _system(block, gram.outer(rows.x, h), bias, damping, relative, n)
    solvable = (jnp.asarray(system.damping) > 0) | ~present
    return _Problem(system._replace(solvable=solvable), update)


def _diagonal(
    incoming: Incoming, capture: Capture, damping: Any, relative: Any
) -> tuple[Matrices, jax.Array]:
    """U = N H / (counts + λ), row by row: a lookup's XᵀX is the diagonal of counts.

    Returns:
      U, or what is finite of H where U is not; and whether that happened.
    """
    block = capture.block
    (weight, _), counts = incoming.matrices(block), capture.second_moment()
    damping += relative * ridge.mean_eigenvalue(counts.sum(-1), min(block.rows, block.features))
    divisor = counts + along(jnp.broadcast_to(damping, counts.shape[:1]), counts)
    u = jnp.where(weight == 0, 0, incoming.batch_size * weight / divisor[..., None])
    failed = ~jnp.isfinite(u).all()
    return jax.tree.map(
        lambda u, h: jnp.where(failed, h, u), Matrices(u, None), finite(Matrices(weight, None))
    ), failed
