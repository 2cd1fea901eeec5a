"""Layer-specific adaptive learning rates (Singh et al., 2015; seed 004's second baseline)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cqjax.linalg.gram import accumulator
from cqjax.solves.matrices import finite


def scale_by_lsalr() -> optax.GradientTransformationExtraArgs:
    r"""Raises the rate of each layer the more, the smaller its gradient.

    .. math:: U_l = \left(1 + \log\left(1 + \frac{1}{\lVert G_l \rVert_2}\right)\right) G_l

    for the gradient :math:`G_l` of each array of parameters: an array is a layer. In the networks
    of seed 004, whose layers have one kernel each and nothing else, that is the paper's rate; a
    bias gets a rate of its own.

    The factor is computed in at least float32, and neither overflows nor underflows with the norm:
    it is 47 for a norm of 1e-20. A gradient of zero stays zero, and one that is not finite becomes
    zero.

    Returns:
      A transformation that needs no parameters in `update`. Its state is empty.

    Examples:
      >>> import cqjax, jax.numpy as jnp
      >>> grads = {"near": jnp.array([3.0, 4.0]), "far": jnp.array([3e-6, 4e-6])}
      >>> tx = cqjax.scale_by_lsalr()
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> for layer in grads:
      ...     print(layer, (updates[layer] / grads[layer]).round(3))
      near [1.182 1.182]
      far [13.206 13.206]

    References:
      Singh, De, Zhang, Goldstein and Taylor, Layer-specific adaptive learning rates for deep
      networks (ICMLA 2015); seed 004, section 4.1.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        return finite(jax.tree.map(_scaled, updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(gradient: jax.Array) -> jax.Array:
    """(1 + log(1 + 1/‖G‖)) G, with the logarithm as softplus(-log ‖G‖)."""
    size = jnp.abs(gradient)
    size = size.astype(accumulator(size.dtype))
    largest = jnp.max(size, initial=0)
    largest = jnp.where(largest == 0, 1, largest)
    squared_norm = jnp.sum(jnp.square(size / largest))
    squared_norm = jnp.where(squared_norm == 0, 1, squared_norm)
    log_norm = jnp.log(largest) + jnp.log(squared_norm) / 2
    return (gradient * (1 + jax.nn.softplus(-log_norm))).astype(gradient.dtype)
