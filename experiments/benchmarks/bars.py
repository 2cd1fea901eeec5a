"""The results of a part of the benchmarks: tables, numbers, and bars held or missed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """A ratio that was measured, and the limit that it must keep."""

    work: str
    """What was measured."""
    measured: float | None
    """The ratio; None if there is none."""
    limit: float
    """The greatest ratio allowed, or the least."""
    at_least: bool = False
    """Whether the limit is the least ratio allowed."""
    reason: str = "not measured"
    """Why there is no number."""

    @property
    def held(self) -> bool:
        """Whether the ratio keeps the limit. Without a ratio it does not."""
        if self.measured is None:
            return False
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def verdict(self) -> str:
        """Whether the bar is held; if not, by how much it was missed."""
        if self.held:
            return "yes"
        if self.measured is None:
            return f"no: {self.reason}"
        direction = "less" if self.at_least else "more"
        return f"no: {abs(self.measured / self.limit - 1):.1%} {direction}"

    def row(self) -> dict[str, str]:
        """The bar's row of a table."""
        return {
            "work": self.work,
            "measured": number(self.measured),
            "bar": f"{'≥' if self.at_least else '≤'} {self.limit:g}",
            "held?": self.verdict(),
        }

    def numbers(self) -> dict[str, Any]:
        """The bar as it goes into the JSON file."""
        return self._asdict() | {"held": self.held}


class Table(NamedTuple):
    """Rows that share their keys, which are the columns' headings."""

    title: str
    rows: Sequence[Mapping[str, str]]


class Result(NamedTuple):
    """What a part measured."""

    numbers: dict[str, Any]
    tables: Sequence[Table]
    bars: Sequence[Bar]


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def spread(summary: Mapping[str, Any]) -> str:
    """A median and its quartiles for a table."""
    low, high = map(number, summary["quartiles"])
    return f"{number(summary['median'])} ({low}–{high})"
