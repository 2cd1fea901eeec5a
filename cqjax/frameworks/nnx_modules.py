"""Losses of NNX modules as functions of arrays, with everything that a loss changes as results."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from cqjax.frameworks import owners
from cqjax.program import marks
from cqjax.program.arguments import Aside
from cqjax.program.paths import path_of

PyTree = Any

CONTEXT = "cqjax"
"""Tag of the `nnx.update_context` in which modules are split, called and updated."""

_NORMALISATIONS = frozenset(
    inspect.unwrap(layer.__call__)
    for layer in (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)
)
"""Their methods: a class derived from one of them may do anything in its own."""


@dataclasses.dataclass(eq=False)
class _Graphs:
    """How modules hang together, before a loss and after it.

    Attributes:
      model: the first argument.
      others: the modules and variables among the loss's other arguments.
      after: both, as the loss leaves them; None before it was traced.
    """

    model: nnx.GraphDef
    others: nnx.GraphDef
    after: nnx.GraphDef | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["model", "others"], meta_fields=["graphs"]
)
@dataclasses.dataclass(frozen=True)
class Modules(Aside):
    """What a loss gets of its modules beside the parameters.

    Attributes:
      model: the rest of the model's state.
      others: the state of the modules among the other arguments.
      graphs: how they hang together.
    """

    model: nnx.State
    others: nnx.State
    graphs: _Graphs


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for one of the modules among the arguments."""

    number: int


@dataclasses.dataclass(frozen=True)
class Each:
    """The filter of a tuple of models, with a filter for each."""

    filters: tuple[Any, ...]

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether a variable at this path in the tuple is selected."""
        return nnx.filterlib.to_predicate(self.filters[path[0]])(path[1:], value)


def argnums_and_filter(argnums: Any, wrt: Any) -> tuple[int | tuple[int, ...], Any]:
    """Which arguments are models, and the filter of their variables.

    Args:
      argnums: as for `nnx.value_and_grad`: a number, an `nnx.DiffState`, or several.
      wrt: filter for those that are no `nnx.DiffState`.
    """
    several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
    each: tuple[Any, ...] = tuple(argnums) if several else (argnums,)
    numbers: tuple[Any, ...] = tuple(a.argnum if isinstance(a, nnx.DiffState) else a for a in each)
    filters = tuple(a.filter if isinstance(a, nnx.DiffState) else wrt for a in each)
    return (numbers, Each(filters)) if several else (numbers[0], filters[0])


def split(
    model: Any, wrt: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[nnx.State, Modules, tuple, dict[str, Any]]:
    """Takes modules apart, within `nnx.update_context(CONTEXT)`.

    Args:
      model: the model among the loss's arguments; a tuple of models if there are several.
      wrt: filter of the variables to differentiate with respect to: for a tuple, `Each`.
      args: the other arguments.
      kwargs: those passed by name.

    Returns:
      These variables; the rest of all modules; and the other arguments without modules.

    Raises:
      ValueError: there are no such variables.
    """
    others: list[Any] = []

    def placed(leaf: Any) -> Any:
        if not _is_module(leaf):
            return leaf
        others.append(leaf)
        return _Place(len(others) - 1)

    args, kwargs = jax.tree.map(placed, (args, kwargs), is_leaf=_is_module)
    # Flax documents these contexts for transformations like this one. Modules that are shared stay
    # shared, and what the loss changes comes back into the originals.
    with nnx.split_context(CONTEXT) as context:
        graph, params, rest = context.split(model, wrt, ...)
        others_graph, others_state = context.split(others)
    _check_some(model, params, wrt)
    return params, Modules(rest, others_state, _Graphs(graph, others_graph)), args, kwargs


def _check_some(model: Any, params: Any, wrt: Any) -> None:
    if isinstance(wrt, Each):
        for i, each in enumerate(wrt.filters):
            _check_some(model[i], params.get(i), each)
    elif not jax.tree.leaves(params):
        raise ValueError(
            f"the model among the loss's arguments, a {type(model).__name__}, has no variables "
            f"that wrt={wrt} selects; expected an nnx.Module with some: pass wrt= (arrays that are "
            "no variables are for cqjax.value_and_grad)"
        )


def functional(loss_fn: Callable[..., Any], has_aux: bool | None) -> Callable[..., Any]:
    """A loss of modules as a function of the results of `split`.

    Args:
      loss_fn: the loss.
      has_aux: whether it returns auxiliary results; None for what it does.

    Returns:
      A function of parameters, modules and other arguments, whose results are the loss, and the
      state of all modules after it with the auxiliary results.
    """

    @functools.wraps(loss_fn)
    def pure(params: PyTree, modules: Modules, *args: Any, **kwargs: Any) -> Any:
        graphs = modules.graphs
        with nnx.merge_context(CONTEXT, inner=True) as context:
            model = context.merge(graphs.model, params, modules.model)
            others = context.merge(graphs.others, modules.others)
        args, kwargs = jax.tree.map(
            lambda leaf: others[leaf.number] if isinstance(leaf, _Place) else leaf, (args, kwargs)
        )
        _record_owners(model, params)
        _mark_normalisations(model)
        _mark_normalisations(others)
        result = loss_fn(model, *args, **kwargs)
        _unmark_normalisations((model, others))
        with nnx.split_context(CONTEXT) as context:
            graphs.after, state = context.split((model, others))
        pair = isinstance(result, tuple | list) and len(result) == 2
        if has_aux and not pair:
            return result
        loss, aux = result if has_aux or (has_aux is None and pair) else (result, None)
        return loss, (state, aux)

    return pure


def update(modules: Modules, state: nnx.State) -> None:
    """Brings the modules that were split to the state in which the loss left them."""
    with nnx.merge_context(CONTEXT, inner=False) as context:
        assert modules.graphs.after is not None
        context.merge(modules.graphs.after, state)


def refuse(params: PyTree) -> None:
    """Refuses modules among parameters that are taken for plain trees.

    Raises:
      TypeError: says what to do instead.
    """
    for node in jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Module)):
        if isinstance(node, nnx.Module):
            raise TypeError(
                f"the parameters hold a {type(node).__name__}, a module of flax.nnx, whose state "
                "would be taken for parameters, and what the loss changes in it be lost; use "
                "cqjax.nnx.value_and_grad (or cqjax.nnx.plan)"
            )


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _record_owners(model: Any, params: PyTree) -> None:
    """Says which module owns each parameter: the innermost that is more than a container.

    A Linen module in a bridge tells that by itself.
    """
    layers = {
        tuple(map(str, path)): type(node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module) and not isinstance(node, nnx.List | nnx.Dict)
    }
    for key, _ in jax.tree.leaves_with_path(params):
        keys = tuple(path_of((k,)) for k in key)
        owner = next(
            (layers[at] for i in range(len(keys), -1, -1) if (at := keys[:i]) in layers), None
        )
        if owner is not None and not issubclass(owner, nnx.bridge.ToNNX):
            owners.record((owners.ROOT, *keys), owner)


def _mark_normalisations(modules: Any) -> None:
    """Has normalisations mark their input and output, until `_unmark_normalisations`.

    NNX has no interceptor as Linen has. So for the time of the loss, an instance gets a subclass
    whose call marks.
    """
    for path, node in list(nnx.iter_graph(modules)):
        layer = type(node)
        if isinstance(node, nnx.Module) and inspect.unwrap(layer.__call__) in _NORMALISATIONS:
            object.__setattr__(node, "__class__", _marking(layer, "/".join(map(str, path))))


def _unmark_normalisations(modules: Any) -> None:
    for _, node in list(nnx.iter_graph(modules)):
        if isinstance(node, _Marking):
            object.__setattr__(node, "__class__", type(node).__mro__[1])


class _Marking:
    """A normalisation that marks its input and output."""


@functools.cache
def _marking(layer: type[nnx.Module], name: str) -> type[nnx.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return marks.around(functools.partial(layer.__call__, self), args, kwargs, name)

    def body(namespace: dict[str, Any]) -> None:
        namespace |= {"__call__": call, "__module__": layer.__module__}

    return types.new_class(layer.__name__, (layer, _Marking), {}, body)
