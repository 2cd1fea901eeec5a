"""What this library says of everyday work, and what was measured."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import drawing
from experiments.everyday.entrants import ADAM, AT_DEFAULT_RATE, DEFAULTS, OURS, WARM_UP
from experiments.everyday.experiment import KINDS
from experiments.page import Claim, Page, count, judge, median, spread
from experiments.pages import contests
from experiments.pages.contests import Contest, curves, edge, last, to_target

Held = Mapping[str, Contest]
STEPS_BAR = 0.6  # of Adam's
DOCUMENT = "this library's own words"
LOSSES = {"validation_loss": "validation loss", "train_loss": "training loss"}
NEEDED = {
    "step": ("steps", ",.0f"),
    "seconds": ("seconds", ",.1f"),
    "seconds_with_compilation": ("seconds, compilation counted", ",.1f"),
}


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The library's claims, judged by the results."""
    held: Held = results["contests"]
    claims = _claims(held)
    if set(held) != set(KINDS) or settings.length < 1 or settings.tries < 3:  # nobody is tuned
        claims = [claim._replace(holds="open") for claim in claims]
    return Page(
        "Six kinds of everyday work",
        DOCUMENT,
        _summary(settings, results),
        behind(held),
        claims,
        [
            f"All rates rise for the first {WARM_UP:.0%} of the steps and then fall to zero as a "
            "cosine. The rate of an optimizer is the peak.",
            f"Muon is for hidden weights as matrices; {OURS} is for all that its plan covers. The "
            f"parameters left over are {ADAM}'s, at the rate that was best for it alone.",
            f"{AT_DEFAULT_RATE} has a peak of 0.01, for all parameters, and had no tuning runs. "
            f"{DEFAULTS}, is `cqjax.cadam` as it comes: constant at 0.01.",
            "A step or second counts when the next evaluation, 15 in a run, finds the target "
            "reached. Seconds are of training; evaluation is off the clock. Compilation is counted "
            "once for each optimizer, where it says so.",
            *_edges(held),
            *_overfitting(held),
        ],
        _tables(held),
        {
            "steps.png": f"Training loss by steps. {contests.CAPTION}",
            "seconds.png": f"Training loss by seconds, without compiling. {contests.CAPTION}",
        },
    )


def _summary(settings: Any, results: Mapping[str, Any]) -> str:
    """What was done."""
    effort = next(iter(results["contests"].values()))["effort"]
    lengths = ", ".join(
        f"{title} {c['effort']['steps']:,} of {c['effort']['batch_size']}"
        for title, c in results["contests"].items()
    )
    return (
        "A character language model on Python's standard library; a deep autoencoder, a "
        "convolutional network with batch normalisation and a fully-connected network on the "
        f"images of {results['dataset']['name']}; a coordinate network on a photograph; a "
        "regression on a synthetic table with heavy tails. Steps and batch sizes: "
        f"{lengths}. Each optimizer had {settings.tries} tuning runs of full length at rates half "
        f"a decade apart, and up to {settings.extensions} more, one at a time, while the best rate "
        "was at the edge of those tried. The rate with the lowest validation loss in the end then "
        f"ran at {effort['seeds']} other seed{'s' * (effort['seeds'] > 1)}. At each seed all "
        "optimizers share first weights and batches (medians, and ranges in brackets). The target "
        f"is the training loss that {ADAM} has in the end, in the median."
    )


def _claims(held: Held) -> list[Claim]:
    """What the library says, and the verdicts."""
    ahead = {title: _ahead(contest, OURS) for title, contest in held.items()}
    parts = {title: share(contest, OURS, "step") for title, contest in held.items()}
    soon = sum(part <= STEPS_BAR for part in parts.values())
    untuned = {title: _ahead(contest, AT_DEFAULT_RATE) for title, contest in held.items()}
    lost = sum(diverged(contest, AT_DEFAULT_RATE) for contest in held.values())
    return [
        Claim(
            DOCUMENT,
            f"{OURS} ends with a lower validation loss than tuned {ADAM} on at least five of six "
            "kinds of work",
            f"on {sum(ahead.values())} of {len(held)}: {_losses(held, OURS)}",
            judge(sum(ahead.values()) >= 5),
        ),
        Claim(
            DOCUMENT,
            f"{OURS} reaches {ADAM}'s last training loss in at most {STEPS_BAR:g} of its steps on "
            "at least four",
            f"on {soon} of {len(held)}: "
            + ", ".join(f"{title} {count(part, '.2f')}" for title, part in parts.items()),
            judge(soon >= 4),
        ),
        Claim(
            DOCUMENT,
            f"untuned, with a peak of 0.01, it is ahead of tuned {ADAM} on at least three, and "
            "finite on all",
            f"on {sum(untuned.values())} of {len(held)}, with {lost:g} diverged runs: "
            + _losses(held, AT_DEFAULT_RATE),
            judge(sum(untuned.values()) >= 3, lost == 0),
        ),
    ]


def _ahead(contest: Contest, name: str) -> bool:
    """Whether it ends with a lower validation loss than Adam, in the median."""
    theirs, its = (median(last(contest, n, "validation_loss")) for n in (ADAM, name))
    return its < theirs


def _losses(held: Held, name: str) -> str:
    return ", ".join(
        f"{title} "
        + " to ".join(
            count(median(last(contest, n, "validation_loss")), ".4g") for n in (name, ADAM)
        )
        for title, contest in held.items()
    )


def share(contest: Contest, name: str, key: str) -> float:
    """What it needs to Adam's last training loss, as a part of all that Adam takes."""
    whole = {"step": "steps"}.get(key, key)
    return median(to_target(contest, name, key)) / median(last(contest, ADAM, whole))


def diverged(contest: Contest, name: str) -> int:
    """How many of its runs end with a loss that is not a number."""
    ends = [last(contest, name, metric) for metric in LOSSES]
    return int((~np.isfinite(np.array(ends, float))).any(axis=0).sum())


def behind(held: Held) -> list[str]:
    """Where others do better than C-Adam, and where our other optimizers lose to Adam. Medians."""
    others = ("baseline", "other")
    lines = []
    for title, contest in held.items():
        for name in _of(contest, *others):
            lost = [
                f"{words} {spread(theirs, '.4g')} in the end, not {spread(its, '.4g')}"
                for metric, words in LOSSES.items()
                for theirs, its in [[last(contest, n, metric) for n in (name, OURS)]]
                if median(theirs) < median(its)
            ] + [
                f"the target after {spread(theirs, form)} {words}, not {spread(its, form)}"
                for key, (words, form) in NEEDED.items()
                for theirs, its in [[to_target(contest, n, key) for n in (name, OURS)]]
                if median(theirs) < median(its)
            ]
            if lost:
                lines.append(f"{title}: {name} is ahead of {OURS}: {'; '.join(lost)}.")
    names = dict.fromkeys(name for contest in held.values() for name in _of(contest, "ours"))
    for name in names:
        where = [
            title
            for title, contest in held.items()
            if name in contest["entrants"] and name != OURS and not _ahead(contest, name)
        ]
        if where:
            lines.append(
                f"{name} ends with a higher validation loss than tuned {ADAM}: {', '.join(where)}."
            )
    return lines


def _of(contest: Contest, *roles: str) -> list[str]:
    """The entrants with these roles."""
    return [name for name, entrant in contest["entrants"].items() if entrant["role"] in roles]


def _edges(held: Held) -> list[str]:
    """Who would perhaps have a better rate beyond those that were tried."""
    there = [
        f"{name} ({title}, {entrant['rate']:g})"
        for title, contest in held.items()
        for name, entrant in contest["entrants"].items()
        if entrant["tuning"] and edge(entrant)
    ]
    return [f"Still at the edge of the rates that were tried: {', '.join(there)}."] * bool(there)


def _overfitting(held: Held) -> list[str]:
    """Who learns the table by heart, and what to do then."""
    if "tabular" not in held:
        return []
    found = []
    for name in (ADAM, OURS):
        steps, _, values = curves(held["tabular"], name, "validation_loss")
        middle = contests.middle(values)[0]
        best = int(middle.argmin())
        found.append(
            f"{name}'s validation loss is lowest after {steps[best]:,} steps, "
            f"{count(middle[best], '.4f')}, and {count(middle[-1], '.4f')} in the end"
        )
    return [
        "The table has few rows for a network that large, and a quarter of its targets' variance "
        f"is noise: {'; '.join(found)}. Where a network learns its examples by heart, a faster "
        "optimizer does so sooner: take `relative_damping=1`, weight decay, or fewer steps."
    ]


def _tables(held: Held) -> dict[str, list[dict[str, str]]]:
    """A table for each quantity: kinds of work by optimizers."""
    names = dict.fromkeys(name for contest in held.values() for name in contest["entrants"])

    def table(cell: Callable[[Contest, str], str]) -> list[dict[str, str]]:
        return [
            {"": title, **{n: cell(c, n) if n in c["entrants"] else "–" for n in names}}
            for title, c in held.items()
        ]

    def rate(contest: Contest, name: str) -> str:
        entrant = contest["entrants"][name]
        return f"{entrant['rate']:g}" + " (at the edge)" * bool(entrant["tuning"] and edge(entrant))

    def ends(metric: str) -> Callable[[Contest, str], str]:
        return lambda contest, name: spread(last(contest, name, metric), ".4g")

    def score(contest: Contest, name: str) -> str:
        right = "test_accuracy" in contest["entrants"][name]["runs"][0]
        if right:
            return spread(last(contest, name, "test_accuracy"), ".2%")
        return spread(last(contest, name, "test_error"), ".4g")

    def part(key: str) -> Callable[[Contest, str], str]:
        return lambda contest, name: count(share(contest, name, key), ".2f")

    def step(contest: Contest, name: str) -> str:
        seconds = contest["seconds_per_step"]
        return f"{1e3 * seconds[name]:.1f} ({seconds[name] / seconds[ADAM]:.2f})"

    def compiling(contest: Contest, name: str) -> str:
        run = contest["entrants"][name]["runs"][0]
        return f"{run['seconds_with_compilation'] - run['seconds']:.1f}"

    def tried(contest: Contest, name: str) -> str:
        tuning = sorted(contest["entrants"][name]["tuning"], key=lambda at: at["rate"])
        losses = [count(median([at["validation_loss"]]), ".4g") for at in tuning]
        pairs = zip(tuning, losses, strict=True)
        return ", ".join(f"{at['rate']:g}: {loss}" for at, loss in pairs) or "–"

    whole = f"to {ADAM}'s last training loss, as a part of {ADAM}'s"
    return {
        "Validation loss in the end": table(ends("validation_loss")),
        "Training loss in the end": table(ends("train_loss")),
        "Test accuracy or error in the end": table(score),
        f"Steps {whole}": table(part("step")),
        f"Seconds {whole}": table(part("seconds")),
        f"Seconds with compilation {whole}": table(part("seconds_with_compilation")),
        f"Milliseconds of a step (as a multiple of {ADAM}'s)": table(step),
        "Seconds of compilation": table(compiling),
        "Runs that diverged": table(lambda contest, name: f"{diverged(contest, name)}"),
        "Rates": table(rate),
        "Validation losses of the tuning runs, by rate": table(tried),
    }


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw steps.png and seconds.png, with a panel for each kind of work, and front.png."""
    held = results["contests"]
    columns = min(3, len(held))
    for file in ("steps", "seconds"):
        figure, axes = drawing.panels(-(-len(held) // columns), columns, (4.2, 3.6))
        for panel, (title, contest) in zip(axes, held.items(), strict=False):
            names = [name for name in contest["entrants"] if name != DEFAULTS]
            _draw(panel, title, contest, file, names)
            panel.set_ylabel("training loss (log scale)")
        axes[columns - 1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
        drawing.save(figure, settings.output / f"{file}.png")
    _draw_front(held, settings.output / "front.png")


def _draw_front(held: Held, path: Path) -> None:
    """Draw few optimizers for many readers: each kind of work by steps, and by seconds beside."""
    figure, axes = drawing.panels(-(-len(held) // 2), 4, (2.6, 2.1))
    for number, (title, contest) in enumerate(held.items()):
        names = [name for name in (OURS, "Adam", "Muon", "Nesterov") if name in contest["entrants"]]
        for panel, by in zip(axes[2 * number : 2 * number + 2], ("steps", "seconds"), strict=True):
            _draw(panel, title, contest, by, names)
            drawing.few_ticks(panel)
            panel.set_xlim(0, min(panel.get_xlim()[1], 2.5 * panel.lines[0].get_xdata()[-1]))
    for empty in axes[2 * len(held) :]:
        empty.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    drawing.save(figure, path)


def _draw(axes: Any, title: str, contest: Contest, by: str, names: Sequence[str]) -> None:
    """Draw the training losses of a contest, without those at the first step."""
    for number, name in enumerate(sorted(names, key=lambda name: name != OURS)):
        steps, _, loss = curves(contest, name, "train_loss")
        runs = contest["entrants"][name]["runs"]
        seconds = np.array([run["history"]["metrics"]["train_loss"]["seconds"] for run in runs])
        x = np.array(steps) if by == "steps" else contests.middle(seconds)[0]
        middle, low, high = (each[1:] for each in contests.middle(loss))
        drawing.band(axes, x[1:], middle, low, high, name, number)
    target = contest["target"]["train_loss"]
    axes.axhline(target, color="0.4", linewidth=0.8)
    drawing.logarithmic(axes, highest=8 * target)
    axes.set(title=title, xlabel=by, xlim=(0, None))
