"""What Linen's interceptor knows: which module owns a parameter, and which normalises."""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from cqjax.frameworks import owners
from cqjax.program import marks
from cqjax.program.paths import leaves_with_keys, path_of

_NORMALISATIONS = frozenset(
    inspect.unwrap(layer.__call__)
    for layer in (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
)
"""Their methods: a class derived from one of them may do anything in its own."""


def intercepted() -> contextlib.AbstractContextManager[None]:
    """Records the Linen modules that are called within the context.

    Normalisations get marks on their input and output, by which the program's walk finds them.
    """
    return nn.intercept_methods(_record)


def _record(next_fun: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    method = getattr(context.orig_method, "func", context.orig_method)
    if inspect.unwrap(method) in _NORMALISATIONS:
        result = marks.around(next_fun, args, kwargs, "/".join(module.path))
    else:
        result = next_fun(*args, **kwargs)
    if module.scope is not None:
        for collection in module.variables.values():
            for name, value in collection.items():
                if isinstance(value, Mapping):
                    continue
                for keys, _ in leaves_with_keys(value):  # several, where it is a tree of its own
                    below = (path_of((key,)) for key in keys)
                    owners.record((*module.path, name, *below), type(module))
    return result
