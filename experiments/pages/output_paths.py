"""What Paeedeh and Ghiasi-Shirazi say of Fig. 4 and Eq. 54, and what was measured."""

from typing import Any

import numpy as np

from experiments import drawing
from experiments.page import Claim, Page, judge, median, spread
from experiments.pages import sources

DRAWN = (("C-SGD", 0.7), ("SGD", 0.03), ("SGD", 0.01), ("NLMS", 0.7))


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    size, *others = settings.batch_sizes
    runs = {(r["method"], r["rate"]): r for r in results["runs"] if r["batch_size"] == size}
    ours = {rate: run for (method, rate), run in runs.items() if method == "C-SGD"}
    sgd = {rate: run for (method, rate), run in runs.items() if method == "SGD"}
    longest = _longest(results, size)
    diverged = [_diverged(runs["NLMS", rate]) for rate in (0.7, 0.1)]
    unstable = sum(0.7 * value > 2 for value in results["nlms_largest_eigenvalues"])
    claims = [
        Claim(
            "section 5.2, Fig. 4",
            "C-SGD steers the outputs directly towards the targets, whatever the rate",
            f"the longest path of all, at the rates {', '.join(map(str, ours))}, is {longest:.3f} "
            "times the straight line"
            + "".join(f"; {_longest(results, n):.2f} in mini-batches of {n}" for n in others),
            judge(longest < 1.01, *(_longest(results, batch) < 1.01 for batch in others)),
        ),
        Claim(
            "section 5.2, Fig. 4",
            "SGD takes an indirect path",
            "; ".join(
                f"at {rate} {spread(run['median_length'], '.2f')} times"
                for rate, run in sgd.items()
            )
            + " the straight line",
            judge(*(median(run["median_length"]) > 1.1 for run in sgd.values())),
        ),
        Claim(
            "section 5.2",
            "SGD oscillates more at the higher rate, and the lower one does not end it",
            "of the steps, these lead away from the target: "
            + ", ".join(f"{spread(run['astray'], '.0%')} at {rate}" for rate, run in sgd.items())
            + f"; by C-SGD {spread(ours[0.7]['astray'], '.0%')}",
            judge(
                median(sgd[0.01]["astray"]) > 0,
                median(sgd[0.03]["astray"]) > median(sgd[0.01]["astray"]),
            ),
        ),
        Claim(
            "section 4.2, Eq. 54",
            "NLMS extended to mini-batches row by row is unstable",
            f"at 0.7, C-SGD's rate, it diverges for {diverged[0]} of {settings.seeds} seeds, as "
            f"the largest eigenvalue of Eq. 54's matrix has it for {unstable}; at 0.1 for "
            f"{diverged[1]}; C-SGD for {sum(_diverged(run) for run in ours.values())}",
            judge(diverged[0] > settings.seeds / 2, diverged[0] > 0),
        ),
        Claim(
            "section 4.3",
            "the rate 1 is perfect for a linear layer, but for damping",
            f"at 1.0 the loss is at 1 % of the first after {spread(ours[1.0]['steps'])} steps",
            judge(all(step == 1 for step in ours[1.0]["steps"])),
        ),
    ]
    reached = {key: median(run["steps"]) for key, run in runs.items()}
    behind = [
        f"{method} at {rate} is at 1 % of the first loss after {reached[method, rate]:.0f} steps "
        f"in the median, C-SGD at {our_rate} after {reached['C-SGD', our_rate]:.0f}."
        for (method, rate) in runs
        for our_rate in ours
        if method != "C-SGD" and reached[method, rate] < reached["C-SGD", our_rate]
    ]
    behind += [
        f"In mini-batches of {batch} C-SGD's paths are not straight: up to "
        f"{_longest(results, batch):.1f} times the straight line."
        for batch in settings.batch_sizes
        if _longest(results, batch) >= 1.01
    ]
    tables = {
        f"Mini-batches of {batch}": [_row(r) for r in results["runs"] if r["batch_size"] == batch]
        for batch in settings.batch_sizes
    }
    return Page(
        "The outputs' way to their targets",
        f"{sources.CONSEQUENTIALISM}, sections 4.2 and 5.2, Fig. 4",
        f"A linear layer of 20 inputs and 2 outputs learns 10 samples, for {settings.seeds} draws "
        "of samples and weights (medians, and ranges in brackets; the figure has the first). Rates "
        "of C-SGD (0.7) and SGD (0.03, 0.01) are the source's.",
        behind,
        claims,
        [
            "The loss is half the squared error *summed* over the batch, as in the source's "
            "Eq. 15: with a mean, SGD at 0.03 could not oscillate.",
            "The mini-batch is all 10 samples; in smaller ones the parts take turns. Inputs *and* "
            "targets are standard normal. λ and NLMS's ε are 1e-3.",
            "NLMS has no rate in the source: C-SGD's 0.7, and 0.1.",
            "A path's length counts all steps taken; *astray* is the share of steps, of those "
            "further than 1 % of the first distance, that lead a sample away from its target.",
        ],
        tables,
        {"paths.png": "The outputs' 60 first steps, for two of the ten samples."},
    )


def _longest(results: dict[str, Any], batch_size: int) -> float:
    """The length of C-SGD's longest path, in units of the straight line."""
    runs = (run for run in results["runs"] if run["batch_size"] == batch_size)
    return max(max(run["longest"]) for run in runs if run["method"] == "C-SGD")


def _row(run: dict[str, Any]) -> dict[str, str]:
    return {
        "method": run["method"],
        "rate": f"{run['rate']:g}",
        "steps to 1 % of the loss": spread(run["steps"]),
        "median path / straight line": spread(run["median_length"], ".2f"),
        "astray": spread(run["astray"], ".0%"),
        "diverged": str(_diverged(run)),
        "seconds, all rates": f"{run['seconds']:.3f}",
        "compilation": f"{run['compile_seconds']:.2f}",
    }


def _diverged(run: dict[str, Any]) -> int:
    """The number of seeds for which the loss ended above its first value."""
    return sum(not median([value]) <= 1 for value in run["final"])


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw paths.png: some paths, in a panel for each method."""
    figure, axes = drawing.panels(1, len(DRAWN), (3.6, 4.2))
    runs = {(r["method"], r["rate"], r["batch_size"]): r for r in results["runs"]}
    for axis, (method, rate) in zip(axes, DRAWN, strict=True):
        axis.sharex(axes[0])
        axis.sharey(axes[0])
        paths = np.moveaxis(runs[method, rate, settings.batch_sizes[0]]["paths"], 1, 0)
        for sample, path in enumerate(paths):
            style = drawing.style(sample, marker=".", linewidth=1)
            axis.plot(*path.T, label=f"sample {sample + 1}", **style)
        axis.plot(*paths[:, 0].T, "ko", markersize=9, label="start")
        targets = np.array(results["first_targets"])[: len(paths)]
        axis.plot(*targets.T, "kx", markersize=11, markeredgewidth=3, label="target")
        axis.set(title=f"{method}, rate {rate:g}", xlabel="first output $z_1$")
    axes[0].set_ylabel("second output $z_2$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    drawing.save(figure, settings.output / "paths.png")
