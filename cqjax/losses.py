"""Losses of seed 003 that Optax lacks (section 2.2)."""

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
    r"""The p-norm of the error, to the power p.

    .. math::
      \ell_p = \frac{1}{p} \sum_i |x_i - \bar x_i|^p, \quad
      \frac{\partial \ell_p}{\partial x_i}
        = \operatorname{sgn}(x_i - \bar x_i) |x_i - \bar x_i|^{p - 1}

    for predictions x and targets x̄. Where the two are equal, the gradient is zero, for p = 1 too.

    Args:
      predictions: x, of a floating dtype, shape (..., n).
      targets: x̄, of a floating dtype and the same shape.
      p: a number p ≥ 1; p = 2 is half the squared error.
      axis: the axis, or axes, to sum over; None is all.
      where: which entries count, broadcast to the shape of the predictions; by default all.

    Returns:
      The losses, shape (...).

    Raises:
      ValueError: shapes differ, a dtype is not a floating one, or p is not a number from 1 on.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> x, targets = jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 4.0, 2.0])
      >>> for p in (1.0, 2.0, 3.0):
      ...     print(*jax.value_and_grad(cqjax.p_norm_loss)(x, targets, p))
      5.0 [ 0. -1.  1.]
      6.5 [ 0. -2.  3.]
      11.666667 [ 0. -4.  9.]

    References:
      Seed 003, Eq. 14.
    """
    if isinstance(p, int | float | np.number) and not 1 <= p < math.inf:
        raise ValueError(f"p={p}: expected a finite number, 1 or more")
    x, target, dtype = _compatible(predictions, targets, where)
    error = x - target
    # JAX differentiates |.| at zero as if it increased: right where p > 1, at all orders.
    size = jnp.where((error == 0) & (jnp.asarray(p) == 1), 0, jnp.abs(error))
    return (jnp.sum(size**p, axis) / p).astype(dtype)


def kullback_leibler(
    predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""The Kullback-Leibler divergence of the targets from the predictions.

    .. math::
      \ell_{KL} = \sum_i x_i \log \frac{x_i}{\bar x_i}, \quad
      \frac{\partial \ell_{KL}}{\partial x_i} = \log \frac{x_i}{\bar x_i} + 1

    for predictions x and targets x̄. Optax's `kl_divergence` is the other one,
    :math:`\sum_i \bar x_i \log (\bar x_i / x_i)`. Nothing here makes x sum to one: over all
    positive x the least value is where :math:`x = \bar x / e`. If that is not meant, use
    `normalized_kullback_leibler`, or a softmax.

    Within the logarithms, x and x̄ are raised to at least ε, the smallest normal number (1.2e-38 in
    float32). So where x = 0, the term is zero and its derivative is log(ε / x̄) + 1, about −86,
    rather than −∞; and where x̄ = 0 < x, loss and derivative are finite.

    Args:
      predictions: x ≥ 0, of a floating dtype, shape (..., n).
      targets: x̄ ≥ 0, of a floating dtype and the same shape.
      axis: the axis, or axes, to sum over; None is all.
      where: which entries count, broadcast to the shape of the predictions; by default all.

    Returns:
      The losses, shape (...).

    Raises:
      ValueError: shapes differ, a dtype is not a floating one, or a NumPy array has a negative
        entry (arrays of JAX are not looked at).

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> x, targets = jnp.array([0.0, 0.5, 0.5]), jnp.array([0.5, 0.25, 0.25])
      >>> loss, gradient = jax.value_and_grad(cqjax.kullback_leibler)(x, targets)
      >>> print(f"{loss:.4f} = log 2", gradient.round(1))
      0.6931 = log 2 [-85.6   1.7   1.7]

    References:
      Seed 003, Eq. 15.
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
    :math:`\sum_i x_i \, \partial L_{KL} / \partial x_i = 0`; the least value is where they are the
    targets'.

    Within the logarithms, x / X and x̄ are raised to at least ε, as in `kullback_leibler`. Where all
    x are zero, X counts as 1, so that the loss is zero and a gradient step increases every x.

    Args:
      predictions: x ≥ 0, of a floating dtype, shape (..., n).
      targets: x̄ ≥ 0, of a floating dtype and the same shape.
      axis: the axis, or axes, to sum over; None is all.
      where: which entries count, broadcast to the shape of the predictions; by default all.

    Returns:
      The losses, shape (...).

    Raises:
      ValueError: shapes differ, a dtype is not a floating one, or a NumPy array has a negative
        entry (arrays of JAX are not looked at).

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> x, targets = jnp.array([2.0, 4.0, 6.0]), jnp.array([0.25, 0.25, 0.5])
      >>> loss, gradient = jax.value_and_grad(cqjax.normalized_kullback_leibler)(x, targets)
      >>> print(f"{loss:.4f}", f"{abs(x @ gradient):.4f}")
      0.0283 0.0000
      >>> print(f"{cqjax.normalized_kullback_leibler(100 * targets, targets):.4f}")
      0.0000

    References:
      Seed 003, Eqs. 13 and 16.
    """
    x, target, dtype = _compatible(predictions, targets, where)
    _check_signs(predictions, "predictions", where)
    _check_signs(targets, "targets", where)
    # The loss of c x is that of x for any constant c; c = 1/X spares the derivative a 1/X².
    proportions = _normalized(_normalized(x, axis, constant=True), axis)
    return jnp.sum(_relative_entropy(proportions, target), axis).astype(dtype)


@jax.custom_jvp
def _relative_entropy(x: jax.Array, target: jax.Array) -> jax.Array:
    """Entries x log(x / x̄)."""
    return x * (_log(x) - _log(target))


@_relative_entropy.defjvp
def _relative_entropy_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """With the derivative log(x / x̄) + 1 wherever x is, zero included."""
    (x, target), (dx, dtarget) = primals, tangents
    log_target, dlog_target = jax.jvp(_log, (target,), (dtarget,))
    log_ratio = _log(x) - log_target
    return x * log_ratio, (log_ratio + 1) * dx - x * dlog_target


def _log(x: jax.Array) -> jax.Array:
    """Logarithm of x, or of ε where x is less."""
    smallest = jnp.finfo(x.dtype).smallest_normal
    less = x < smallest
    return jnp.where(less, jnp.log(smallest), jnp.log(jnp.where(less, 1, x)))


def _normalized(x: jax.Array, axis: Axis, *, constant: bool = False) -> jax.Array:
    """Proportions x / X, or x where X is zero; X is a constant to differentiation if `constant`."""
    total = jnp.sum(x, axis, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return x / (lax.stop_gradient(total) if constant else total)


def _compatible(
    predictions: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, Any]:
    """Both arrays in at least float32, with zeros where they do not count; and the loss's dtype.

    Raises:
      ValueError: shapes differ, or a dtype is not a floating one.
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
      ValueError: it has one.
    """
    if not isinstance(array, np.ndarray) or isinstance(where, jax.Array):
        return
    counts = np.asarray(True if where is None else where, bool)
    least = np.min(array, where=counts, initial=np.inf)
    if least < 0:
        raise ValueError(f"{name} have an entry {least}: expected none below zero")
