"""What the NeuronLearning notes say of their methods, and what was measured."""

from typing import Any

import numpy as np

from experiments import drawing
from experiments.conjugate_gradient import CONDITION, HIDDEN, SAMPLES, SIZE
from experiments.page import Claim, Page, count, judge, median, spread
from experiments.pages import sources

LABELS = {
    "fletcher_reeves": "Fletcher-Reeves",
    "polak_ribiere": "Polak-Ribière",
    "hestenes_stiefel": "Hestenes-Stiefel",
    "dai_yuan": "Dai-Yuan",
}
OURS = "hestenes_stiefel"  # the default


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    counts = {
        problem: {m: median(found["evaluations"]) for m, found in result["methods"].items()}
        for problem, result in results.items()
    }
    valley = results["quadratic valley"]["methods"]
    exact = {m: valley[m]["first_setting"] for m in (*LABELS, "steepest descent")}
    steps = {m: median(found["steps"], 1) for m, found in exact.items()}  # in the worst case
    curves = np.array([exact[m]["curve"][1][:SIZE] for m in LABELS])
    apart = np.max(np.abs(curves / curves[:1] - 1))
    crooked = {p: c for p, c in counts.items() if p != "quadratic valley"}
    better = [c[m] < c["fletcher_reeves"] for c in crooked.values() for m in list(LABELS)[1:]]
    rule = {p: _share(r["methods"]["Dai-Yuan, fixed rate"]) for p, r in results.items()}
    best = {p: min(c[m] for m in LABELS) for p, c in counts.items()}
    proposed = {p: _share(r["methods"]["Adam"]["first_setting"]) for p, r in results.items()}
    claims = [
        Claim(
            "section 3.2, Eqs. 27 to 34",
            "on a quadratic, conjugate gradients need no more steps than there are variables",
            f"at most, with nearly exact searches and {SIZE} variables: "
            + ", ".join(f"{LABELS[m]} {count(steps[m])}" for m in LABELS),
            judge(*(steps[m] <= SIZE for m in LABELS)),
        ),
        Claim(
            "section 3.2, Eq. 36",
            "there, the four β are the same",
            "their values in the steps before the last, of which seven digits are stored, differ "
            f"by at most {apart:.1g} of Fletcher and Reeves'",
            judge(apart < 0.01),
        ),
        Claim(
            "section 3.2",
            "steepest descent zigzags along a valley, and conjugate gradients cure that",
            f"there, steepest descent takes up to {count(steps['steepest descent'])} steps; tuned "
            f"{count(counts['quadratic valley']['steepest descent'])} evaluations in the median, "
            f"{LABELS[OURS]} {count(counts['quadratic valley'][OURS])}",
            judge(
                steps["steepest descent"] > 2 * steps[OURS],
                counts["quadratic valley"]["steepest descent"] > counts["quadratic valley"][OURS],
            ),
        ),
        Claim(
            "section 3.2",
            "the other three β work better than Fletcher and Reeves' on what is not quadratic",
            "; ".join(f"{p}: " + _list(c, LABELS) for p, c in crooked.items()),
            judge(*better),
        ),
        Claim(
            "section 3.2",
            "Dai and Yuan's β with a fixed rate is a method, too",
            "starts from which it arrives: " + _shares(rule),
            judge(*(share == 1 for share in rule.values())),
        ),
        Claim(
            "section 3.3",
            "Adam is one of the best methods",
            "evaluations of Adam and of the best β: "
            + "; ".join(f"{p} {count(c['Adam'])}, {count(best[p])}" for p, c in counts.items()),
            judge(*(c["Adam"] <= best[p] for p, c in counts.items())),
        ),
        Claim(
            "section 3.3, Eq. 43",
            "the rate 0.001 is proposed for Adam",
            f"within {settings.budget:,} evaluations it arrives from: {_shares(proposed)}",
            judge(*(share == 1 for share in proposed.values())),
        ),
    ]
    behind = [
        f"{p.capitalize()}: {LABELS.get(m, m)} takes {count(c[m])} evaluations in the median, "
        f"{LABELS[OURS]}, our default, {count(c[OURS])}."
        for p, c in counts.items()
        for m in c
        if c[m] < c[OURS]
    ]
    return Page(
        "Conjugate gradients, steepest descent, Adam",
        f"{sources.NOTES}, sections 3.1 to 3.3",
        f"Three functions: a quadratic of {SIZE} variables and condition {CONDITION:g}, turned at "
        f"random; Rosenbrock's function of two; and the squared error of a network 2-{HIDDEN}-1 "
        f"(tanh) on {SAMPLES} points of sin(3x₁)x₂. The four β and steepest descent have Optax's "
        "zoom line search. Each method got six tuning runs: of the search's tolerance, or of the "
        f"rate. What had the fewest evaluations in the median of {settings.starts} starts was "
        f"measured on {settings.starts} others: medians, and ranges in brackets.",
        behind,
        claims,
        [
            "The source names no function, no line search and no number but Adam's.",
            "Evaluations are those of the function with its gradient, in line searches too. ∞ is "
            f"not within {settings.budget:,}, nor {settings.searches:,} line searches.",
            "Milliseconds are the whole run's, in proportion to the evaluations until the target.",
        ],
        {
            f"{p.capitalize()}: until {r['target']:g} of the first value": _rows(r)
            for p, r in results.items()
        },
        {"progress.png": "From the first of the measured starts, each method as tuned."},
    )


def _rows(result: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "method": LABELS.get(method) or method,
            "tolerance or rate": f"{found['setting']:g}",
            "steps": spread(found["steps"]),
            "evaluations": spread(found["evaluations"]),
            "milliseconds": spread([s and 1000 * s for s in found["seconds"]], ".2f"),
            "compilation, s": f"{found['compile_seconds']:.1f}",
            "arrives": f"{_share(found):.0%}",
        }
        for method, found in result["methods"].items()
    ]


def _share(found: dict[str, Any]) -> float:
    return float(np.mean([count is not None for count in found["evaluations"]]))


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{problem} {share:.0%}" for problem, share in shares.items())


def _list(counts: dict[str, float], methods: Any) -> str:
    return ", ".join(f"{LABELS[m]} {count(counts[m])}" for m in methods)


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw progress.png: values against evaluations, in a panel for each problem."""
    figure, axes = drawing.panels(-(-len(results) // 2), 2, (5.5, 4))
    for axis, (problem, result) in zip(axes, results.items(), strict=False):
        for number, (method, found) in enumerate(result["methods"].items()):
            style = drawing.style(number, markevery=(number, 9), markersize=5)
            axis.plot(*found["curve"], label=LABELS.get(method, method), **style)
        axis.axhline(result["target"], color="0.4", linewidth=0.8)
        axis.text(1, result["target"], "target", va="bottom", fontsize="small", color="0.3")
        axis.set(xscale="log", yscale="log", xlim=(1, settings.budget), title=problem)
        axis.set(ylim=(result["target"] / 30, 10), xlabel="evaluations of value and gradient")
        axis.set_ylabel("value / first value")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawing.save(figure, settings.output / "progress.png")
