"""What was asked of kept inverses, and what was measured."""

from typing import Any

import numpy as np

from experiments import drawing
from experiments.page import Claim, Holds, Page, judge, median, spread

ROWS = {
    "Adam": "none",
    "exact": "this batch's",
    "another batch": "another batch's, at the same weights",
    "kept": "a batch's, up to {age} steps old",
    "kept, scaled": "the same; one scale for each layer",
    "kept, rows weighed": "the same; each row's signal divided by 1 + its leverage",
    "kept + sketch": "the same, and {sketch} random sums of this batch's",
    "average before": "average of earlier batches",
    "average": "average of all batches, this one included",
    "average of sketches": "the same, of d random sums of each batch's",
    "own sketch": "2d random sums of this batch's",
}
"""The rows in each method's matrix."""


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The question's parts, judged by the results."""
    runs = {run["method"]: run for run in results["runs"]}
    shares = {name: _share(runs, run) for name, run in runs.items()}

    def claim(part: str, text: str, names: str, measured: Any, *checks: Any) -> Claim:
        """A claim that is open where a method was not run."""
        holds: Holds = "open"
        if all(name in runs for name in names.split("; ")):
            return Claim(part, text, measured(), judge(*(check() for check in checks)))
        return Claim(part, text, "not run", holds)

    def share(name: str) -> str:
        return f"{name} {median(shares[name]):.0%}"

    def of(name: str) -> float:
        return median(shares[name])

    every = settings.every
    claims = [
        claim(
            "the question",
            f"an inverse that is kept for {every} steps loses the gain over Adam",
            "kept",
            lambda: f"of Adam's distance to exact it keeps {spread(shares['kept'], '.0%')}",
            lambda: of("kept") < 0.5,
        ),
        claim(
            "the hypothesis",
            "what matters is that this batch is in the matrix",
            "another batch; average; average before",
            lambda: ", ".join(map(share, ("average", "average before", "another batch"))),
            lambda: of("average") > 0.9,
            lambda: of("average before") < of("average") - 0.1,
            lambda: of("another batch") < 0.9,
        ),
        claim(
            "the hypothesis",
            "and not how old the matrix is",
            "another batch; kept",
            lambda: f"{share('another batch')}, {share('kept')}",
            lambda: of("another batch") < of("kept") + 0.1,
        ),
        claim(
            "the hypothesis",
            "single rows of large leverage are thrown far",
            "kept; kept, rows weighed",
            lambda: (
                f"the largest leverage of a row is {_largest(runs['kept'], 1):.2f} in the "
                f"median, in the layer where it is largest; {share('kept, rows weighed')}"
            ),
            lambda: _largest(runs["kept"], 1) > 1,
            lambda: of("kept, rows weighed") > of("kept") + 0.2,
        ),
        claim(
            "the hypothesis",
            "the outputs move by more than the virtual error along some directions",
            "kept",
            lambda: (
                "the hat matrix's largest eigenvalue, in the layer where it is largest: exact "
                f"{_largest(runs['exact'], 0):.2f}, kept {_largest(runs['kept'], 0):.1f}"
            ),
            lambda: _largest(runs["exact"], 0) <= 1 < _largest(runs["kept"], 0),
        ),
        claim(
            "a remedy",
            "one scale for a layer's update, by ⟨U, G⟩ ≤ N‖Z̄‖²",
            "kept; kept, scaled",
            lambda: f"{share('kept')}, {share('kept, scaled')}",
            lambda: of("kept, scaled") > of("kept") + 0.2,
        ),
        claim(
            "a remedy",
            f"{settings.sketch} random sums of this batch's rows, added to the kept inverse",
            "kept; kept + sketch",
            lambda: f"{share('kept')}, {share('kept + sketch')}",
            lambda: of("kept + sketch") > of("kept") + 0.2,
            lambda: of("kept + sketch") > 0.9,
        ),
        claim(
            "a remedy",
            "a matrix of random sums instead of all rows",
            "average of sketches; own sketch",
            lambda: f"{share('average of sketches')}, {share('own sketch')}",
            lambda: of("average of sketches") > 0.7,
            lambda: of("own sketch") > 0.7,
        ),
    ]
    adam = median(runs["Adam"]["final"])
    behind = [
        f"With the matrix “{name}” C-Adam ends at a loss of {median(run['final']):.3f}, Adam at "
        f"{adam:.3f}."
        for name, run in runs.items()
        if median(run["final"]) > adam
    ]
    return Page(
        "Why a kept inverse loses",
        "none; a question that this library's `update_every` raised",
        "A transformer for characters, of Python's standard library "
        f"({results['characters']:,} characters), {settings.blocks} blocks of 64 features, is "
        f"trained for {settings.steps} steps of {settings.sequences} × 64 characters, "
        f"{settings.seeds} draws of weights and batches (medians, and ranges in brackets). All "
        f"methods share them, and Adam's rate {settings.rate:g} with warm-up and cosine decay. In "
        "front of Adam, C-Adam has U = N A G. The methods differ in the matrix A.",
        behind,
        claims,
        [
            f"λ is {settings.damping:g} of the mean eigenvalue. N is the number of characters.",
            "The loss is the mean over the last tenth of the steps; validation is on text that is "
            "not trained on. *Gain kept* is (Adam - loss) / (Adam - exact), of each seed.",
            "The cost is that of all solves, counted as in docs/speed.md, of exact ones.",
            "The hat matrix is XAXᵀ of this batch's X. Its largest eigenvalue, its largest entry "
            "on the diagonal (a row's leverage) and ‖XU‖ / ‖N Z̄‖ are at most one if A is exact. "
            "They are of a step just before a kept inverse is renewed, medians of these steps, of "
            "the layer where they are largest.",
            "Of the character table's one-hot rows all methods have the exact inverse. The norms "
            "and the positions are Adam's alone.",
        ],
        {"Methods": [_row(settings, runs, run, shares[name]) for name, run in runs.items()]},
        {"losses.png": "The training loss, in the median of the seeds; the last losses."},
    )


def _share(runs: dict[str, Any], run: dict[str, Any]) -> list[float]:
    """Of Adam's distance to exact, what a run keeps, for each seed."""
    adam, exact = np.array(runs["Adam"]["final"]), np.array(runs["exact"]["final"])
    with np.errstate(all="ignore"):
        return ((adam - run["final"]) / (adam - exact)).tolist()


def _largest(run: dict[str, Any], number: int) -> float:
    """A measured number of the layer where it is largest."""
    return max((values[number] for values in run["measured"].values()), default=float("nan"))


def _row(settings: Any, runs: Any, run: dict[str, Any], share: list[float]) -> dict[str, str]:
    name, adam = run["method"], run["method"] == "Adam"
    measured = {"largest eigenvalue": 0, "largest leverage": 1, "outputs' move": 2}
    return {
        "method": name,
        "rows in the matrix": ROWS[name].format(age=settings.every - 1, sketch=settings.sketch),
        "loss": spread(run["final"], ".3f"),
        "validation": spread(run["validation"], ".3f"),
        "gain kept": spread(share, ".0%"),
        "cost": "0" if adam else f"{run['cost'] / runs['exact']['cost']:.2f}",
        **{
            heading: "" if adam else f"{_largest(run, number):.2f}"
            for heading, number in measured.items()
        },
        "ms a step": f"{1e3 * run['seconds']:.0f}",
    }


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw losses.png: the losses of some methods, and the last ones of all."""
    figure, axes = drawing.panels(1, 2, (5.4, 4.2))
    runs = {run["method"]: run for run in results["runs"]}
    shown = [n for n in ("Adam", "exact", "kept", "kept + sketch", "average") if n in runs]
    width = max(1, settings.steps // 20)
    for number, name in enumerate(shown):
        losses = np.median(runs[name]["losses"], axis=0)
        means = losses[: len(losses) // width * width].reshape(-1, width).mean(1)
        axes[0].plot(
            width * np.arange(1, len(means) + 1), means, label=name, **drawing.style(number)
        )
    drawing.logarithmic(axes[0])
    axes[0].set(xlabel="step", ylabel=f"training loss, mean of {width} steps")
    axes[0].legend()
    for at, run in enumerate(reversed(results["runs"])):
        axes[1].plot(run["final"], [at] * len(run["final"]), **drawing.style(0, linestyle="none"))
    axes[1].set_yticks(range(len(runs)), [*reversed(runs)])
    axes[1].set(xlabel="training loss at the end, each seed")
    drawing.save(figure, settings.output / "losses.png")
