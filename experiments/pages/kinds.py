"""What the pages that compare optimizers on several kinds of work share. Adam is the measure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import drawing
from experiments.everyday.entrants import ADAM, DEFAULTS, OURS
from experiments.page import count, median, spread
from experiments.pages import contests
from experiments.pages.contests import Contest, curves, edge, last, to_target

Held = Mapping[str, Contest]
"""The contests, by the kind of work."""
Table = list[dict[str, str]]
NEEDED = {
    "step": ("steps", ",.0f"),
    "seconds": ("seconds", ",.1f"),
    "seconds_with_compilation": ("seconds, compilation counted", ",.1f"),
}


def ahead(contest: Contest, name: str, metric: str) -> bool:
    """Whether it ends with a lower metric than Adam, in the median."""
    theirs, its = (median(last(contest, n, metric)) for n in (ADAM, name))
    return its < theirs


def ends(held: Held, name: str, metric: str) -> str:
    """What it and Adam end with, by kind."""
    return ", ".join(
        f"{title} " + " to ".join(count(median(last(c, n, metric)), ".4g") for n in (name, ADAM))
        for title, c in held.items()
    )


def share(contest: Contest, name: str, key: str) -> float:
    """What it needs to reach the target, as a part of all that Adam takes."""
    whole = {"step": "steps"}.get(key, key)
    return median(to_target(contest, name, key)) / median(last(contest, ADAM, whole))


def diverged(contest: Contest, name: str, metrics: Sequence[str]) -> int:
    """How many of its runs end with one of the metrics that is not a number."""
    values = [last(contest, name, metric) for metric in metrics]
    return int((~np.isfinite(np.array(values, float))).any(axis=0).sum())


def behind(held: Held, metrics: Mapping[str, str], judged: str) -> list[str]:
    """Where others do better than C-Adam, and where our other optimizers lose to Adam. Medians.

    Args:
      held: The contests.
      metrics: The metrics in which C-Adam is compared with others, with their names in words.
      judged: The one in which all of ours are compared with Adam.

    Returns:
      Sentences.
    """
    lines = [
        f"{title}, {OURS}: {'; '.join(lost)}."
        for title, contest in held.items()
        for lost in [contests.ahead(contest, OURS, metrics, NEEDED, ".4g")]
        if lost
    ]
    names = dict.fromkeys(name for contest in held.values() for name in _of(contest, "ours"))
    for name in names:
        where = [
            title
            for title, contest in held.items()
            if name in contest["entrants"] and name != OURS and not ahead(contest, name, judged)
        ]
        if where:
            words = metrics[judged]
            lines.append(
                f"{name} ends with a higher {words} than tuned {ADAM}: {', '.join(where)}."
            )
    return lines


def _of(contest: Contest, *roles: str) -> list[str]:
    """The entrants with these roles."""
    return [name for name, entrant in contest["entrants"].items() if entrant["role"] in roles]


def at_edges(held: Held) -> list[str]:
    """Who would perhaps have a better rate beyond those that were tried."""
    there = [
        f"{name} ({title}, {entrant['rate']:g})"
        for title, contest in held.items()
        for name, entrant in contest["entrants"].items()
        if entrant["tuning"] and edge(entrant)
    ]
    return [f"Still at the edge of the rates that were tried: {', '.join(there)}."] * bool(there)


def table(held: Held, cell: Callable[[Contest, str], str]) -> Table:
    """Kinds of work by optimizers."""
    names = dict.fromkeys(name for contest in held.values() for name in contest["entrants"])
    return [
        {"": title, **{n: cell(c, n) if n in c["entrants"] else "–" for n in names}}
        for title, c in held.items()
    ]


def last_values(held: Held, metric: str) -> Table:
    """What each ends with."""
    return table(held, lambda contest, name: spread(last(contest, name, metric), ".4g"))


def costs(held: Held, target: str, metrics: Sequence[str]) -> dict[str, Table]:
    """What each needs to reach the target, what its steps cost, and its rates.

    Args:
      held: The contests.
      target: What they are to reach, in words.
      metrics: A run diverged if one of these is not a number in the end.

    Returns:
      The tables, by title.
    """

    def part(key: str) -> Table:
        return table(held, lambda contest, name: count(share(contest, name, key), ".2f"))

    def step(contest: Contest, name: str) -> str:
        seconds = contest["seconds_per_step"]
        return f"{1e3 * seconds[name]:.1f} ({seconds[name] / seconds[ADAM]:.2f})"

    def compiling(contest: Contest, name: str) -> str:
        run = contest["entrants"][name]["runs"][0]
        return f"{run['seconds_with_compilation'] - run['seconds']:.1f}"

    def rate(contest: Contest, name: str) -> str:
        entrant = contest["entrants"][name]
        return f"{entrant['rate']:g}" + " (at the edge)" * bool(entrant["tuning"] and edge(entrant))

    def tried(contest: Contest, name: str) -> str:
        tuning = sorted(contest["entrants"][name]["tuning"], key=lambda at: at["rate"])
        losses = [count(median([at["validation_loss"]]), ".4g") for at in tuning]
        pairs = zip(tuning, losses, strict=True)
        return ", ".join(f"{at['rate']:g}: {loss}" for at, loss in pairs) or "–"

    whole = f"to {target}, as a part of {ADAM}'s"
    return {
        f"Steps {whole}": part("step"),
        f"Seconds {whole}": part("seconds"),
        f"Seconds with compilation {whole}": part("seconds_with_compilation"),
        f"Milliseconds of a step (as a multiple of {ADAM}'s)": table(held, step),
        "Seconds of compilation": table(held, compiling),
        "Runs that diverged": table(held, lambda c, name: f"{diverged(c, name, metrics)}"),
        "Rates": table(held, rate),
        "Validation losses of the tuning runs, by rate": table(held, tried),
    }


def draw(settings: Any, held: Held, metric: str, words: str, highest: float) -> None:
    """Draw a metric by steps and by seconds, with a panel for each kind of work.

    Args:
      settings: The files steps.png and seconds.png go to `settings.output`.
      held: The contests.
      metric: The metric, whose target is a grey line.
      words: Its name on the axis.
      highest: What is more than so many times the target is not drawn.
    """
    columns = min(3, len(held)) if len(held) != 4 else 2
    names = dict.fromkeys(name for contest in held.values() for name in contest["entrants"])
    drawn = sorted(names.keys() - {DEFAULTS}, key=lambda name: (name != OURS, [*names].index(name)))
    for file in ("steps", "seconds"):
        figure, axes = drawing.panels(-(-len(held) // columns), columns, (4.2, 3.6))
        for panel, (title, contest) in zip(axes, held.items(), strict=False):
            curves_of(panel, contest, drawn, file, metric, highest)
            panel.set(title=title, xlabel=file, ylabel=f"{words} (log scale)", xlim=(0, None))
        most = max(axes, key=lambda panel: len(panel.get_lines()))
        axes[columns - 1].legend(
            handles=most.get_lines()[:-1],
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            fontsize="small",
        )
        drawing.save(figure, settings.output / f"{file}.png")


def curves_of(
    axes: Any, contest: Contest, names: Sequence[str], by: str, metric: str, highest: float
) -> None:
    """Draw the curves of a contest without the first step; each name has its style everywhere."""
    for number, name in enumerate(names):
        if name not in contest["entrants"]:
            continue
        steps, _, values = curves(contest, name, metric)
        runs = contest["entrants"][name]["runs"]
        seconds = np.array([run["history"]["metrics"][metric]["seconds"] for run in runs])
        x = np.array(steps) if by == "steps" else contests.middle(seconds)[0]
        middle, low, high = (each[1:] for each in contests.middle(values))
        drawing.band(axes, x[1:], middle, low, high, name, number)
    target = contest["target"][metric]
    axes.axhline(target, color="0.4", linewidth=0.8)
    drawing.logarithmic(axes, highest=highest * target)
