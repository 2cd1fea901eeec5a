"""Marks in a program: named identities around a normalisation. They vanish when it is compiled.

Nothing in a program tells a normalisation from other arithmetic, so Flax's modules are made to say
where they begin and end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

from cqjax.program.jaxprs import Equation

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


def mark_of(equation: Equation) -> Mark | None:
    """What an equation marks, if it is a mark."""
    if equation.primitive is not primitives.name_p:
        return None
    name: str = equation.params["name"]
    for prefix in (_BEFORE, _AFTER):
        if name.startswith(prefix):
            return Mark(name.removeprefix(prefix), prefix == _AFTER)
    return None
