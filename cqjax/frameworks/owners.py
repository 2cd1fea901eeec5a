"""Which layer owns which parameter: recorded while a loss is traced, by whoever knows."""

import contextlib
import contextvars
from collections.abc import Iterator

Keys = tuple[str, ...]
"""A parameter's keys: all of them, after `ROOT`, or the last few."""

ROOT = ""

Owners = dict[Keys, frozenset[type]]
"""For each parameter, by its keys: the classes of the layers that own it."""

_recording: contextvars.ContextVar[Owners] = contextvars.ContextVar("owners")


@contextlib.contextmanager
def recorded() -> Iterator[Owners]:
    """Collects what is recorded within the context."""
    token = _recording.set(owners := {})
    try:
        yield owners
    finally:
        _recording.reset(token)


def record(keys: Keys, owner: type) -> None:
    """Records a layer's class as an owner of the parameter at `keys`."""
    owners = _recording.get()
    owners[keys] = owners.get(keys, frozenset()) | {owner}


def owners_of(keys: Keys, owners: Owners) -> frozenset[type]:
    """The classes of the layers that own the parameter at `keys`.

    A Linen module knows its variables' keys within what it was applied to, which may be a part of
    the parameters: the longest that the parameter's own keys end with are meant.
    """
    keys = (ROOT, *keys)
    ends = (keys[i:] for i in range(len(keys)))
    return next((owners[end] for end in ends if end in owners), frozenset())
