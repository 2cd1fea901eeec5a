"""What an experiment leaves behind: a table, a figure, and every number as JSON."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.training import Curve

# Paul Tol's high-contrast colours: told apart by colour-blind readers and in grey.
STYLES = (("#004488", "o"), ("#DDAA33", "s"), ("#BB5566", "^"))


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows that share their keys, which are the columns' headings."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console.print(table)


def markdown_table(rows: Sequence[Mapping[str, str]], *, align: str = "---:") -> str:
    """The same rows as a table in Markdown, the first column to the left, the rest by `align`."""
    lines = [
        list(rows[0]),
        ["---", *[align] * (len(rows[0]) - 1)],
        *(row.values() for row in rows),
    ]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


class Line(NamedTuple):
    """A curve, drawn in the colour and with the marks of its style."""

    label: str
    curve: Curve
    style: int
    faint: Curve | None = None
    """Another curve of the same, behind it."""


class Panel(NamedTuple):
    """Lines in one coordinate system."""

    lines: Sequence[Line]
    ylabel: str
    note: str
    """Stands over the legend; without it, there is none."""
    against: Literal["step", "seconds"] = "step"
    log: bool = True


def plot(path: Path, title: str, rows: Sequence[Sequence[Panel]]) -> None:
    """Draw curves in rows of panels; the panels of a row share their vertical axis."""
    figure = Figure(figsize=(11, 0.8 + 4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(rows[0]), sharey="row", squeeze=False)
    for axes_row, panels in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(panels[0].ylabel)
        for axes, panel in zip(axes_row, panels, strict=True):
            _draw(axes, panel)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, panel: Panel) -> None:
    for label, curve, style, faint in panel.lines:
        colour, marker = STYLES[style]
        line = {"color": colour, "marker": marker, "markersize": 4.5, "label": label}
        if faint:
            horizontal = getattr(faint, panel.against)
            axes.plot(horizontal, faint.value, color=colour, alpha=0.3, linewidth=1)
        axes.plot(getattr(curve, panel.against), curve.value, **line)
    seconds = "training time in seconds, without compilation"
    axes.set(xlim=(0, None), xlabel="steps" if panel.against == "step" else seconds)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set(
            major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)),
            major_formatter=StrMethodFormatter("{x:g}"),
            minor_locator=NullLocator(),
        )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.note:
        axes.legend(title=panel.note, title_fontsize="small")


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "system": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu() -> str:
    """The processor's model, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of standard JSON, `plain`; it is there once it is whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n")
    part.replace(path)


def plain(value: Any) -> Any:
    """What standard JSON has for it: numbers that are not finite become null, paths strings."""
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
    return value
