"""How results are written: tables, JSON, and the environment that they depend on."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table. All rows have the same keys, which are the headings of the columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console.print(table)


def markdown_table(rows: Sequence[Mapping[str, str]], *, align: str = "---:") -> str:
    """Such a table in Markdown. `align` is of all columns but the first."""
    lines = [
        list(rows[0]),
        ["---", *[align] * (len(rows[0]) - 1)],
        *(row.values() for row in rows),
    ]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def environment() -> dict[str, Any]:
    """What the numbers depend on, besides the settings."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "system": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "cores": cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cores() -> int | None:
    """How many cores this process may use, if the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def machine(environment: Mapping[str, Any]) -> str:
    """A sentence about what `environment` returned."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    every, used = environment["cpu_count"], environment.get("cores")
    limited = f", of which this had {used}" if used and used < every else ""
    variables = ("XLA_FLAGS", "GLIBC_TUNABLES")  # pages from before them have none
    their = {name: environment.get(name.lower()) for name in variables}
    flags = "".join(f", {name}={flags}" for name, flags in their.items() if flags)
    return (
        f"Measured on {environment['device']} ({environment['cpu']}, {every} cores{limited}), "
        f"{environment['date']}: Python {environment['python']}, {versions}, "
        f"{environment['system']}{flags}."
    )


def _cpu() -> str:
    """The processor's model, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of standard JSON. It appears only when it is whole. Arrays of numbers are lines.

    (In a JSON string no line ends, so that none can be taken for an array.)
    """
    part = path.with_name(f"{path.name}.part")
    text = json.dumps(plain(content), indent=2, allow_nan=False)
    text = re.sub(r'\[(\n[^]["{}]*)\]', lambda array: f"[{' '.join(array[1].split())}]", text)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def plain(value: Any) -> Any:
    """The value in standard JSON: numbers that are not finite become null, and paths strings."""
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
