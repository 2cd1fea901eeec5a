"""From a user's loss function to its jaxpr and plan: what every evaluation starts with."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from cqjax.capture.batch_size import BatchSize, batch_size
from cqjax.capture.options import Options
from cqjax.capture.plan import Plan, make_plan
from cqjax.capture.rows import Rows
from cqjax.frameworks import loaded
from cqjax.frameworks import owners as ownership
from cqjax.linalg import devices
from cqjax.program import arguments, jaxprs, sharing, steps, terms
from cqjax.program.flow import Flow
from cqjax.program.known import Known
from cqjax.program.made import Made
from cqjax.program.paths import leaves_with_keys, path_of
from cqjax.program.twins import twins
from cqjax.program.values import Values
from cqjax.program.walk import Record, walk
from cqjax.program.weight_function import WeightFunction

PyTree = Any


class Traced(NamedTuple):
    """A loss, traced.

    Attributes:
      jaxpr: its closed jaxpr; the inputs are the parameters' leaves, the first output the loss.
      outputs: its results: `jax.ShapeDtypeStruct`s for what the jaxpr returns.
      kept: those leaves of its results, by number, that tracing leaves as they are.
      paths: paths of the parameters' leaves.
      plan: what is captured of it.
      size: N.
      rows: which of the products' rows count.
      function: what makes the weight of a name, of all parameters' arrays.
    """

    jaxpr: Any
    outputs: PyTree
    kept: Mapping[int, Any]
    paths: list[str]
    plan: Plan
    size: BatchSize
    rows: Rows
    function: Callable[[str, Sequence[jax.Array]], WeightFunction]

    def results(self, values: Sequence[Any]) -> PyTree:
        """The loss's results, of those of the jaxpr."""
        computed, tree = iter(values), jax.tree.structure(self.outputs)
        return jax.tree.unflatten(
            tree,
            (
                self.kept[i] if i in self.kept else jnp.asarray(next(computed))
                for i in range(tree.num_leaves)
            ),
        )


def trace(
    loss_fn: Callable[..., Any], options: Options, params: PyTree, args: tuple, kwargs: dict
) -> Traced:
    """Traces a loss with abstract parameters, and plans what to capture of it.

    Raises:
      ValueError: a selector matches nothing, or parameters or devices are not as they must be.
      TypeError: a parameter is not real floating-point.
    """
    _check_manual_axes()
    loaded.refuse(params)
    keyed = list(leaves_with_keys(params))
    leaves = {path_of(keys): leaf for keys, leaf in keyed}
    _check_parameters([path_of(keys) for keys, _ in keyed], [leaf for _, leaf in keyed])
    paths = list(leaves)
    jaxpr, outputs, kept, owners = _trace(loss_fn, params, args, kwargs)
    program, constants = steps.flatten(jaxpr)
    opened, _ = jaxprs.opened(jaxpr)
    if not opened.outvars:
        check_loss(outputs, isinstance(outputs, tuple | list))
    avals = [atom.aval for atom in opened.invars[: len(paths)]]
    known = Known(program, constants, jax.tree.leaves((args, kwargs)))
    examples = arguments.shared_size((args, kwargs), ()) or None
    batch = arguments.of_batch(program, constants, len(paths), (args, kwargs), examples)

    def walked(batch: Set[int], of_weights: Set[int]) -> Record:
        made, wanted = Made(program, paths, of_weights), options.reparametrized == "nearest"
        return walk(program, paths, avals, batch, known, made, wanted)

    dependent = program.dependent(batch)
    # Masks among the arguments are told from the batch once the number of examples is known.
    record = walked(dependent, dependent if examples else frozenset())
    values = Values(jaxpr, program, constants, len(paths))
    products = program.written({site.position for site in record.sites})
    found = terms.counts(program, len(paths), products, values)
    size = batch_size(found, values, options, (args, kwargs), opened.outvars[0].aval)
    if examples is None:
        examples = terms.examples(found)
        batch = arguments.of_batch(program, constants, len(paths), (args, kwargs), examples)
        record = walked(dependent, program.dependent(batch))
    sites = sharing.with_sharing(record.sites, program, batch, examples)
    record = record._replace(sites=sites)
    flow = Flow(program, record)
    # Back-matching goes from layer to layer as the program does.
    again = twins(program, sites) if options.signal == "gradient" else {}
    alone = tuple(site for site in sites if site.position not in again)
    plan = make_plan(
        record._replace(sites=alone),
        flow,
        {path: jnp.shape(leaf) for path, leaf in leaves.items()},
        {
            path_of(keys): ownership.owners_of(tuple(path_of((key,)) for key in keys), owners)
            for keys, _ in keyed
        },
        options,
        batch_size=size,
        examples=examples,
    )
    if size.value is None and not found:
        plan = dataclasses.replace(plan, unknown=arguments.described(args, kwargs))
    _check_devices_agree(plan, size.value)
    _check_real(plan, leaves)
    counted = Rows(program, found, values, again)

    def function(name: str, parameters: Sequence[jax.Array]) -> WeightFunction:
        return record.made.function(name, jaxpr, parameters, values)

    return Traced(jaxpr, outputs, kept, paths, plan, size, counted, function)


def _trace(
    loss_fn: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict
) -> tuple[Any, Any, Mapping[int, Any], ownership.Owners]:
    """The loss's jaxpr, its abstract results, what is kept of them, and who owns which parameter.

    Shapes among the other arguments are inputs of the jaxpr, like the parameters. Arrays among them
    are its constants: so a loss may use them in Python, if it could before.

    Auxiliary results that no tracer stands for are not computed. As `jax.value_and_grad` does, we
    return them as they are: strings, numbers, NumPy's arrays, anything.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    abstract = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    kept: dict[int, Any] = {}
    structure = jax.tree.structure(())

    def loss(params: PyTree, abstract: list[jax.Array]) -> Any:
        nonlocal structure
        filled = iter(abstract)
        args, kwargs = jax.tree.unflatten(
            tree, [next(filled) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        )
        results, structure = jax.tree.flatten(loss_fn(params, *args, **kwargs))
        for i, result in enumerate(results):
            # The first is the loss, which may be a constant.
            number = isinstance(result, int | float | np.number | np.ndarray | jax.Array)
            if not (isinstance(result, Tracer) or (i == 0 and number)):
                kept[i] = result
        return [result for i, result in enumerate(results) if i not in kept]

    with ownership.recorded() as owners, loaded.intercepted():
        jaxpr, shapes = jax.make_jaxpr(loss, return_shape=True)(params, abstract)
    computed = iter(shapes)
    outputs = [kept[i] if i in kept else next(computed) for i in range(structure.num_leaves)]
    return jaxpr, jax.tree.unflatten(structure, outputs), kept, owners


def _check_manual_axes() -> None:
    """Refuses `jax.pmap`, and `jax.shard_map` without types that say what varies.

    Raises:
      ValueError: says what to do instead.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if any(axis not in devices.varying(jax.lax.axis_index(axis)) for axis in axes):
        raise ValueError(
            f"called over the axis {', '.join(map(str, axes))} within jax.pmap, or within "
            "jax.shard_map with check_vma=False: which arrays differ between devices is unknown "
            "there. In the place of jax.pmap(step) with lax.pmean of the gradients, split the "
            "batch, and call the step of one device: mesh = jax.make_mesh((jax.device_count(),), "
            '("data",)); batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")));'
            " jax.jit(step). Within jax.shard_map, leave check_vma=True"
        )


def _check_devices_agree(plan: Plan, batch_size: Any) -> None:
    sides = [side for block in plan.blocks for side in block.sides]
    reduced = {axis for side in sides for site in side.sites for axis in site.reduced}
    if axes := sorted(reduced & devices.varying(batch_size)):
        raise ValueError(
            f"batch_size varies over {', '.join(axes)}, where devices share weights; expected the "
            f"number of terms that the loss averages over on all of them: "
            f"jax.lax.psum(batch_size, {axes[0]!r})"
        )


def _check_parameters(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    for path, leaf in zip(paths, leaves, strict=True):
        elsewhere = "Pass what is not trained as another argument of the loss"
        if not (isinstance(leaf, int | float | complex) or hasattr(leaf, "dtype")):
            raise TypeError(
                f"the parameter {path} is a {type(leaf).__name__}; expected an array. {elsewhere}"
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"the parameter {path} has dtype {dtype}; expected a real floating-point one. "
                f"{elsewhere}"
            )
    repeated = {path for path, number in collections.Counter(paths).items() if number > 1}
    if repeated:
        raise ValueError(
            f"two parameters have the path {min(repeated)!r}: rename one of the keys that lead "
            "to them, so that they differ when joined by '/'"
        )


def _check_real(plan: Plan, leaves: Mapping[str, Any]) -> None:
    for parameter in plan.parameters:
        dtype = jnp.result_type(leaves[parameter.path])
        if parameter.status != "skipped" and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"the parameter {parameter.path} has dtype {dtype}; expected a real floating-point "
                f"one, since no solve is complex: name it in skip=, and it keeps JAX's gradient"
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
