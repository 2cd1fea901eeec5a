"""`value_and_grad`: from a user's loss function to captures."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from cqjax.capture import tracing
from cqjax.capture.argnums import Argnums, Which
from cqjax.capture.block import Block
from cqjax.capture.captures import Capture, Captures
from cqjax.capture.checks import check_option
from cqjax.capture.options import Options, Reparametrized, Signal
from cqjax.capture.origins import Origin, record
from cqjax.capture.parameters import Selector
from cqjax.capture.plan import Plan
from cqjax.capture.statistics import Statistic
from cqjax.linalg import devices
from cqjax.program import matched
from cqjax.program.taps import Evaluation, Probes

PyTree = Any


class ValueAndGrad:
    """A loss that also returns captures: the result of `value_and_grad`.

    Call it with the loss's arguments.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        has_aux: bool,
        argnums: Argnums,
        on_uncovered: str,
        options: Options,
    ):
        if not isinstance(has_aux, bool):
            raise TypeError(
                f"has_aux={has_aux!r}: expected True or False (argnums= is passed by name)"
            )
        functools.update_wrapper(self, loss_fn, updated=())  # its attributes are not ours
        self._loss_fn = loss_fn
        self._has_aux = has_aux
        self._which = Which.of(argnums)
        self._on_uncovered = on_uncovered
        self._options = options

    def plan(self, /, *args: Any, **kwargs: Any) -> Plan:
        """What a call with these arguments captures, and what it costs. Runs nothing.

        Args:
          *args: the loss's arguments: the parameters, and others; arrays, or
            `jax.ShapeDtypeStruct`s.
          **kwargs: those passed by name.

        Returns:
          A `Plan`, which prints as a table.

        Raises:
          ValueError: as for `value_and_grad`; uncovered parameters are listed, not refused.
          TypeError: as for `value_and_grad`.
        """
        traced, _ = self._traced(args, kwargs)
        tracing.check_loss(traced.outputs, isinstance(traced.outputs, tuple | list))
        return traced.plan

    def __call__(self, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, Captures]:
        """The loss, its gradients, and the captures.

        Raises:
          TypeError: an argument is abstract.
        """
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((args, kwargs))):
            raise TypeError(
                "an argument is a jax.ShapeDtypeStruct: use cqjax.plan or jax.eval_shape"
            )
        with devices.mesh_entered((args, kwargs)):
            return self._evaluated(args, kwargs)

    def _evaluated(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, PyTree, Captures]:
        traced, params = self._traced(args, kwargs)
        tracing.check_loss(traced.outputs, self._has_aux)
        plan = traced.plan
        _report(plan, self._on_uncovered)
        if traced.size.doubt:
            warnings.warn(traced.size.doubt, stacklevel=3)
        sides = [side for block in plan.blocks for side in block.sides]
        sites = [site for side in sides for site in side.sites]
        weights, examples = traced.rows.weights(sites), traced.rows.examples(plan.examples)
        taps = {
            site.position: side.tap(site, weights.get(site.position), examples)
            for side in sides
            for site in side.sites
        }
        rules = matched.rules(plan.flow) if plan.signal == "matched" else {}
        evaluation = Evaluation(taps, rules, traced.rows.twins)

        def tapped(params: PyTree, probes: Probes) -> Any:
            return traced.results(evaluation(traced.jaxpr, jax.tree.leaves(params), probes))

        differentiate = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=self._has_aux)
        value, (grads, statistics) = differentiate(params, {at: t.zero() for at, t in taps.items()})
        gradients = dict(zip(traced.paths, jax.tree.leaves(grads), strict=True))
        record(gradients.values(), Origin.GRADIENT)

        def capture(block: Block) -> Capture:
            of_sites = (
                statistics[site.position].fold(site).of_all_devices(site.reduced)
                for site in block.sites
            )
            own = {path: gradients[path] for path in block.paths}
            other = None if block.other is None else capture(block.other)
            made, function = block.view.made, None
            if made is not None:
                function = traced.function(made, jax.tree.leaves(params))
            return Capture(tuple(of_sites), own, block, block.number(weights), other, function)

        return (
            value,
            grads,
            Captures(
                tuple(map(capture, plan.blocks)),
                _value(traced.size.value),
                _value(examples),
                plan.parameters,
                plan.flow,
                plan.unknown,
            ),
        )

    def _traced(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tracing.Traced, PyTree]:
        """The loss of these arguments, traced, and the parameters among them."""
        params, args, kwargs = self._which.split(self._loss_fn, args, kwargs)
        loss_fn = self._which.loss(self._loss_fn)
        return tracing.trace(loss_fn, self._options, params, args, kwargs), params


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    argnums: Argnums = 0,
    only: Selector | Sequence[Selector] | None = None,
    skip: Selector | Sequence[Selector] = (),
    on_uncovered: Literal["fallback", "warn", "error"] = "fallback",
    solver: Literal["auto", "primal", "dual"] = "auto",
    capture: type[Statistic] | None = None,
    batch_size: int | jax.Array | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    signal: Signal = "gradient",
    max_dim: int | None = None,
    block_size: int | None = None,
    precision: lax.PrecisionLike = "highest",
    reparametrized: Reparametrized = "uncovered",
) -> ValueAndGrad:
    """`jax.value_and_grad`, and what it met on the way.

    The function returned calls `loss_fn` as it is, once, and differentiates it in one backward
    pass. A *site* is a product Z = XW in `loss_fn` of an activation X and a parameter W. At every
    site it also captures what a solve for the effect of ΔW on Z needs: the rows of X and
    Z̄ = ∂L/∂Z, or XᵀX. Where W is a parameter V times constants of the program, as in
    `x @ (V / 8)`, or `(x @ V) / 8 + b`, the problem is that of W, the damping included. Where the
    loss has products Y = DWᵀ of the same weight, too, each side has its own statistic: that of D is
    in the capture's `other`.

    Call it under `jax.jit`, together with the update. Outside of `jax.jit` each call traces the
    loss anew. Together, the update sees that it was handed the gradient's
    own arrays, and need not compare.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar loss, or `(loss, aux)` if `has_aux`.
        Traced with abstract parameters, as under `jax.jit`; the other arguments are passed as
        they are.
      has_aux: whether `loss_fn` returns auxiliary data beside the loss.
      argnums: which arguments are the parameters: the place of one, or those of several. The
        gradients of several are a tuple, and so should be what an update is handed; the paths of
        their parameters begin with the place in this tuple ("0/w", "1/w").
      only: selects the parameters to capture; all by default. A pattern for paths, as in
        `fnmatch` ("params/Dense_*/kernel"), a class of Flax layers (`nn.Conv`), or several.
      skip: selects parameters to leave alone, in the same way.
      on_uncovered: what to do about a parameter for which there is no solve (the scale of a
        normalisation, say) and which is not skipped: keep its gradient ("fallback"), and warn
        ("warn"), or refuse ("error"). Where no parameter at all is covered, "fallback" warns too.
      solver: how a weight's update is solved for: "dual" from rows, "primal" from XᵀX, "auto" by
        what costs less, for each weight. A lookup's XᵀX is diagonal in any case, and a ragged
        product is solved for by the XᵀX of each group. Where the number of rows is a symbolic
        dimension of `jax.export`, "auto" is the primal.
      capture: what is captured of each product: `cqjax.Rows` or `cqjax.Gram` (XᵀX), or a class of
        your own derived from `cqjax.Statistic`. By default what the solver needs. Of a lookup, its
        counts are captured in any case (`cqjax.Counts`), and of a ragged product the XᵀX of each
        group (`cqjax.Groups`).
      batch_size: N, the number of terms that the loss averages over; a number, or a scalar array.
        By default it is read off the loss's program: the divisor of the sum over its terms (the
        size of what a mean is over, the sum of a mask), 1 for a sum. Constant factors are a scale
        of the loss. Of several means of data, the largest counts. Where the loss is no sum, N is
        the leading dimension that all arrays in `args` and `kwargs` have in common (random keys and
        scalars aside). The plan says which. For a loss that is multiplied by a scale S, as in mixed
        precision, `batch_size=N / S` gives the update of the loss without it.
      loss_reduction: "sum" if the loss adds its terms up: N is 1 then.
      signal: "matched" for back-matching's signal in the place of the gradient with respect to
        each layer's output: see `back_matching_value_and_grad`. The gradients of the parameters,
        and Z̄, come from it.
      max_dim: the largest matrix to be inverted; None for no limit. The dual inverts a matrix with
        a row for each row of X, the primal one with a row for each feature. A weight for which both
        are larger keeps its gradient, unless `block_size` is given. For weights that are used both
        ways, which need eigenvectors, None is 1,024; a lookup's side is never too large.
      block_size: such a weight is then solved for as if XᵀX had only diagonal blocks, of at most
        this many features. The blocks are of equal size; a convolution's have the whole window of
        some of the channels. A bias is solved for alone.
      precision: of the products with X on accelerators: of XᵀX, XXᵀ and, for the dual, that of Xᵀ
        with the solution; as in `jax.lax.dot_general`. Solves always have the highest.
      reparametrized: what to do where the loss makes a product's weight of parameters by more than
        moves and constants: W = f(V), as in weight normalisation and standardisation, spectral
        normalisation, `x @ (w * mask)` with masks that are drawn, passed or differ between outputs,
        quantisation with a straight-through gradient, products of parameters. f must not depend on
        the batch. "uncovered" leaves V its gradient. "nearest" solves for V: with the Jacobian J of
        f at V, the update is the ΔV whose J ΔV is nearest to the layer's own solution, by what it
        does to the outputs. See `scale_by_consequentialism`.

    Returns:
      A function with `loss_fn`'s arguments, whose results are those of
      `jax.value_and_grad(loss_fn, argnums, has_aux)` and a `Captures`, last. Its method `plan`,
      with the same arguments, says what is captured and at what cost, and runs nothing.

    Raises:
      ValueError: an argument is not one of those listed; `only` or `skip` selects nothing; two
        parameters have the same path; a parameter is uncovered and `on_uncovered="error"`.
      TypeError: a parameter is not real floating-point (a complex one may be skipped); the loss is
        not a real scalar, or comes with auxiliary data where `has_aux` says otherwise; `capture` is
        no statistic; the call has no arguments where `argnums` says.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> x, y = jnp.eye(2, 3), jnp.array([[1.0], [2.0]])
      >>> differentiate = cqjax.value_and_grad(loss_fn)
      >>> loss, grads, captures = differentiate(params, x, y)
      >>> print(loss, grads["w"][:2].ravel())
      1.25 [-0.5 -1. ]
      >>> (capture,) = captures["w"]
      >>> rows = capture.rows()
      >>> print(jnp.allclose(rows.x[0].T @ rows.dz[0], grads["w"]))
      True
      >>> print(differentiate.plan(params, x, y).blocks[0].solver)
      dual

    References:
      Paeedeh and Ghiasi-Shirazi, Improving the backpropagation algorithm with consequentialism
      weight updates over mini-batches, Algorithms 1 to 3.
    """
    check_option(on_uncovered, ("fallback", "warn", "error"), "on_uncovered")
    options = Options(
        only=only,
        skip=skip,
        solver=solver,
        capture=capture,
        batch_size=batch_size,
        loss_reduction=loss_reduction,
        signal=signal,
        max_dim=max_dim,
        block_size=block_size,
        precision=precision,
        reparametrized=reparametrized,
    )
    options.check()
    return ValueAndGrad(loss_fn, has_aux, argnums, on_uncovered, options)


def plan(loss_fn: Callable[..., Any], **options: Any) -> Callable[..., Plan]:
    """What `value_and_grad` captures: `cqjax.value_and_grad(loss_fn, **options).plan`.

    Args:
      loss_fn: as for `value_and_grad`; auxiliary results are ignored.
      **options: those of `value_and_grad`.

    Returns:
      A function with `loss_fn`'s arguments, which may be `jax.ShapeDtypeStruct`s. It traces the
      loss, runs nothing, and returns a `Plan`, which prints as a table.

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
    return value_and_grad(loss_fn, **options).plan


def _value(size: Any) -> Any:
    """A number of terms that may be an array in a pytree: of a symbolic one, its value."""
    return jnp.asarray(size) if is_symbolic_dim(size) else size


def _report(plan: Plan, on_uncovered: str) -> None:
    uncovered = plan.uncovered()
    in_vain = not plan.blocks and plan.signal == "gradient"  # nothing that cqjax does has an effect
    if not uncovered or (on_uncovered == "fallback" and not in_vain):
        return
    reasons = "\n".join(f"  {path}: {'; '.join(why)}" for path, why in uncovered.items())
    message = (
        f"{len(uncovered)} parameters are not covered and keep their gradient:\n{reasons}\n"
        'Name them in skip= if that is meant, or pass on_uncovered="fallback".'
    )
    if in_vain:
        message = (
            "no parameter is covered, and each keeps its gradient: csgd is plain SGD then, and "
            f"cadam plain Adam.\n{reasons}\n"
            'Name them in skip= if that is meant (all: skip="*").'
        )
    if on_uncovered == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)
