"""Marks in a program: named identities around what normalises. They vanish when it is compiled."""

from typing import NamedTuple

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


def before(name: str) -> str:
    """The mark on what the normalisation `name` is applied to."""
    return _BEFORE + name


def after(name: str) -> str:
    """The mark on the result of the normalisation `name`."""
    return _AFTER + name


def mark_of(eqn: core.JaxprEqn) -> Mark | None:
    """What an equation marks, if it is a mark."""
    if eqn.primitive is not primitives.name_p:
        return None
    name: str = eqn.params["name"]
    for prefix in (_BEFORE, _AFTER):
        if name.startswith(prefix):
            return Mark(name.removeprefix(prefix), prefix == _AFTER)
    return None
