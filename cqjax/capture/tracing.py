"""From a user's loss function to its jaxpr and plan: what every evaluation starts with."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cqjax.capture.options import Options
from cqjax.capture.plan import Plan, make_plan
from cqjax.frameworks import linen
from cqjax.frameworks import owners as ownership
from cqjax.linalg import devices
from cqjax.program import arguments, steps
from cqjax.program.flow import Flow
from cqjax.program.known import Known
from cqjax.program.paths import path_of
from cqjax.program.walk import walk

PyTree = Any


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


def trace(
    loss_fn: Callable[..., Any], options: Options, params: PyTree, args: tuple, kwargs: dict
) -> Traced:
    """Traces a loss with abstract parameters, and plans what to capture of it.

    Raises:
      ValueError: a selector matches nothing, or parameters or devices are not as they must be.
      TypeError: a parameter is not real floating-point.
    """
    _check_manual_axes()
    keyed, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {path_of(keys): leaf for keys, leaf in keyed}
    _check_parameters([path_of(keys) for keys, _ in keyed], [leaf for _, leaf in keyed])
    paths = list(leaves)
    jaxpr, outputs, owners = _trace(loss_fn, params, args, kwargs)
    program, constants = steps.flatten(jaxpr)
    batch = arguments.of_batch(program, constants, len(paths), (args, kwargs))
    avals = [atom.aval for atom in jaxpr.jaxpr.invars[: len(paths)]]
    known = Known(program, constants, jax.tree.leaves((args, kwargs)))
    record = walk(program, paths, avals, program.dependent(batch), known)
    loss = [atom.aval for atom in jaxpr.jaxpr.outvars[:1]]
    size = options.batch_size
    if options.loss_reduction == "sum":
        size = 1
    elif size is None:
        size = arguments.shared_size((args, kwargs), loss)
    plan = make_plan(
        record,
        Flow(program, record),
        {path: jnp.shape(leaf) for path, leaf in leaves.items()},
        {
            path_of(keys): ownership.owners_of(tuple(path_of((key,)) for key in keys), owners)
            for keys, _ in keyed
        },
        options,
        batch_size=size,
        examples=arguments.shared_size((args, kwargs), ()) or None,
    )
    _check_devices_agree(plan)
    return Traced(jaxpr, outputs, paths, plan)


def _trace(
    loss_fn: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict
) -> tuple[Any, Any, ownership.Owners]:
    """The loss's jaxpr, its abstract results, and which layer owns which parameter.

    Shapes among the other arguments are inputs of the jaxpr, like the parameters. Arrays among them
    are its constants: so a loss may use them in Python, if it could before.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    abstract = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def loss(params: PyTree, abstract: list[jax.Array]) -> Any:
        filled = iter(abstract)
        args, kwargs = jax.tree.unflatten(
            tree, [next(filled) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        )
        return loss_fn(params, *args, **kwargs)

    with ownership.recorded() as owners, linen.intercepted():
        jaxpr, shapes = jax.make_jaxpr(loss, return_shape=True)(params, abstract)
    return jaxpr, shapes, owners


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


def _check_devices_agree(plan: Plan) -> None:
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
