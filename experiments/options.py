"""Checks of an experiment's options."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The numbers that an option may have."""

    words: str
    has: Callable[[float], bool]


AT_LEAST_ONE = Range("at least 1", lambda value: value >= 1)
POSITIVE = Range("positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("finite and not negative", lambda value: 0 <= value < math.inf)
FRACTION = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)


def require(settings: Any, allowed: Range, *fields: str) -> None:
    """Refuse numbers, also in tuples, that are not in a range; None is left alone.

    Raises:
      ValueError: If there is one; the message names the option as the command line does.
    """
    for field in fields:
        values = getattr(settings, field)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not allowed.has(value):
                option = "--" + field.replace("_", "-")
                raise ValueError(f"{option} must be {allowed.words}, got {value}")
