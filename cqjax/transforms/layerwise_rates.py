"""LSALR, layer-specific adaptive learning rates (Singh et al., 2015).

Zhang, Chen and Liu (2018) compare back-matching with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from cqjax.linalg.gram import accumulator
from cqjax.solves.matrices import finite


def scale_by_lsalr() -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each layer's gradient by a factor, which is larger for smaller gradients.

    .. math:: U_l = \left(1 + \log\left(1 + \frac{1}{\lVert G_l \rVert_2}\right)\right) G_l

    Here :math:`G_l` is the gradient of one array of parameters. Each array counts as a layer, so a
    bias has its own factor. In the networks of Zhang, Chen and Liu each layer has one kernel and
    nothing else; for these the factor is the paper's.

    The factor is computed in at least float32. It neither overflows nor underflows with the norm:
    for a norm of 1e-20 it is 47. A gradient of zero stays zero. One that is not finite becomes
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
      networks (ICMLA 2015). Zhang, Chen and Liu (2018), section 4.1.
    """
    scaled = optax.stateless(lambda updates, params: finite(jax.tree.map(_scaled, updates)))
    return optax.with_extra_args_support(scaled)


def _scaled(gradient: jax.Array) -> jax.Array:
    """(1 + log(1 + 1/‖G‖)) G."""
    # log(1 + 1/‖G‖) = softplus(-log ‖G‖), since 1/‖G‖ may overflow where its logarithm does not.
    # Entries are divided by the largest before they are squared, for the same reason.
    size = jnp.abs(gradient)
    size = size.astype(accumulator(size.dtype))
    largest = jnp.max(size, initial=0)
    largest = jnp.where(largest == 0, 1, largest)
    squared_norm = jnp.sum(jnp.square(size / largest))
    squared_norm = jnp.where(squared_norm == 0, 1, squared_norm)
    log_norm = jnp.log(largest) + jnp.log(squared_norm) / 2
    return (gradient * (1 + jax.nn.softplus(-log_norm))).astype(gradient.dtype)
