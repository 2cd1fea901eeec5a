"""The figures of `resnet20`: curves as in Figures 6 and 7 of seed 000, and what settings do."""

from pathlib import Path
from typing import Any, Literal

from matplotlib.ticker import LogLocator, NullFormatter

from experiments import drawing
from experiments.page import median
from experiments.pages import contests
from experiments.pages.contests import Contest

NUMBERS = {"C-SGD": 0, "C-Nesterov": 3, "C-Adam": 5, "SGD": 1, "Nesterov": 2, "Adam": 4}
HIGHEST = 5  # of losses in the figure of variants
BY = {"steps": "steps", "seconds": "seconds of training, compilation counted"}


def curves(path: Path, contest: Contest, by: Literal["steps", "seconds"]) -> None:
    """Loss and accuracy, beside the C- forms: left the plain ones without BN, right with it."""
    figure, axes = drawing.panels(2, 2, (5.2, 3.4))
    for column, (title, suffix) in enumerate({"without BN": "", "with BN": "-BN"}.items()):
        loss, accuracy = axes[column], axes[2 + column]
        for name in NUMBERS:
            name += "" if name.startswith("C-") else suffix
            if name in contest["entrants"]:
                number = NUMBERS[name.removesuffix("-BN")]
                _line(loss, contest, name, number, "batch_loss", by, 1)
                _line(accuracy, contest, name, number, "train_accuracy", by, 100)
        drawing.logarithmic(loss)
        loss.set(title=f"C- forms, and plain ones {title}", xlim=(0, None))
        loss.set_ylabel("loss of the batches (log scale)")
        loss.legend(fontsize="small")
        accuracy.set(xlabel=BY[by], ylabel="training accuracy, %", xlim=(0, None))
    for row in (axes[:2], axes[2:]):
        limits = [limit for each in row for limit in each.get_ylim()]
        for each in row:
            each.set_ylim(min(limits), max(limits))
    drawing.save(figure, path)


def _line(
    axes: Any, contest: Contest, name: str, number: int, metric: str, by: str, unit: float
) -> None:
    steps, seconds, values = contests.curves(contest, name, metric)
    x = steps if by == "steps" else contests.middle(seconds)[0]
    label = f"{name}, rate {contest['entrants'][name]['rate']:g}"
    drawing.band(axes, x, *contests.middle(unit * values), label, number)


def with_best(contest: Contest) -> Contest:
    """The contest, with the variant that has runs as the last of the entrants, if there is one."""
    best = {name: variant for name, variant in contest["variants"].items() if "runs" in variant}
    return {**contest, "entrants": contest["entrants"] | best} if best else contest


def variants(path: Path, contest: Contest) -> None:
    """The validation loss after the tuning steps, by learning rate; the best's whole runs."""
    entrants, everyone = contest["entrants"], with_best(contest)
    figure, (axes, whole) = drawing.panels(1, 2, (6, 4))
    known = {"as in the source": entrants["C-SGD"], **contest["variants"]}
    source = {"color": "black", "marker": "*", "markersize": 11, "linewidth": 2.2}
    for number, (name, entrant) in enumerate(known.items()):
        tried = sorted((at["rate"], median([at["validation_loss"]])) for at in entrant["tuning"])
        label = name.removeprefix("C-SGD, ")
        look = drawing.style(number - 1, markersize=6) if number else source
        axes.plot(*zip(*tried, strict=True), label=label, **look)
    best = min(median([at["validation_loss"]]) for at in entrants["SGD-BN"]["tuning"])
    axes.axhline(best, color="0.4", linewidth=0.8)
    drawing.logarithmic(axes, HIGHEST)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (log scale)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", title="C-SGD")
    for number, name in enumerate((list(everyone["entrants"])[-1], "C-SGD", "SGD-BN")):
        _line(whole, everyone, name, number, "train_loss", "steps", 1)
    drawing.logarithmic(whole, HIGHEST)
    whole.set(xlabel="steps", ylabel="training loss (log scale)", xlim=(0, None))
    whole.legend(fontsize="small")
    drawing.save(figure, path)
