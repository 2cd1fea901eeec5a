"""Losses of the NeuronLearning notes (section 2.2) that Optax lacks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

Axis = int | tuple[int, ...] | None


def p_norm_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    p: ArrayLike = 2.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""The p-norm of the error, raised to the power p and divided by p.

    .. math::
      \ell_p = \frac{1}{p} \sum_i |x_i - \bar x_i|^p, \quad
      \frac{\partial \ell_p}{\partial x_i}
        = \operatorname{sgn}(x_i - \bar x_i) |x_i - \bar x_i|^{p - 1}

    for predictions x and targets x̄. The gradient is zero where the two are equal, even for p = 1.

    Args:
      predictions: x, of a floating dtype, shape (..., n).
      targets: x̄, of a floating dtype and the same shape.
      p: a number p ≥ 1; p = 2 gives half the squared error.
      axis: the axis, or axes, to sum over; None for all.
      where: which entries count; broadcast to the shape of the predictions; by default all.

    Returns:
      The losses, shape (...).

    Raises:
      ValueError: the shapes differ, a dtype is not a floating one, or p is not a finite number of
        at least 1.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> x, targets = jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 4.0, 2.0])
      >>> for p in (1.0, 2.0, 3.0):
      ...     print(*jax.value_and_grad(cqjax.p_norm_loss)(x, targets, p))
      5.0 [ 0. -1.  1.]
      6.5 [ 0. -2.  3.]
      11.666667 [ 0. -4.  9.]

    References:
      The NeuronLearning notes (author and date unknown), Eq. 14.
    """
    if isinstance(p, int | float | np.number) and not 1 <= p < math.inf:
        raise ValueError(f"p={p}: expected a finite number, 1 or more")
    x, target, dtype = _compatible(predictions, targets, where)
    error = x - target
    # JAX differentiates |x| at zero as if it increased. That is right for p > 1, in derivatives of
    # every order. For p = 1 it would be a gradient of 1, so zero takes the place of |x| there.
    size = jnp.where((error == 0) & (jnp.asarray(p) == 1), 0, jnp.abs(error))
    return (jnp.sum(size**p, axis) / p).astype(dtype)


def kullback_leibler(
    predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""The Kullback-Leibler divergence, weighted by the predictions.

    .. math::
      \ell_{KL} = \sum_i x_i \log \frac{x_i}{\bar x_i}, \quad
      \frac{\partial \ell_{KL}}{\partial x_i} = \log \frac{x_i}{\bar x_i} + 1

    for predictions x and targets x̄. Optax's `kl_divergence` is weighted by the targets:
    :math:`\sum_i \bar x_i \log (\bar x_i / x_i)`. Nothing here makes x sum to one. Over all
    positive x the minimum is at :math:`x = \bar x / e`, not at the targets. If you mean the
    targets, use `normalized_kullback_leibler`, or make the predictions by a softmax.

    In the logarithms, x and x̄ are raised to at least ε, the smallest normal number (1.2e-38 in
    float32). So a term with x = 0 is zero, and its derivative is log(ε / x̄) + 1, about −86, in the
    place of −∞. Where x̄ = 0 < x, loss and derivative are finite.

    Args:
      predictions: x ≥ 0, of a floating dtype, shape (..., n).
      targets: x̄ ≥ 0, of a floating dtype and the same shape.
      axis: the axis, or axes, to sum over; None for all.
      where: which entries count; broadcast to the shape of the predictions; by default all.

    Returns:
      The losses, shape (...).

    Raises:
      ValueError: the shapes differ, a dtype is not a floating one, or a NumPy array has a negative
        entry (JAX arrays are not checked, since their values may be unknown).

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> x, targets = jnp.array([0.0, 0.5, 0.5]), jnp.array([0.5, 0.25, 0.25])
      >>> loss, gradient = jax.value_and_grad(cqjax.kullback_leibler)(x, targets)
      >>> print(f"{loss:.4f} = log 2", gradient.round(1))
      0.6931 = log 2 [-85.6   1.7   1.7]

    References:
      The NeuronLearning notes (author and date unknown), Eq. 15.
    """
    x, target, dtype = _compatible(predictions, targets, where)
    _check_signs(predictions, "predictions", where)
    _check_signs(targets, "targets", where)
    return jnp.sum(_relative_entropy(x, target), axis).astype(dtype)


def normalized_kullback_leibler(
    predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""The Kullback-Leibler divergence of the targets from the normalised predictions.

    With :math:`X = \sum_i x_i`,

    .. math::
      L_{KL} = \frac{1}{X} \sum_i x_i \log \frac{x_i}{X \bar x_i}, \quad
      \frac{\partial L_{KL}}{\partial x_i}
        = \frac{1}{X} \left( \log \frac{x_i}{X \bar x_i} - L_{KL} \right),

    for predictions x and targets x̄, which should sum to one. Only the proportions of x count, so
    :math:`\sum_i x_i \, \partial L_{KL} / \partial x_i = 0`. The minimum is where the proportions
    equal the targets.

    In the logarithms, x / X and x̄ are raised to at least ε, as in `kullback_leibler`. Where all x
    are zero, X counts as 1: the loss is zero then, and a gradient step increases every x.

    Args:
      predictions: x ≥ 0, of a floating dtype, shape (..., n).
      targets: x̄ ≥ 0, of a floating dtype and the same shape.
      axis: the axis, or axes, to sum over; None for all.
      where: which entries count; broadcast to the shape of the predictions; by default all.

    Returns:
      The losses, shape (...).

    Raises:
      ValueError: the shapes differ, a dtype is not a floating one, or a NumPy array has a negative
        entry (JAX arrays are not checked, since their values may be unknown).

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> x, targets = jnp.array([2.0, 4.0, 6.0]), jnp.array([0.25, 0.25, 0.5])
      >>> loss, gradient = jax.value_and_grad(cqjax.normalized_kullback_leibler)(x, targets)
      >>> print(f"{loss:.4f}", f"{abs(x @ gradient):.4f}")
      0.0283 0.0000
      >>> print(f"{cqjax.normalized_kullback_leibler(100 * targets, targets):.4f}")
      0.0000

    References:
      The NeuronLearning notes (author and date unknown), Eqs. 13 and 16.
    """
    x, target, dtype = _compatible(predictions, targets, where)
    _check_signs(predictions, "predictions", where)
    _check_signs(targets, "targets", where)
    # The loss of c x is that of x for any constant c. With c = 1/X there is no factor 1/X² in the
    # derivative, which would overflow for small X.
    proportions = _normalized(_normalized(x, axis, constant=True), axis)
    return jnp.sum(_relative_entropy(proportions, target), axis).astype(dtype)


@jax.custom_jvp
def _relative_entropy(x: jax.Array, target: jax.Array) -> jax.Array:
    """The terms x log(x / x̄)."""
    return x * (_log(x) - _log(target))


@_relative_entropy.defjvp
def _relative_entropy_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Uses the derivative log(x / x̄) + 1 for every x, including zero."""
    (x, target), (dx, dtarget) = primals, tangents
    log_target, dlog_target = jax.jvp(_log, (target,), (dtarget,))
    log_ratio = _log(x) - log_target
    return x * log_ratio, (log_ratio + 1) * dx - x * dlog_target


def _log(x: jax.Array) -> jax.Array:
    """The logarithm of x, but at least that of ε."""
    # The floor is for the logarithm only, not for x itself. So the derivative of the loss is the
    # formula's, log(x / x̄) + 1, wherever that is finite.
    smallest = jnp.finfo(x.dtype).smallest_normal
    below = x < smallest
    # Where x is below, log(1) takes the place of log(x): log(0) would make the gradient NaN, even
    # though the outer `where` does not select it.
    return jnp.where(below, jnp.log(smallest), jnp.log(jnp.where(below, 1, x)))


def _normalized(x: jax.Array, axis: Axis, *, constant: bool = False) -> jax.Array:
    """The proportions x / X, or x where X is zero.

    If `constant`, X is a constant in derivatives.
    """
    total = jnp.sum(x, axis, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return x / (lax.stop_gradient(total) if constant else total)


def _compatible(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, Any]:
    """Checks both arrays and prepares them for the loss.

    Returns:
      The predictions and the targets, in at least float32, with zeros where entries do not count;
      and the loss's dtype.

    Raises:
      ValueError: the shapes differ, or a dtype is not a floating one.
    """
    x, target = jnp.asarray(predictions), jnp.asarray(targets)
    for name, array in (("predictions", x), ("targets", target)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} are of dtype {array.dtype}: expected a floating dtype")
    if x.shape != target.shape:
        raise ValueError(
            f"predictions have shape {x.shape} and targets {target.shape}: expected the same "
            "shape; use jnp.broadcast_to if you mean to broadcast"
        )
    dtype = jnp.promote_types(x.dtype, target.dtype)
    precise = jnp.promote_types(dtype, jnp.float32)
    x, target = x.astype(precise), target.astype(precise)
    if where is None:
        return x, target, dtype
    counts = jnp.broadcast_to(where, x.shape)
    return jnp.where(counts, x, 0), jnp.where(counts, target, 0), dtype


def _check_signs(array: ArrayLike, name: str, where: ArrayLike | None) -> None:
    """Refuses a NumPy array with negative entries that count.

    Raises:
      ValueError: an entry is negative.
    """
    if not isinstance(array, np.ndarray) or isinstance(where, jax.Array):
        return
    counts = np.asarray(True if where is None else where, bool)
    least = np.min(array, where=counts, initial=np.inf)
    if least < 0:
        raise ValueError(f"{name} have an entry {least}: expected none below zero")
