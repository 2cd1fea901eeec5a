"""Marks in a program: named identities around what normalises. They vanish when it is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.extend.core import primitives

_BEFORE, _AFTER = "cqjax normalises: ", "cqjax normalised: "


class Mark(NamedTuple):
    """What an equation marks.

    Attributes:
      name: the normalisation's.
      after: whether it marks the output, not the input.
    """

    name: str
    after: bool


def around(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], name: str) -> Any:
    """Calls the normalisation `name` on its marked input, and marks its output."""
    if args:
        args = (checkpoint_name(args[0], _BEFORE + name), *args[1:])
    elif "x" in kwargs:
        kwargs = kwargs | {"x": checkpoint_name(kwargs["x"], _BEFORE + name)}
    return checkpoint_name(call(*args, **kwargs), _AFTER + name)


def mark_of(eqn: core.JaxprEqn) -> Mark | None:
    """What an equation marks, if it is a mark."""
    if eqn.primitive is not primitives.name_p:
        return None
    name: str = eqn.params["name"]
    for prefix in (_BEFORE, _AFTER):
        if name.startswith(prefix):
            return Mark(name.removeprefix(prefix), prefix == _AFTER)
    return None
