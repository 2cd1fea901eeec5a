"""`value_and_grad` and `plan`: from a user's loss function to captures."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.capture import matching, tap, tracing
from cqjax.capture.block import Cost
from cqjax.capture.captures import Capture, Captures
from cqjax.capture.plan import Plan, Selector, Signal

PyTree = Any


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    only: Selector | Sequence[Selector] | None = None,
    skip: Selector | Sequence[Selector] = (),
    on_uncovered: Literal["fallback", "warn", "error"] = "fallback",
    solver: Literal["auto", "primal", "dual"] = "auto",
    batch_size: int | jax.Array | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    signal: Signal = "gradient",
    max_dim: int | None = None,
    block_size: int | None = None,
    subsample: int = 1,
    precision: lax.PrecisionLike = "highest",
) -> Callable[..., tuple[Any, PyTree, Captures]]:
    """`jax.value_and_grad` with respect to the first argument, and what it met on the way.

    The function returned calls `loss_fn` as it is, once, and differentiates it in one backward
    pass. Call it under `jax.jit`, with the update: each call traces the loss anew, and a
    transformation that meets the very arrays of the gradient need not compute them. At every
    product Z = XW of an activation and a parameter it also captures what a solve
    for the effect of ΔW on Z needs: the rows of X and Z̄ = ∂L/∂Z, or XᵀX.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar loss, or `(loss, aux)` if `has_aux`.
        Traced with abstract parameters, as under `jax.jit`; the other arguments are passed as
        they are.
      has_aux: whether `loss_fn` returns auxiliary data beside the loss.
      only: selects the parameters to capture; all by default. A pattern for paths, as in
        `fnmatch` ("params/Dense_*/kernel"), a class of Flax layers (`nn.Conv`), or several.
      skip: selects parameters to leave alone, in the same way.
      on_uncovered: what to do about a parameter for which there is no solve (the scale of a
        normalisation, say) and which is not skipped: keep its gradient ("fallback"), and warn
        ("warn"), or refuse ("error").
      solver: "dual" captures rows, "primal" XᵀX; "auto" what costs less, for each weight. A
        lookup's XᵀX is diagonal in any case.
      batch_size: N, the number of terms that the loss averages over; an integer, or a scalar
        array (the number of examples that a mask leaves, say). By default the leading dimension
        that all arrays in `args` and `kwargs` have in common (random keys and scalars aside).
        Pass it where a mean runs over more than that dimension (batch x time, for tokens), and
        where arguments hold arrays that are no batch (statistics of a normalisation).
      loss_reduction: "sum" if the loss adds its terms up: N is 1 then.
      signal: "matched" for back-matching's signal in the place of the gradient with respect to
        each layer's output: see `back_matching_value_and_grad`. The gradients of the parameters,
        and Z̄, come from it.
      max_dim: the largest matrix to be inverted; None for no limit. The dual inverts one of as many
        rows as the weight's product has, the primal one of as many as it has features. A weight for
        which both are larger keeps its gradient,
      block_size: unless this is given: it is then solved for as if diagonal blocks of at most so
        many features were all there is of XᵀX, and a bias were a layer of its own. The blocks are
        of equal size, and a convolution's have the whole window of some channels.
      subsample: the primal takes XᵀX from one in so many rows, or examples of a convolution, and
        multiplies it accordingly; from more, where fewer than twice as many rows as features would
        be left. (Rows that were captured are all used in the dual.)
      precision: of the products with X on accelerators: of XᵀX, XXᵀ and, for the dual, that of Xᵀ
        with the solution; as in `jax.lax.dot_general`. Solves always have the highest.

    Returns:
      A function with `loss_fn`'s arguments, whose results are those of
      `jax.value_and_grad(loss_fn, has_aux=has_aux)` and a `Captures`, last.

    Raises:
      ValueError: an argument is not one of those listed; `only` or `skip` selects nothing; two
        parameters have the same path; a parameter is uncovered and `on_uncovered="error"`.
      TypeError: a parameter is not real floating-point; the loss is not a real scalar, or comes
        with auxiliary data where `has_aux` says otherwise.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> x, y = jnp.eye(2, 3), jnp.array([[1.0], [2.0]])
      >>> loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
      >>> print(loss, grads["w"][:2].ravel())
      1.25 [-0.5 -1. ]
      >>> (capture,) = captures["w"]
      >>> rows = capture.rows()
      >>> print(jnp.allclose(rows.x[0].T @ rows.dz[0], grads["w"]))
      True

    References:
      Paeedeh and Ghiasi-Shirazi, Improving the backpropagation algorithm with consequentialism
      weight updates over mini-batches (seed 000), Algorithms 1 to 3.
    """
    tracing.check(on_uncovered, ("fallback", "warn", "error"), "on_uncovered")
    cost = Cost(solver, max_dim, block_size, subsample, precision)
    trace = tracing.tracer(loss_fn, only, skip, cost, batch_size, loss_reduction, signal)

    @functools.wraps(loss_fn)
    def evaluate(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, Captures]:
        if any(
            isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((params, args, kwargs))
        ):
            raise TypeError(
                "an argument is a jax.ShapeDtypeStruct: use cqjax.plan or jax.eval_shape"
            )
        traced = trace(params, args, kwargs)
        tracing.check_loss(traced.outputs, has_aux)
        _report(traced.plan, on_uncovered)
        blocks = traced.plan.blocks
        rules = matching.rules(traced.plan.layers.flow) if signal == "matched" else {}
        taps = tap.taps(blocks)
        evaluation = tap.Evaluation(taps, rules)

        def tapped(params: PyTree, probes: tap.Probes) -> Any:
            results = evaluation(traced.jaxpr, jax.tree.leaves(params), probes)
            structure = jax.tree.structure(traced.outputs)
            return jax.tree.unflatten(structure, map(jnp.asarray, results))

        differentiate = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=has_aux)
        value, (grads, statistics) = differentiate(params, {at: t.zero() for at, t in taps.items()})
        gradients = dict(zip(traced.paths, jax.tree.leaves(grads), strict=True))
        captures = tuple(
            Capture(
                tuple(block.fold(site, statistics[site.position]) for site in block.sites),
                {path: gradients[path] for path in block.paths},
                block,
            )
            for block in blocks
        )
        made = traced.plan
        return value, grads, Captures(captures, made.batch_size, made.layers, made.examples)

    return evaluate


def plan(
    loss_fn: Callable[..., Any],
    *,
    only: Selector | Sequence[Selector] | None = None,
    skip: Selector | Sequence[Selector] = (),
    solver: Literal["auto", "primal", "dual"] = "auto",
    batch_size: int | jax.Array | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    signal: Signal = "gradient",
    max_dim: int | None = None,
    block_size: int | None = None,
    subsample: int = 1,
    precision: lax.PrecisionLike = "highest",
) -> Callable[..., Plan]:
    """What `value_and_grad` with the same arguments captures, and what it costs.

    The function returned traces the loss and runs nothing: its arguments may be arrays or
    `jax.ShapeDtypeStruct`s.

    Args:
      loss_fn: as for `value_and_grad`; auxiliary results are ignored.
      only: as for `value_and_grad`.
      skip: as for `value_and_grad`.
      solver: as for `value_and_grad`.
      batch_size: as for `value_and_grad`.
      loss_reduction: as for `value_and_grad`.
      signal: as for `value_and_grad`; with "matched" the table names what its signal passes as in
        backpropagation.
      max_dim: as for `value_and_grad`.
      block_size: as for `value_and_grad`.
      subsample: as for `value_and_grad`.
      precision: as for `value_and_grad`.

    Returns:
      A function with `loss_fn`'s arguments that returns a `Plan`, which prints as a table.

    Raises:
      ValueError: as for `value_and_grad`.
      TypeError: as for `value_and_grad`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     return jnp.mean((x @ params["w"] + params["b"]) ** 2 * params["scale"])
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4), "scale": jnp.ones(())}
      >>> plan = cqjax.plan(loss_fn)(params, jax.ShapeDtypeStruct((32, 8), jnp.float32))
      >>> [(p.path, p.status) for p in plan.parameters]
      [('b', 'covered'), ('scale', 'uncovered'), ('w', 'covered')]
      >>> plan.uncovered()
      {'scale': ('enters `mul`, which is no matrix product',)}
    """
    cost = Cost(solver, max_dim, block_size, subsample, precision)
    trace = tracing.tracer(loss_fn, only, skip, cost, batch_size, loss_reduction, signal)

    @functools.wraps(loss_fn)
    def describe(params: PyTree, *args: Any, **kwargs: Any) -> Plan:
        traced = trace(params, args, kwargs)
        tracing.check_loss(traced.outputs, isinstance(traced.outputs, tuple | list))
        return traced.plan

    return describe


def _report(plan: Plan, on_uncovered: str) -> None:
    uncovered = plan.uncovered()
    if on_uncovered == "fallback" or not uncovered:
        return
    reasons = "\n".join(f"  {path}: {'; '.join(why)}" for path, why in uncovered.items())
    message = (
        f"{len(uncovered)} parameters are not covered and keep their gradient:\n{reasons}\n"
        'Name them in skip= if that is meant, or pass on_uncovered="fallback".'
    )
    if on_uncovered == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)
