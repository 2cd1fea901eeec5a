"""What Flax's interceptor tells about a loss: the class of each module that it calls."""

import contextlib
from collections.abc import Iterator

import flax.linen as nn

Layers = dict[tuple[str, ...], frozenset[type[nn.Module]]]
"""For each module path, the classes that were called there."""


@contextlib.contextmanager
def recorded() -> Iterator[Layers]:
    """Records the Linen modules called within the context; a loss without Flax records nothing."""
    layers: Layers = {}

    def record(next_fun, args, kwargs, context: nn.module.InterceptorContext):
        module = context.module
        layers[module.path] = layers.get(module.path, frozenset()) | {type(module)}
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        yield layers


def layer_classes(owner: tuple[str, ...], layers: Layers) -> frozenset[type[nn.Module]]:
    """The classes of the module that owns the parameters below the keys `owner`.

    A module knows its path within the variables that it was applied to, which may be a part of the
    parameters: the longest path that the keys end with is the module's.
    """
    matches = [p for p in layers if owner[len(owner) - len(p) :] == p]
    return layers[max(matches, key=len)] if matches else frozenset()
