"""An experiment's options: presets, checks, and the command line that gives them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

Preset = Literal["smoke", "cpu", "paper"]
"""Seconds, for tests; minutes on two CPU cores; the source's own settings."""

Settings = TypeVar("Settings")


def filled(settings: Settings, presets: Mapping[Preset, Mapping[str, Any]]) -> Settings:
    """The settings, with options that were not given (None) as their preset has them."""
    preset = presets[settings.preset].items()  # pyright: ignore[reportAttributeAccessIssue]
    missing = {name: value for name, value in preset if getattr(settings, name) is None}
    return replace(settings, **missing)  # pyright: ignore[reportArgumentType]


def command(name: str, settings: Any) -> str:
    """The command line that gives an experiment these settings: all that are not the default.

    It begins anew, also if these settings resumed an earlier session.
    """
    words = ["python -m experiments", name]
    for field in fields(settings):
        value, option = getattr(settings, field.name), field.name.replace("_", "-")
        if value == field.default or field.name == "resume":
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *map(str, values)]
    return " ".join(words)


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


def require_rates(settings: Any, tries: int, *fields: str) -> None:
    """Refuse learning rates that are not positive, or not as many as there are tuning runs.

    Raises:
      ValueError: If there are any; the message names the option.
    """
    require(settings, POSITIVE, *fields)
    for field in fields:
        rates = getattr(settings, field)
        if len(set(rates[:tries])) < tries:
            raise ValueError(
                f"--{field.replace('_', '-')} must be at least --tries, {tries}, different rates, "
                f"got {rates}"
            )
