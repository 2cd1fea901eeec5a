"""From a user's loss function to its jaxpr and plan: what every evaluation starts with."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from cqjax.capture import jaxprs, linen, recording
from cqjax.capture.block import Cost
from cqjax.capture.captures import path_of
from cqjax.capture.dependence import equations_with_data
from cqjax.capture.flow import follow_layers
from cqjax.capture.plan import Plan, Selector, Signal, make_plan
from cqjax.capture.sites import Position
from cqjax.capture.walk import Walk
from cqjax.linalg import devices

PyTree = Any


class Aside:
    """A pytree among a loss's arguments whose arrays are no batch."""


class Traced(NamedTuple):
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


def tracer(
    loss_fn: Callable[..., Any],
    only: Selector | Sequence[Selector] | None,
    skip: Selector | Sequence[Selector],
    cost: Cost,
    batch_size: int | jax.Array | None,
    loss_reduction: Literal["mean", "sum"],
    signal: Signal = "gradient",
) -> Callable[[PyTree, tuple, dict], Traced]:
    """What all evaluations have in common: trace, walk, plan.

    Raises:
      ValueError: an option is not one of those listed.
    """
    _check_cost(cost)
    check(loss_reduction, ("mean", "sum"), "loss_reduction")
    check(signal, ("gradient", "matched"), "signal")
    if batch_size is not None and jnp.ndim(batch_size):
        raise ValueError(f"batch_size has shape {jnp.shape(batch_size)}: expected a scalar")
    if isinstance(batch_size, int | float | np.number) and not batch_size > 0:
        raise ValueError(f"batch_size={batch_size}: expected a positive number of examples")
    if batch_size is not None and loss_reduction == "sum":
        raise ValueError('loss_reduction="sum" leaves no use for batch_size=; pass one of the two')

    def trace(params: PyTree, args: tuple, kwargs: dict) -> Traced:
        _check_manual_axes()
        keyed, _ = jax.tree_util.tree_flatten_with_path(params)
        keys = [key for key, _ in keyed]
        paths = [path_of(key) for key in keys]
        _check_parameters(paths, [leaf for _, leaf in keyed])
        jaxpr, outputs, owners = _trace(loss_fn, params, args, kwargs)
        classes = {
            path: recording.owners_of(tuple(path_of((k,)) for k in key), owners)
            for path, key in zip(paths, keys, strict=True)
        }
        loss = jaxpr.jaxpr.outvars[:1]
        inferred = _terms((args, kwargs), loss) if batch_size is None else batch_size
        walk = Walk(jaxpr.jaxpr, paths, _with_data(jaxpr, len(paths), (args, kwargs)))
        made = make_plan(
            walk,
            follow_layers(jaxpr.jaxpr, walk.sites, walk.uses),
            {path: jnp.shape(leaf) for path, (_, leaf) in zip(paths, keyed, strict=True)},
            classes,
            only=None if only is None else _sequence(only),
            skip=_sequence(skip),
            cost=cost,
            batch_size=1 if loss_reduction == "sum" else inferred,
            examples=_terms((args, kwargs), ()) or None,
            signal=signal,
        )
        _check_batch_size(made)
        return Traced(jaxpr, outputs, paths, made)

    return trace


def _trace(
    loss_fn: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict
) -> tuple[Any, Any, recording.Owners]:
    """Traces the loss with abstract parameters, and abstract shapes among its other arguments."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    abstract = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def loss(params: PyTree, abstract: list[jax.Array]) -> Any:
        filled = iter(abstract)
        args, kwargs = jax.tree.unflatten(
            tree, [next(filled) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        )
        return loss_fn(params, *args, **kwargs)

    with recording.recorded() as owners, linen.intercepted():
        jaxpr, shapes = jax.make_jaxpr(loss, return_shape=True)(params, abstract)
    return jaxpr, shapes, owners


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


def _terms(arguments: PyTree, loss: Sequence[Any]) -> int | None:
    """How many terms the loss averages over, None if that is not plain.

    The leading dimension of all arrays among the arguments, for each of the devices over which
    these vary within `jax.shard_map` and the loss, that is their mean, does not.
    """
    leaves = jax.tree.leaves(arguments, is_leaf=lambda node: isinstance(node, Aside))
    arrays = [leaf for leaf in leaves if _may_be_batch(leaf)]
    sizes = {leaf.shape[0] for leaf in arrays}
    over = devices.varying(arrays).difference(*map(jaxprs.varying, loss))
    return sizes.pop() * devices.number(over) if len(sizes) == 1 else None


def _may_be_batch(leaf: Any) -> bool:
    """Whether a leaf of the arguments is an array that may have a row for each example."""
    return (
        isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        and bool(leaf.shape)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        and not (leaf.dtype == jnp.uint32 and leaf.shape in ((2,), (4,)))
    )


def _with_data(jaxpr: Any, parameters: int, arguments: PyTree) -> set[Position]:
    """The equations that depend on data: on arguments that may be a batch, or may hold one.

    Constants that are no tracers are data too, unless all such arguments are tracers or abstract.
    """
    leaves = jax.tree.leaves(arguments)
    abstract = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    batch = [leaf for leaf in leaves if _may_be_batch(leaf)]
    others = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not _may_be_batch(leaf)]
    traced = all(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in batch)

    def is_data(const: Any) -> bool:
        if batch and traced and not isinstance(const, Tracer):
            return False
        return all(const is not leaf for leaf in others)

    inputs = [False] * parameters + [_may_be_batch(leaf) for leaf in abstract]
    return equations_with_data(jaxpr, inputs, is_data)


def _check_manual_axes() -> None:
    """Refuses `jax.shard_map` without types that say what varies.

    Raises:
      ValueError: says what to do instead.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if any(axis not in devices.varying(jax.lax.axis_index(axis)) for axis in axes):
        raise ValueError(
            f"called within jax.shard_map over {', '.join(map(str, axes))} with check_vma=False: "
            "which arrays differ between devices is unknown. Leave check_vma=True, or call it "
            "under jax.jit on arrays with a NamedSharding"
        )


def _check_batch_size(plan: Plan) -> None:
    reduced = {axis for block in plan.blocks for site in block.sites for axis in site.reduced}
    if axes := sorted(reduced & devices.varying(plan.batch_size)):
        raise ValueError(
            f"batch_size varies over {', '.join(axes)}, where devices share weights; expected the "
            f"number of terms that the loss averages over on all of them: "
            f"jax.lax.psum(batch_size, {axes[0]!r})"
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


def check_loss(outputs: PyTree, has_aux: bool) -> None:
    """Refuses what is no loss.

    Raises:
      TypeError: it is not a real scalar, or a pair where none is expected, or the reverse.
    """
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


def _check_cost(cost: Cost) -> None:
    """Refuses what cannot be meant.

    Raises:
      ValueError: names the option.
    """
    check(cost.solver, ("auto", "primal", "dual"), "solver")
    for name in ("max_dim", "block_size", "subsample"):
        value = getattr(cost, name)
        if value is not None and not (isinstance(value, int | np.integer) and value >= 1):
            raise ValueError(f"{name}={value}: expected a positive integer")
    if cost.block_size is not None and (cost.max_dim is None or cost.block_size > cost.max_dim):
        raise ValueError(
            f"block_size={cost.block_size} with max_dim={cost.max_dim}: expected max_dim, the size "
            "from which on a matrix is split into blocks, and block_size no larger than it"
        )
    row = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        jax.eval_shape(lambda x: jnp.dot(x, x, precision=cost.precision), row)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"precision={cost.precision!r}: expected what jax.lax.dot_general takes: 'highest', "
            "'high', 'default' or another jax.lax.Precision"
        ) from error


def check(value: str, allowed: Sequence[str], name: str) -> None:
    """Refuses an option that is not one of those allowed.

    Raises:
      ValueError: names the option.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
