"""What a part of the benchmarks leaves behind: tables, numbers, and bars held or missed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """What must show, and what did."""

    work: str
    """What was measured."""
    measured: float | None
    """A ratio; None if there is none."""
    limit: float
    """What it may be."""
    at_least: bool = False
    """Whether more is better."""
    reason: str = "not measured"
    """Why there is no number."""

    @property
    def held(self) -> bool:
        """Whether the number is on the right side of the limit; without a number it is not."""
        if self.measured is None:
            return False
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def verdict(self) -> str:
        """Whether it is held, and otherwise by how much it was missed."""
        if self.held:
            return "yes"
        if self.measured is None:
            return f"no: {self.reason}"
        direction = "less" if self.at_least else "more"
        return f"no: {abs(self.measured / self.limit - 1):.1%} {direction}"

    def row(self) -> dict[str, str]:
        """Its row of a table."""
        return {
            "work": self.work,
            "measured": number(self.measured),
            "bar": f"{'≥' if self.at_least else '≤'} {self.limit:g}",
            "held?": self.verdict(),
        }

    def numbers(self) -> dict[str, Any]:
        """What goes into the JSON file."""
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
