"""An experiment's options: presets, checks, and the command line that gives them."""

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

Preset = Literal["smoke", "cpu", "paper", "long"]
"""smoke is for tests, cpu for minutes of two CPU cores, paper has the settings of the source, and
long is as near to them as two CPU cores come in hours."""

Settings = TypeVar("Settings")
Presets = Mapping[Preset, Mapping[str, Any]]


def presets(**values: tuple[Any, ...]) -> Presets:
    """The presets, from the values of each option: for smoke, cpu and paper, and perhaps for long.

    Without a value of its own, long has that of cpu.
    """
    every = {option: (*several, several[1])[:4] for option, several in values.items()}
    return {
        preset: {option: several[number] for option, several in every.items()}
        for number, preset in enumerate(get_args(Preset))
    }


def filled(settings: Settings, presets: Presets) -> Settings:
    """The settings. An option that was not given (None) has its preset's value."""
    preset = presets[settings.preset].items()  # pyright: ignore[reportAttributeAccessIssue]
    missing = {name: value for name, value in preset if getattr(settings, name) is None}
    return replace(settings, **missing)  # pyright: ignore[reportArgumentType]


def command(name: str, settings: Any) -> str:
    """The command line that gives an experiment these settings, without the defaults.

    It has neither --resume nor --only-finished, even if these settings have them.
    """
    words = ["python -m experiments", name]
    for field in fields(settings):
        value, option = getattr(settings, field.name), field.name.replace("_", "-")
        if value == field.default or field.name in ("resume", "only_finished"):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option}", *map(str, values)]
    return " ".join(words[:1] + list(map(shlex.quote, words[1:])))


class Range(NamedTuple):
    """The numbers that an option may have."""

    words: str
    has: Callable[[float], bool]
    most: float = math.inf
    """More cannot be meant: no machine could do it."""


AT_LEAST_ONE = Range("at least 1", lambda value: value >= 1, most=10_000_000)
SEED = Range("at least 0", lambda value: value >= 0, most=2**31 - 1)
LENGTH = Range("positive and finite", lambda value: 0 < value < math.inf, most=10_000)
POSITIVE = Range("positive and finite", lambda value: 0 < value < math.inf)
COUNT = Range("finite and not negative", lambda value: 0 <= value < math.inf, most=10_000_000)
NOT_NEGATIVE = Range("finite and not negative", lambda value: 0 <= value < math.inf)
FRACTION = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)


def require(settings: Any, allowed: Range, *fields: str) -> None:
    """Refuse numbers that are not in a range, also in tuples. None is allowed.

    Raises:
      ValueError: If there is one; the message names the option as the command line does.
    """
    for field in fields:
        values = getattr(settings, field)
        for value in values if isinstance(values, tuple) else (values,):
            option = "--" + field.replace("_", "-")
            if value is not None and not allowed.has(value):
                raise ValueError(f"{option} must be {allowed.words}, got {value}")
            if value is not None and value > allowed.most:
                raise ValueError(f"{option} must be at most {allowed.most:,}, got {value}")


def require_distinct(settings: Any, field: str, *needed: str) -> None:
    """Refuse a tuple that lacks a needed value, is empty, or has a value twice. None is allowed.

    Raises:
      ValueError: If it is one of these; the message names the option.
    """
    values = getattr(settings, field)
    if values is None or (values and {*needed} <= {*values} and len({*values}) == len(values)):
        return
    wanted, option = " and ".join(needed) or "at least one", field.replace("_", "-")
    raise ValueError(f"--{option} must have {wanted}, and none twice, got {values}")


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
