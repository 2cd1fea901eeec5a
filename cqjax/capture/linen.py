"""What Flax's interceptor tells about a loss: which layer owns which parameter."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn

Layers = dict[tuple[str, ...], frozenset[type[nn.Module]]]
"""For each variable, by its keys within the variables applied to: the classes that own it."""


@contextlib.contextmanager
def recorded() -> Iterator[Layers]:
    """Records the Linen modules called within the context; a loss without Flax records nothing."""
    layers: Layers = {}

    def record(
        next_fun: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        result, module = next_fun(*args, **kwargs), context.module
        if module.scope is not None:
            for collection in module.variables.values():
                for name, value in collection.items():
                    if not isinstance(value, Mapping):
                        keys = (*module.path, name)
                        layers[keys] = layers.get(keys, frozenset()) | {type(module)}
        return result

    with nn.intercept_methods(record):
        yield layers


def layer_classes(keys: tuple[str, ...], layers: Layers) -> frozenset[type[nn.Module]]:
    """The classes of the layer that owns the parameter at `keys`.

    A module knows its variables' keys within what it was applied to, which may be a part of the
    parameters: the longest that the parameter's own keys end with are meant.
    """
    matches = [known for known in layers if keys[len(keys) - len(known) :] == known]
    return layers[max(matches, key=len)] if matches else frozenset()
