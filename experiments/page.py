"""The page of an experiment: what its source claims, what was measured, and what holds."""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console

from experiments import options, report

Holds = Literal["yes", "partly", "no", "open"]
"""Whether a claim holds. It is open if the run was too short to tell."""
Rows = Sequence[Mapping[str, str]]


def judge(*checks: bool) -> Literal["yes", "partly", "no"]:
    """Whether a claim with these parts holds.

    Raises:
      ValueError: If there are no parts.
    """
    if not checks:
        raise ValueError("a claim of which nothing was checked cannot be judged")
    return "yes" if all(checks) else "partly" if any(checks) else "no"


def before(a: int | None, b: int | None) -> bool:
    """Whether a target was reached in fewer steps by a than by b. None means never."""
    return a is not None and (b is None or a < b)


def median(values: Sequence[float | None], quantile: float = 0.5) -> float:
    """The value nearest to the quantile. None, and what is not a number, count as infinite."""
    numbers = np.nan_to_num(np.array(values, float), nan=np.inf)
    return float(np.quantile(numbers, quantile, method="nearest"))


def count(value: float, form: str = ",.0f") -> str:
    """A number as text."""
    return "∞" if value > 1e9 else format(value, form)


def spread(values: Sequence[float | None], form: str = ",.0f") -> str:
    """The median and the range of some values, as text."""
    middle, low, high = (count(median(values, at), form) for at in (0.5, 0, 1))
    return middle if middle == low == high else f"{middle} [{low}, {high}]"


class Claim(NamedTuple):
    """A statement of the source, and what was measured here."""

    source: str
    """The section or the figure that states it."""
    claim: str
    measured: str
    """The numbers that were found."""
    holds: Holds
    """The verdict."""


@dataclass(frozen=True)
class Page:
    """The contents of a page."""

    title: str
    source: str
    """The document that is checked."""
    summary: str
    """What was done."""
    behind: Sequence[str]
    """Sentences that say where our method loses, with numbers. Empty if it loses nowhere."""
    claims: Sequence[Claim]
    choices: Sequence[str]
    """What the source leaves open, and what was chosen here."""
    tables: Mapping[str, Rows]
    """By title."""
    figures: Mapping[str, str]
    """Captions by file name. The files lie beside the page."""


def markdown(page: Page, content: Mapping[str, Any]) -> str:
    """The page in Markdown: first the claims, and where our method loses.

    Args:
      page: Its contents.
      content: What is in results.json: the settings, the command and the environment of the run.
    """
    claims = [
        {"the source": f"{c.claim} ({c.source})", "measured": c.measured, "holds": f"**{c.holds}**"}
        for c in page.claims
    ]
    parts = [
        f"# {page.title}",
        f"Source: {page.source}.",
        "## Does it hold?",
        "**Where our method loses.** "
        + (" ".join(page.behind) or "Nowhere, in what was measured here."),
        report.markdown_table(claims, align="---"),
        "## What was done",
        page.summary,
        *(f"![{caption}]({file})\n\n*{caption}*" for file, caption in page.figures.items()),
        *(f"## {title}\n\n{report.markdown_table(rows)}" for title, rows in page.tables.items()),
        "## What the source leaves open, and what was taken",
        _list(page.choices),
        "## How to repeat it",
        f"```sh\n{content['command']}\n```",
        "Every number is in [results.json](results.json).",
        "Settings: "
        + ", ".join(f"{name} {_show(value)}" for name, value in content["settings"].items()),
        report.machine(content["environment"]),
    ]
    return "\n\n".join(parts) + "\n"


def publish(name: str, given: Any, settings: Any, results: Any, console: Console) -> None:
    """Write figures, README.md and results.json into the output folder, and print what holds.

    The module `experiments.pages.NAME` draws the figures, by its `draw(settings, results)`.

    Args:
      name: The experiment's name on the command line.
      given: Its options as they were given.
      settings: Its options with the preset filled in.
      results: Every number.
      console: Where to print.
    """
    folder = settings.output
    folder.mkdir(parents=True, exist_ok=True)
    importlib.import_module(f"experiments.pages.{name}").draw(settings, results)
    content = {
        "experiment": name,
        "command": options.command(name, given),
        "settings": report.plain(asdict(settings)),
        "environment": report.environment(),
        "results": json.loads(json.dumps(report.plain(results)), parse_float=_short),
    }
    page = write(folder, content)
    for title, rows in page.tables.items():
        report.print_table(console, title, rows)
    for claim in page.claims:
        console.print(f"{claim.holds:>6}: {claim.claim} [{claim.measured}]", markup=False)
    console.print(f"Written: {folder}/README.md", highlight=False, soft_wrap=True)


def write(folder: Path, content: Mapping[str, Any]) -> Page:
    """Write README.md and results.json, from what results.json is to have. No figure is drawn.

    The module `experiments.pages.NAME` makes the page, by its `page(settings, results)`.

    Args:
      folder: Where to.
      content: The experiment's name, its command, settings and environment, and every number.

    Returns:
      The page.
    """
    settings = SimpleNamespace(**content["settings"])
    pages = importlib.import_module(f"experiments.pages.{content['experiment']}")
    page: Page = pages.page(settings, content["results"])
    judged = {"claims": [claim._asdict() for claim in page.claims], "behind": [*page.behind]}
    text = markdown(page, content)
    report.write_json(folder / "results.json", {**content, **judged})
    (folder / "README.md").write_text(text, encoding="utf-8")
    return page


def _short(number: str) -> float:
    """The number with seven digits."""
    return float(f"{float(number):.7g}")


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _show(value: Any) -> str:
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"
