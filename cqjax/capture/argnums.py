"""Which of a loss's arguments are its parameters: `argnums`, as `jax.value_and_grad` has it."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

PyTree = Any
Argnums = int | Sequence[int]


class Which(NamedTuple):
    """Which arguments of a loss are its parameters.

    Attributes:
      numbers: their places; a negative one counts from the last.
      several: whether the parameters are a tuple of arguments, not an argument.
    """

    numbers: tuple[int, ...]
    several: bool

    @classmethod
    def of(cls, argnums: Any) -> "Which":
        """What `argnums=` says.

        Raises:
          TypeError: it is neither an integer nor several.
          ValueError: there are none.
        """
        several = isinstance(argnums, Sequence) and not isinstance(argnums, str)
        numbers: tuple[Any, ...] = tuple(argnums) if several else (argnums,)
        if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers):
            raise TypeError(f"argnums={argnums!r}: expected an integer, or several")
        if not numbers:
            raise ValueError(f"argnums={argnums!r}: expected at least one argument")
        return cls(numbers, several)

    def loss(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The loss as a function of its parameters, and then of its other arguments."""
        if self == ((0,), False):
            return loss_fn

        @functools.wraps(loss_fn, updated=())
        def reordered(params: PyTree, *others: Any, **kwargs: Any) -> Any:
            chosen = params if self.several else (params,)
            args: list[Any] = [None] * (len(chosen) + len(others))
            places = self._places(len(args))
            rest = [i for i in range(len(args)) if i not in places]
            for i, value in (*zip(places, chosen, strict=True), *zip(rest, others, strict=True)):
                args[i] = value
            return loss_fn(*args, **kwargs)

        return reordered

    def split(
        self, loss_fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[PyTree, tuple, dict[str, Any]]:
        """The parameters, the other arguments, and those passed by name.

        Raises:
          TypeError: the parameters are not among the arguments.
          ValueError: an argument is meant twice.
        """
        needed = max(n + 1 if n >= 0 else -n for n in self.numbers)
        if len(args) < needed:
            args, kwargs = _positional(loss_fn, args, kwargs)
        if len(args) < needed:
            raise TypeError(
                f"argnums={self.numbers if self.several else self.numbers[0]}: the loss was called "
                f"with {len(args)} arguments by position; expected at least {needed}, the "
                "parameters among them"
            )
        places = self._places(len(args))
        if len(set(places)) < len(places):
            raise ValueError(f"argnums={self.numbers} means an argument twice; expected it once")
        chosen = tuple(args[i] for i in places)
        others = tuple(arg for i, arg in enumerate(args) if i not in places)
        return chosen if self.several else chosen[0], others, kwargs

    def _places(self, number: int) -> list[int]:
        """The places, counted from the first of so many arguments."""
        return [n % number for n in self.numbers]


def _positional(
    loss_fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments, by position where the loss takes them so."""
    try:
        bound = inspect.signature(loss_fn).bind(*args, **kwargs)
    except (TypeError, ValueError):  # the call does not fit, or nobody knows what would
        return args, kwargs
    return bound.args, bound.kwargs
