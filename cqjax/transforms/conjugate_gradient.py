"""Nonlinear conjugate gradients (the NeuronLearning notes, section 3.2)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from cqjax.capture.checks import check_option
from cqjax.solves.matrices import finite

Beta = Literal["fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan"]
OnAscent = Literal["restart", "reverse"]


class ScaleByConjugateGradientState(NamedTuple):
    """State of `scale_by_conjugate_gradient`. Both trees have the shapes of the parameters.

    Attributes:
      direction: −p, the last update.
      gradient: −r, the gradient that came with it; () for the two β that need only its norm.
      squared_norm: () r², in at least float32; zero before the first update.
      slope: () pᵀr, in at least float32; zero before the first update.
      restarts: () int32, how often the negative gradient replaced a direction.
    """

    direction: optax.Updates
    gradient: optax.Updates
    squared_norm: jax.Array
    slope: jax.Array
    restarts: jax.Array


def scale_by_conjugate_gradient(
    beta: Beta = "hestenes_stiefel", *, on_ascent: OnAscent = "restart"
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by a direction that is conjugate to the previous direction.

    With the negative gradient :math:`r = -\nabla f`, the directions are :math:`p_0 = r_0` and
    :math:`p_{n+1} = r_{n+1} + \beta_n p_n`, where

    .. math::
      \beta^{FR} = \frac{r_{n+1}^2}{r_n^2}, \quad
      \beta^{PR} = \frac{r_{n+1}^T (r_{n+1} - r_n)}{r_n^2}, \quad
      \beta^{HS} = -\frac{r_{n+1}^T (r_{n+1} - r_n)}{p_n^T (r_{n+1} - r_n)}, \quad
      \beta^{DY} = -\frac{r_{n+1}^2}{p_n^T (r_{n+1} - r_n)}

    are the β of Fletcher and Reeves, Polak and Ribière, Hestenes and Stiefel, and Dai and Yuan. On
    a quadratic, with exact steps, all four give the conjugate gradient method, which takes no more
    steps than there are parameters. On other functions, Hestenes and Stiefel's directions are
    conjugate whatever the steps, and suffer least from inexact line searches. The two β with
    :math:`r_{n+1}^2` in the numerator need one tree less, but may jam: once p is nearly orthogonal
    to r, it stays so for many short steps.

    As usual in Optax, the update is −p, and a negative rate follows. The method is meant for
    gradients of the whole objective, not of batches, and for line searches. Place
    `optax.scale_by_zoom_linesearch` or `optax.scale_by_backtracking_linesearch` behind it, after
    `optax.scale(-1.0)`. Inner products run over the whole tree, in at least float32.

    `on_ascent` chooses what to do if f does not decrease along p. With "restart", p is r again if
    :math:`p^T r \le 0`, and also if :math:`\beta^{PR} < 0`: without the latter, Polak and Ribière's
    method need not converge even with exact steps. With "reverse", the sign of p changes if
    :math:`p^T r < 0`. The rule of the NeuronLearning notes is "reverse" with Dai and Yuan's β and a
    fixed rate α:

    .. math::
      p_n = r_n + \frac{r_n^2}{z_{n-1} - r_n^T p_{n-1}} p_{n-1}, \quad
      z_n = p_n^T r_n, \quad x_{n+1} = x_n + \alpha \operatorname{sgn}(z_n) p_n

    (the next p does not depend on the sign of the previous one). With either choice, p is r again
    if β or p is undefined or not finite, or if :math:`p^T r = 0`. Entries that are not finite even
    then become zero.

    Args:
      beta: the β, by its authors.
      on_ascent: "restart" or "reverse".

    Returns:
      A transformation that needs no parameters in `update`.

    Raises:
      ValueError: `beta` or `on_ascent` is none of the names above.

    Examples:
      Rosenbrock's function, by line searches:

      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def rosenbrock(x):
      ...     return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
      >>> search = optax.scale_by_zoom_linesearch(max_linesearch_steps=20, curv_rtol=0.1)
      >>> tx = optax.chain(cqjax.scale_by_conjugate_gradient(), optax.scale(-1.0), search)
      >>> @jax.jit
      ... def step(x, state):
      ...     value, grad = jax.value_and_grad(rosenbrock)(x)
      ...     extra = {"value": value, "grad": grad, "value_fn": rosenbrock}
      ...     updates, state = tx.update(grad, state, x, **extra)
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.array([-1.2, 1.0])
      >>> state = tx.init(x)
      >>> for _ in range(30):
      ...     x, state = step(x, state)
      >>> print(x.round(3))
      [1. 1.]

      The rule of the NeuronLearning notes, whose second step is exact for a parabola, whatever the
      rate:

      >>> rule = cqjax.scale_by_conjugate_gradient("dai_yuan", on_ascent="reverse")
      >>> tx = optax.chain(rule, optax.scale(-0.01))
      >>> x = jnp.array(8.0)
      >>> state = tx.init(x)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(lambda x: 3 * (x - 5) ** 2)(x), state)
      ...     x = optax.apply_updates(x, updates)
      ...     print(f"{x:.4f}")
      7.8200
      5.0000

    References:
      The NeuronLearning notes (author and date unknown), Eqs. 34 to 37 and the rules after them. On
      Polak and Ribière's β: Gilbert and Nocedal, Global convergence properties of conjugate
      gradient methods for optimization (SIAM J. Optim. 2, 1992). On jams: Powell, Restart
      procedures for the conjugate gradient method (Math. Program. 12, 1977).
    """
    # Hestenes and Stiefel's β is the default since it alone converged in all of 80 runs: on
    # Rosenbrock's function in 2 and in 10 dimensions, by four line searches, from ten starts. In 10
    # dimensions the two β with r² in the numerator jammed.
    check_option(beta, get_args(Beta), "beta")
    check_option(on_ascent, get_args(OnAscent), "on_ascent")
    by_change = beta in {"polak_ribiere", "hestenes_stiefel"}
    by_slope = beta in {"hestenes_stiefel", "dai_yuan"}

    # Below, r is the gradient and p the update: both are the negatives of those in the docstring.
    # Products of two of them are the same, and so is β.

    def init(params: optax.Params) -> ScaleByConjugateGradientState:
        zeros = optax.tree.zeros_like(params)
        return ScaleByConjugateGradientState(
            direction=zeros,
            gradient=optax.tree.zeros_like(params) if by_change else (),
            squared_norm=_inner(zeros, zeros),
            slope=_inner(zeros, zeros),
            restarts=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        r = updates
        squared_norm = _inner(r, r)
        if by_change:
            numerator = _inner(r, optax.tree.sub(r, state.gradient))
        else:
            numerator = squared_norm
        denominator = state.slope - _inner(r, state.direction) if by_slope else state.squared_norm
        defined = (denominator != 0) & jnp.isfinite(denominator)
        b = jnp.where(defined, numerator / jnp.where(defined, denominator, 1), 0)
        p = jax.tree.map(lambda r, p: (r + b * p).astype(r.dtype), r, state.direction)
        slope = _inner(p, r)
        if on_ascent == "reverse":
            p = jax.tree.map(lambda p: jnp.where(slope < 0, -p, p), p)
            slope = jnp.abs(slope)
        elif beta == "polak_ribiere":  # β clipped at zero: see Gilbert and Nocedal
            defined &= b >= 0
        kept = defined & (slope > 0) & (slope < math.inf)
        p = finite(jax.tree.map(lambda p, r: jnp.where(kept, p, r), p, r))
        # Neither the first direction nor one of a zero gradient counts as a restart.
        given_up = ~kept & (state.slope > 0) & (squared_norm != 0)
        new = ScaleByConjugateGradientState(
            direction=p,
            gradient=r if by_change else (),
            squared_norm=squared_norm,
            slope=jnp.where(kept, slope, squared_norm),
            restarts=state.restarts + given_up,
        )
        return p, optax.tree.cast_like(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _inner(a: optax.Updates, b: optax.Updates) -> jax.Array:
    """The real inner product of two trees, (), in at least float32."""
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(a))
    # Not `optax.tree.vdot`, whose product of vectors is ambiguous where explicit axes split them.
    a, b = (optax.tree.cast(tree, dtype) for tree in (a, b))
    products = jax.tree.map(lambda a, b: jnp.sum((a.conj() * b).real), a, b)
    return jnp.asarray(optax.tree.sum(products))
