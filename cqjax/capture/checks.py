"""Refuses arguments that cannot be meant. Values that may be traced are not looked at."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def check_option(value: Any, allowed: Sequence[str], name: str) -> None:
    """Refuses an option that is not one of those allowed.

    Raises:
      ValueError: names the option.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")


def check_positive(value: Any, name: str, hint: str = "") -> None:
    """Refuses what is no positive Python integer.

    Raises:
      ValueError: names the argument.
    """
    if not (isinstance(value, int | np.integer) and value >= 1):
        raise ValueError(f"{name}={value}: expected a positive integer{hint}")


def check_rate(value: Any, name: str) -> None:
    """Refuses what is neither a number nor a schedule: a string from a command line, say.

    Raises:
      TypeError: names the argument.
    """
    number = isinstance(value, int | float) or hasattr(value, "dtype")
    if isinstance(value, str) or not (number or callable(value)):
        raise TypeError(
            f"{name}={value!r}: expected a number, or a schedule: a function of the count of "
            "updates"
        )


def check_number(value: Any, name: str) -> None:
    """Refuses what is no rate, and a Python number that is negative, infinite or NaN.

    Raises:
      TypeError: names the argument.
      ValueError: likewise.
    """
    check_rate(value, name)
    if isinstance(value, int | float | np.number) and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value}: expected a finite number, zero or more")
