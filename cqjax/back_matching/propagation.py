"""Back-matching as a whole: the matched signal, and the weights' update that goes with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from cqjax.capture.checks import check_option
from cqjax.capture.value_and_grad import value_and_grad
from cqjax.transforms.consequentialism import scale_by_consequentialism

PyTree = Any


def back_matching_value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    weights: Literal["ridge", "plain"] = "ridge",
    damping: float = 0.0,
    relative_damping: float = 0.1,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""`jax.value_and_grad` by back-matching propagation: exact, without the paper's shortcuts.

    Backpropagation hands a layer the derivative with respect to its output; back-matching hands it
    the change of its output that best brings about the change that the layer above was asked for.
    With :math:`\delta b` the signal on the output of a layer and each entry :math:`a_j` of its
    input on its own (Eq. 11),

    .. math::
      \delta' a_j = \arg\min_\alpha \lVert \delta b - w_j \alpha \rVert^2
                  = \frac{w_j^T \delta b}{w_j^T w_j},

    where :math:`w_j` are all weights that touch :math:`a_j`: fewer at the borders of a convolution.
    So :math:`\delta' a_j` is 0 where they are all zero (the solution of least norm). A
    normalisation :math:`b = r (a - \mathrm{E}[a]) + \beta` with
    :math:`r = \gamma / \sqrt{\mathrm{Var} + \epsilon}` hands on :math:`\delta' a = \delta b / r`,
    its statistics held constant (Eq. 26). That is what least squares give for batch normalisation
    in large batches; for layer, group, instance and root-mean-square normalisation likewise if many
    entries share their statistics, since one entry's own part in them falls off with their number.
    Everything else (activations, pooling, sums, attention's softmax) passes the signal as in
    backpropagation, and where a value has several readers their signals add up: those of the
    copies, too, that circular or reflecting padding makes of it.

    Products are found in the loss's jaxpr whoever wrote the layer; normalisations are Flax
    Linen's. Other layers with parameters are passed as in backpropagation:
    `cqjax.plan(loss_fn, signal="matched")` names them.

    With `weights="ridge"` a layer's weight gets (Eqs. 13 and 23)

    .. math:: \delta' W = (\mathrm{E}[a a^T])^{-1} \mathrm{E}[a\, \delta' b^T],

    damped as by `scale_by_consequentialism`, bias included. Several steps in one transformation
    chain: take `cqjax.value_and_grad(loss_fn, signal="matched")`, whose captures and gradients are
    those of the matched signal, and chain `scale_by_consequentialism` with what you like; this
    function is that pair without a state.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar loss, or `(loss, aux)` if `has_aux`.
      has_aux: whether `loss_fn` returns auxiliary data beside the loss.
      weights: "plain" leaves out the inverse: :math:`\mathrm{E}[a\, \delta' b^T]`, what
        backpropagation makes of the matched signal.
      damping: λ ≥ 0 of the ridge solve, a number.
      relative_damping: as in `scale_by_consequentialism`.
      **options: those of `value_and_grad`. `only` and `skip` say which parameters are solved for;
        the signal is matched everywhere.

    Returns:
      A function with `loss_fn`'s arguments that returns what `jax.value_and_grad(loss_fn,
      has_aux=has_aux)` returns, with the updates in the gradients' place. Parameters without a
      solve have the gradient from the matched signal.

    Raises:
      ValueError: an argument is not one of those listed, or as `value_and_grad` and
        `scale_by_consequentialism`.
      TypeError: as `value_and_grad`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w1"] @ params["w2"] - y) ** 2, -1))
      >>> params = {"w1": jnp.eye(2), "w2": jnp.array([[3.0, 0.0], [0.0, 0.5]])}
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[6.0, 0.0], [0.0, 1.0]])
      >>> value_and_grad = cqjax.back_matching_value_and_grad(loss_fn, relative_damping=0.0)
      >>> loss, updates = value_and_grad(params, x, y)
      >>> w1 = params["w1"] - updates["w1"]  # as if it were the only layer to change
      >>> print(f"{loss:.4f} {loss_fn(params | {'w1': w1}, x, y):.4f}")
      2.3125 0.0000

    References:
      Zhang, Chen and Liu, Train feedforward neural network with layer-wise adaptive rate via
      approximating back-matching propagation, Eqs. 8, 11 to 15, 22, 23, 26 and 30.
    """
    check_option(weights, ("ridge", "plain"), "weights")
    evaluate = value_and_grad(loss_fn, has_aux, signal="matched", **options)
    solve = scale_by_consequentialism(damping=damping, relative_damping=relative_damping)

    @functools.wraps(loss_fn)
    def matched(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        value, grads, captures = evaluate(params, *args, **kwargs)
        if weights == "ridge":
            grads, _ = solve.update(grads, solve.init(params), params, captures=captures)
        return value, grads

    return matched
