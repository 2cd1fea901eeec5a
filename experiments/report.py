"""What an experiment leaves behind: a progress bar, a table, a figure, and every number as JSON."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments.training import History

# Paul Tol's high-contrast colours: told apart by colour-blind readers and in grey.
STYLES = (("#004488", "o"), ("#DDAA33", "s"), ("#BB5566", "^"))


def training_progress(console: Console) -> Progress:
    """A live bar for training runs; its tasks have the fields `loss` and `speed`."""
    return Progress(
        TextColumn("{task.description:<6}"),
        BarColumn(),
        TextColumn("{task.completed:>6,}/{task.total:,} steps"),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:.0f} steps/s"),
        TimeRemainingColumn(),
        console=console,
    )


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows that share their keys, which are the columns' headings."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def plot_losses(path: Path, title: str, note: str, histories: Mapping[str, History]) -> None:
    """Draw training losses against steps and against seconds; the last history is in front."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (label, history), (colour, marker) in zip(histories.items(), STYLES, strict=False):
        means, fixed = history.batch_loss, history.train_loss
        line = {"color": colour, "marker": marker, "markersize": 4.5, "label": label}
        panels[0].plot(means.step, means.loss, color=colour, alpha=0.3, linewidth=1)
        panels[1].plot(means.seconds, means.loss, color=colour, alpha=0.3, linewidth=1)
        panels[0].plot(fixed.step, fixed.loss, **line)
        panels[1].plot(fixed.seconds, fixed.loss, **line)
    panels[0].set_xlabel("steps")
    panels[1].set_xlabel("training time in seconds, without compilation")
    for axes in panels:
        axes.set(yscale="log", xlim=(0, None))
        axes.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 3, 5)),
            major_formatter=StrMethodFormatter("{x:g}"),
            minor_locator=NullLocator(),
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training loss (cross-entropy, log scale)")
    panels[0].legend(title=note, title_fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "system": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_count": os.cpu_count(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write standard JSON: numbers that are not finite become null, paths strings."""
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
    return value
