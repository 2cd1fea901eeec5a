"""Where arrays come from, known by identity for as long as they live.

What is handed on within a trace, or outside of all, is the same object. So it is known without
computing anything. Across a `jit` it is lost.
"""

import enum
import weakref
from collections.abc import Iterable

import jax


class Origin(enum.Enum):
    """What an array is."""

    GRADIENT = enum.auto()  # as `value_and_grad` returned it
    SOLUTION = enum.auto()  # a layer's update, as a solve made it


_known: dict[int, tuple[weakref.ref, Origin]] = {}
"""By the arrays' ids. The references are weak: they keep no array, and no trace, alive."""


def record(arrays: Iterable[jax.Array], origin: Origin) -> None:
    """Notes where arrays come from."""
    for array in arrays:
        key = id(array)
        _known[key] = weakref.ref(array, lambda _, key=key: _known.pop(key, None)), origin


def origin_of(array: jax.Array) -> Origin | None:
    """Where an array comes from; None where that is unknown."""
    reference, origin = _known.get(id(array), (lambda: None, None))
    return origin if reference() is array else None
