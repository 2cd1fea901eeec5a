"""`value_and_grad` and `plan`: from a user's loss function to captures."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.capture import linen, tap
from cqjax.capture.captures import Capture, Captures, path_of
from cqjax.capture.plan import Plan, Selector, make_plan
from cqjax.capture.walk import Walk

PyTree = Any


class _Traced(NamedTuple):
    """A loss, traced.

    Attributes:
      jaxpr: its closed jaxpr; the inputs are the parameters' leaves, the first output the loss.
      outputs: its results, as `jax.ShapeDtypeStruct`s.
      paths: paths of the parameters' leaves.
      plan: what is captured of it.
    """

    jaxpr: Any
    outputs: PyTree
    paths: list[str]
    plan: Plan


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
    _check(on_uncovered, ("fallback", "warn", "error"), "on_uncovered")
    trace = _tracer(loss_fn, only, skip, solver, batch_size, loss_reduction)

    @functools.wraps(loss_fn)
    def evaluate(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, Captures]:
        if any(
            isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((params, args, kwargs))
        ):
            raise TypeError(
                "an argument is a jax.ShapeDtypeStruct: use cqjax.plan or jax.eval_shape"
            )
        traced = trace(params, args, kwargs)
        _check_loss(traced.outputs, has_aux)
        _report(traced.plan, on_uncovered)
        blocks = traced.plan.blocks
        evaluation = tap.Evaluation(tap.taps(blocks))

        def tapped(params: PyTree, probes: tap.Probes) -> Any:
            results = evaluation(traced.jaxpr, jax.tree.leaves(params), probes)
            structure = jax.tree.structure(traced.outputs)
            return jax.tree.unflatten(structure, map(jnp.asarray, results))

        differentiate = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=has_aux)
        value, (grads, statistics) = differentiate(params, tap.zero_probes(blocks))
        gradients = dict(zip(traced.paths, jax.tree.leaves(grads), strict=True))
        captures = tuple(
            Capture(
                tuple(block.fold(site, statistics[site.position]) for site in block.sites),
                {path: gradients[path] for path in block.paths},
                block,
            )
            for block in blocks
        )
        return value, grads, Captures(captures, traced.plan.batch_size)

    return evaluate


def plan(
    loss_fn: Callable[..., Any],
    *,
    only: Selector | Sequence[Selector] | None = None,
    skip: Selector | Sequence[Selector] = (),
    solver: Literal["auto", "primal", "dual"] = "auto",
    batch_size: int | jax.Array | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
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
    trace = _tracer(loss_fn, only, skip, solver, batch_size, loss_reduction)

    @functools.wraps(loss_fn)
    def describe(params: PyTree, *args: Any, **kwargs: Any) -> Plan:
        traced = trace(params, args, kwargs)
        _check_loss(traced.outputs, isinstance(traced.outputs, tuple | list))
        return traced.plan

    return describe


def _tracer(
    loss_fn: Callable[..., Any],
    only: Selector | Sequence[Selector] | None,
    skip: Selector | Sequence[Selector],
    solver: Literal["auto", "primal", "dual"],
    batch_size: int | jax.Array | None,
    loss_reduction: Literal["mean", "sum"],
) -> Callable[[PyTree, tuple, dict], _Traced]:
    """The part that `value_and_grad` and `plan` have in common: trace, walk, plan.

    Raises:
      ValueError: an option is not one of those listed.
    """
    _check(solver, ("auto", "primal", "dual"), "solver")
    _check(loss_reduction, ("mean", "sum"), "loss_reduction")
    if batch_size is not None and jnp.ndim(batch_size):
        raise ValueError(f"batch_size has shape {jnp.shape(batch_size)}: expected a scalar")
    if isinstance(batch_size, int | float | np.number) and not batch_size > 0:
        raise ValueError(f"batch_size={batch_size}: expected a positive number of examples")
    if batch_size is not None and loss_reduction == "sum":
        raise ValueError('loss_reduction="sum" leaves no use for batch_size=; pass one of the two')

    def trace(params: PyTree, args: tuple, kwargs: dict) -> _Traced:
        _refuse_manual_axes()
        keyed, _ = jax.tree_util.tree_flatten_with_path(params)
        keys = [key for key, _ in keyed]
        paths = [path_of(key) for key in keys]
        _check_parameters(paths, [leaf for _, leaf in keyed])
        jaxpr, outputs, layers = _trace(loss_fn, params, args, kwargs)
        classes = {
            path: linen.layer_classes(tuple(path_of((k,)) for k in key), layers)
            for path, key in zip(paths, keys, strict=True)
        }
        inferred = _leading_dimension((args, kwargs)) if batch_size is None else batch_size
        made = make_plan(
            Walk(jaxpr.jaxpr, paths),
            {path: jnp.shape(leaf) for path, (_, leaf) in zip(paths, keyed, strict=True)},
            classes,
            only=None if only is None else _sequence(only),
            skip=_sequence(skip),
            solver=solver,
            batch_size=1 if loss_reduction == "sum" else inferred,
        )
        return _Traced(jaxpr, outputs, paths, made)

    return trace


def _trace(
    loss_fn: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict
) -> tuple[Any, Any, linen.Layers]:
    """Traces the loss with abstract parameters, and abstract shapes among its other arguments."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    abstract = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def loss(params: PyTree, abstract: list[jax.Array]) -> Any:
        filled = iter(abstract)
        args, kwargs = jax.tree.unflatten(
            tree, [next(filled) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        )
        return loss_fn(params, *args, **kwargs)

    with linen.recorded() as layers:
        jaxpr, shapes = jax.make_jaxpr(loss, return_shape=True)(params, abstract)
    return jaxpr, shapes, layers


def _sequence(selectors: Selector | Sequence[Selector]) -> Sequence[Selector]:
    """A list of selectors.

    Raises:
      TypeError: something in it is none.
    """
    selected = [selectors] if isinstance(selectors, str | type) else selectors
    for selector in selected if isinstance(selected, Sequence) else [selected]:
        if not isinstance(selector, str | type):
            raise TypeError(
                f"{selector!r} selects no parameters: expected a pattern for paths or a class of "
                "layers"
            )
    return selected


def _leading_dimension(arguments: PyTree) -> int | None:
    """The leading dimension of all arrays among the arguments, None if there is not just one."""
    sizes = {
        leaf.shape[0]
        for leaf in jax.tree.leaves(arguments)
        if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        and leaf.shape
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        and not (leaf.dtype == jnp.uint32 and leaf.shape in ((2,), (4,)))
    }
    return sizes.pop() if len(sizes) == 1 else None


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


def _refuse_manual_axes() -> None:
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if axes:
        raise ValueError(
            f"called within jax.shard_map over {', '.join(map(str, axes))}: it would capture the "
            "rows of one device only. Call it under jax.jit on arrays with a NamedSharding "
            "instead; the loss itself may use jax.shard_map"
        )


def _check_parameters(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    for path, leaf in zip(paths, leaves, strict=True):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"the parameter {path} has dtype {dtype}; expected a real floating-point one. "
                "Pass what is not trained as another argument of the loss"
            )
    repeated = {path for path in paths if paths.count(path) > 1}
    if repeated:
        raise ValueError(
            f"two parameters have the path {min(repeated)!r}: rename one of the keys that lead "
            "to them, so that they differ when joined by '/'"
        )


def _check_loss(outputs: PyTree, has_aux: bool) -> None:
    if has_aux and not (isinstance(outputs, tuple | list) and len(outputs) == 2):
        raise TypeError("has_aux=True: expected the loss to return a pair (loss, aux)")
    loss = outputs[0] if has_aux else outputs
    if not isinstance(loss, jax.ShapeDtypeStruct):
        raise TypeError(
            f"the loss is a {type(loss).__name__}; expected a scalar, or a pair (loss, aux) with "
            "has_aux=True"
        )
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"the loss has shape {loss.shape} and dtype {loss.dtype}; expected a real scalar"
        )


def _check(value: str, allowed: Sequence[str], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
