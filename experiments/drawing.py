"""Figures whose lines differ in colour, mark and dashes."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

# Paul Tol's muted colours, in an order that can be told apart in grey.
STYLES = (
    {"color": "#332288", "marker": "o", "linestyle": "-"},
    {"color": "#DDAA33", "marker": "s", "linestyle": (0, (5, 2))},
    {"color": "#BB5566", "marker": "^", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#117733", "marker": "D", "linestyle": (0, (1, 1))},
    {"color": "#88CCEE", "marker": "v", "linestyle": (0, (6, 1, 1, 1, 1, 1))},
    {"color": "#222222", "marker": "P", "linestyle": (0, (8, 3))},
    {"color": "#AA4499", "marker": "X", "linestyle": "-"},
    {"color": "#999933", "marker": "<", "linestyle": (0, (5, 2))},
    {"color": "#44AA99", "marker": ">", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#882255", "marker": "*", "linestyle": (0, (1, 1))},
)


def style(number: int, **changes: Any) -> dict[str, Any]:
    """Colour, mark and dashes of the line with this number, for `Axes.plot`."""
    return {**STYLES[number], "markersize": 4.5, "linewidth": 1.4, **changes}


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of rows and columns of panels, each of a size in inches. Returns panels in rows."""
    shape = (columns * size[0], rows * size[1])
    figure = Figure(figsize=shape, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def logarithmic(axes: Axes, highest: float = np.inf) -> None:
    """Make the vertical axis logarithmic, with plain numbers, and cut it off at `highest`."""
    axes.set_yscale("log")
    if axes.get_ylim()[1] > highest:
        axes.set_ylim(0.9 * axes.dataLim.y0, highest)
    axes.yaxis.set(
        major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)),
        major_formatter=StrMethodFormatter("{x:g}"),
        minor_locator=NullLocator(),
    )


def few_ticks(axes: Axes) -> None:
    """Leave ticks that a small panel with a logarithmic axis has room for."""
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high < 100 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))


def band(axes: Axes, x: Any, median: Any, low: Any, high: Any, label: str, number: int) -> None:
    """Draw a line of medians, and shade the range from `low` to `high`."""
    axes.plot(x, median, label=label, markevery=max(1, len(x) // 8), **style(number))
    axes.fill_between(x, low, high, color=STYLES[number]["color"], alpha=0.15, linewidth=0)


def save(figure: Figure, path: Path) -> None:
    """Write it as PNG."""
    figure.savefig(path, dpi=120)
