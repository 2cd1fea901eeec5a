"""NLMS (normalised least mean squares) for mini-batches, with each row normalised on its own.

This is the first extension that Paeedeh and Ghiasi-Shirazi (2020) try, in section 4.2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from cqjax.capture.checks import check_number
from cqjax.linalg.gram import accumulator
from cqjax.solves import foreign
from cqjax.solves.layer import Layer
from cqjax.solves.layers import for_each_layer
from cqjax.solves.matrices import Matrices, along, decomposed, product


def scale_by_nlms(eps: float = 1e-3) -> optax.GradientTransformationExtraArgs:
    r"""Divides each row's contribution to the gradient by the row's squared norm.

    Let :math:`x_i` be the rows of a layer's input (a bias counts as a further, constant feature),
    :math:`\bar z_i` the loss's gradient with respect to their outputs, and :math:`N` the number of
    terms that the loss averages over. The update is

    .. math:: U = N \sum_i \frac{x_i \bar z_i^T}{\lVert x_i \rVert^2 + \epsilon}.

    For one row it equals `scale_by_consequentialism` with :math:`\lambda = \epsilon`. In a batch,
    rows that are not orthogonal disturb each other. The paper presents this method to show that it
    is unstable for mini-batches, and it is here for that comparison.

    A row whose squared norm overflows contributes nothing. Entries of the result that are not
    finite become zero. Weights that the loss uses both ways, as XW and as DWᵀ, keep their gradient.

    The method needs rows, so take the gradient with
    `cqjax.value_and_grad(loss_fn, capture=cqjax.Rows)`. If an earlier member of a chain scaled the
    gradient, the update is scaled too. If it added something, that is added to the update as it is.

    Args:
      eps: ε ≥ 0, in units of the squared length of an input row.

    Returns:
      A transformation whose `update` takes the keyword argument `captures`. Its state is empty.

    Raises:
      ValueError: `eps` is negative or NaN. In `update`: there are no captures, or they hold no rows
        or belong to other parameters, or the batch size is unknown.
      TypeError: in `update`, `captures` are not the last result of `cqjax.value_and_grad`.

    Examples:
      >>> import cqjax, jax.numpy as jnp
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> params = {"w": jnp.zeros((2, 1))}
      >>> x, y = jnp.array([[3.0, 4.0]]), jnp.array([[2.0]])
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn, capture=cqjax.Rows)(params, x, y)
      >>> tx = cqjax.scale_by_nlms(eps=0.0)
      >>> updates, _ = tx.update(grads, tx.init(params), captures=captures)
      >>> print(x @ (params["w"] - updates["w"]))
      [[2.]]

    References:
      Paeedeh and Ghiasi-Shirazi, Improving the backpropagation algorithm with consequentialism
      weight updates over mini-batches (2020), Eqs. 49 and 50.
    """
    check_number(eps, "eps")
    return for_each_layer(functools.partial(_normalised, eps), "scale_by_nlms")


def _normalised(eps: float, layer: Layer) -> Matrices | None:
    """The layer's update; None to keep it."""
    foreign.found([layer], "scale_by_nlms")
    if layer.other is not None:
        return None
    n = layer.terms
    if layer.block.statistic.diagonal:  # a lookup's one-hot rows have norm 1
        return Matrices(n * layer.update.weight / (1 + eps), None)
    rows = layer.rows()
    dtype = accumulator(rows.x.dtype)
    norms = jnp.sum(jnp.square(rows.x.astype(dtype)), -1)
    if rows.h is not None:
        norms += jnp.square(rows.h.astype(dtype))
    coefficients = jnp.where(norms + eps > 0, n / (norms + eps), 0)
    scaled = product(rows.x, coefficients[..., None] * rows.dz.astype(dtype), rows.h)
    if layer.block.exact and layer.is_gradient:
        return scaled
    scale, rest, _ = decomposed(layer.update, layer.gradient, layer.dtype)
    return jax.tree.map(lambda u, r: along(scale, u) * u + r, scaled, rest)
