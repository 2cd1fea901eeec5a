"""What Flax's interceptor tells about a loss: which layer owns which parameter, what normalises."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name

from cqjax.capture import marks

Layers = dict[tuple[str, ...], frozenset[type[nn.Module]]]
"""For each variable, by its keys within the variables applied to: the classes that own it."""

_NORMALISATIONS = frozenset(
    inspect.unwrap(layer.__call__)
    for layer in (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
)
"""Their methods: a class derived from one of them may do anything in its own."""


@contextlib.contextmanager
def recorded() -> Iterator[Layers]:
    """Records the Linen modules called within the context; a loss without Flax records nothing.

    Normalisations get marks on their input and output, by which the program's walk finds them.
    """
    layers: Layers = {}

    def record(
        next_fun: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        method = getattr(context.orig_method, "func", context.orig_method)
        if inspect.unwrap(method) in _NORMALISATIONS:
            result = _marked(next_fun, args, kwargs, "/".join(module.path))
        else:
            result = next_fun(*args, **kwargs)
        if module.scope is not None:
            for collection in module.variables.values():
                for name, value in collection.items():
                    if not isinstance(value, Mapping):
                        keys = (*module.path, name)
                        layers[keys] = layers.get(keys, frozenset()) | {type(module)}
        return result

    with nn.intercept_methods(record):
        yield layers


def _marked(next_fun: Any, args: tuple, kwargs: dict, name: str) -> Any:
    """Calls a normalisation on its marked input, and marks its output."""
    if args:
        args = (checkpoint_name(args[0], marks.before(name)), *args[1:])
    elif "x" in kwargs:
        kwargs = kwargs | {"x": checkpoint_name(kwargs["x"], marks.before(name))}
    return checkpoint_name(next_fun(*args, **kwargs), marks.after(name))


def layer_classes(keys: tuple[str, ...], layers: Layers) -> frozenset[type[nn.Module]]:
    """The classes of the layer that owns the parameter at `keys`.

    A module knows its variables' keys within what it was applied to, which may be a part of the
    parameters: the longest that the parameter's own keys end with are meant.
    """
    matches = [known for known in layers if keys[len(keys) - len(known) :] == known]
    return layers[max(matches, key=len)] if matches else frozenset()
