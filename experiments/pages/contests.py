"""What the pages of all contests share: tables, where our method loses, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import drawing
from experiments.page import count, median, spread
from experiments.pages.protocol import Contest, diverged

CAPTION = "Medians over the seeds, and their ranges. The grey line is the target."
VALIDATION = {"validation_loss": "validation loss"}
MEASURES = {"train_loss": "training loss", "test_accuracy": "test accuracy"}
NEEDED = {
    "step": ("steps", ",.0f"),
    "seconds_with_compilation": ("seconds, compilation counted", ",.1f"),
}
FORMS = {"train_loss": ".4f", "validation_loss": ".4f"} | dict.fromkeys(
    ("train_accuracy", "test_accuracy"), ".2%"
)


def last(contest: Contest, name: str, metric: str) -> list[float]:
    """The final value of an entrant's metric, at each seed."""
    return [run[metric] for run in contest["entrants"][name]["runs"]]


def to_target(contest: Contest, name: str, key: str) -> list[float | None]:
    """What an entrant had needed when it reached the target, at each seed. None means never."""
    runs = contest["entrants"][name]["runs"]
    return [run["to_target"] and run["to_target"][key] for run in runs]


def accuracies_then(contest: Contest, name: str) -> list[float]:
    """The test accuracies when the target was reached, at the seeds where it was reached."""
    return [at for at in to_target(contest, name, "test_accuracy") if at is not None]


def curves(contest: Contest, name: str, metric: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The steps of an entrant's evaluations, its seconds with compilation, and its metric.

    Seconds and metric are arrays `(seeds, evaluations)`. The metric may be "batch_loss": each value
    is then the mean over the batches since the point before.
    """
    runs = [run["history"] for run in contest["entrants"][name]["runs"]]
    curves = [(run["metrics"] | {"batch_loss": run["batch_loss"]})[metric] for run in runs]
    seconds = [
        np.array(curve["seconds"]) + run["compile_seconds"]
        for run, curve in zip(runs, curves, strict=True)
    ]
    values = np.array([curve["value"] for curve in curves], float)
    return curves[0]["step"], np.array(seconds), values


def behind(
    contests: Mapping[str, Contest], metrics: Mapping[str, str] = MEASURES | VALIDATION
) -> list[str]:
    """Where others do better than one of ours, in the median: a sentence for each of ours."""
    return [
        f"{f'{title}, ' * (len(contests) > 1)}{name}: {'; '.join(lost)}."
        for title, contest in contests.items()
        for name, entrant in contest["entrants"].items()
        if entrant["role"] == "ours"
        for lost in [ahead(contest, name, metrics, NEEDED)]
        if lost
    ]


def ahead(
    contest: Contest,
    ours: str,
    metrics: Mapping[str, str],
    needed: Mapping[str, tuple[str, str]],
    form: str | None = None,
) -> list[str]:
    """In what an entrant is behind others that are not ours, with the medians. ∞ means never.

    Args:
      contest: The results.
      ours: The entrant's name.
      metrics: The metrics at the end that are compared, with their names in words.
      needed: What it takes to reach the target that is compared, with its words and its form.
      form: The form of the metrics. By default each has its own.

    Returns:
      Words for each metric.
    """
    entrants, lost = contest["entrants"], []
    others = [name for name in entrants if entrants[name]["role"] not in ("ours", "untuned")]

    def compare(values: Mapping[str, Sequence[Any]], words: str, form: str, sign: int) -> None:
        medians = {name: median(each) for name, each in values.items()}
        better = sorted(
            (sign * medians[name], name)
            for name in others
            if sign * medians[name] < sign * medians[ours]
        )
        if better:
            best = ", ".join(f"{name} {count(sign * value, form)}" for value, name in better)
            lost.append(f"{words} {count(medians[ours], form)} (better: {best})")

    for metric, words in metrics.items():
        sign = -1 if metric.endswith("accuracy") else 1
        values = {name: last(contest, name, metric) for name in entrants}
        compare(values, words, form or FORMS[metric], sign)
    for key, (words, its) in needed.items():
        values = {name: to_target(contest, name, key) for name in entrants}
        unit, _, counted = words.partition(",")
        compare(values, f"{unit} to the target{counted and ','}{counted}", its, 1)
    return lost


def tables(title: str, contest: Contest) -> dict[str, list[dict[str, str]]]:
    """How the entrants were tuned, how they ended, and when they reached the target."""
    entrants, target = contest["entrants"], contest["target"]
    ends = [
        {
            "optimizer": name,
            "rate": f"{entrant['rate']:g}",
            **{words: spread(last(contest, name, m), FORMS[m]) for m, words in MEASURES.items()},
            "validation loss": spread(last(contest, name, "validation_loss"), ".4f"),
            "seconds": spread(last(contest, name, "seconds"), ",.1f"),
            "with compilation": spread(last(contest, name, "seconds_with_compilation"), ",.1f"),
        }
        for name, entrant in entrants.items()
    ]
    reached = [
        {
            "optimizer": name,
            "reached": f"{sum(run['to_target'] is not None for run in entrant['runs'])} of "
            f"{len(entrant['runs'])}",
            "steps": spread(to_target(contest, name, "step")),
            "seconds": spread(to_target(contest, name, "seconds"), ",.1f"),
            "with compilation": spread(
                to_target(contest, name, "seconds_with_compilation"), ",.1f"
            ),
            "test accuracy then": spread(accuracies_then(contest, name), ".2%")
            if accuracies_then(contest, name)
            else "–",
        }
        for name, entrant in entrants.items()
    ]
    steps, tuned = contest["effort"]["steps"], contest["effort"]["tuning_steps"]
    loss = count(target["train_loss"], ".4f")
    tried = f"{title}: validation loss after {tuned:,} steps, by learning rate"
    return {
        f"{title}: after {steps:,} steps": ends,
        f"{title}: to the target, {loss}, {target['entrant']}'s training loss in the end": reached,
        **(
            {tried: tuning(entrants)}
            if any(len(e["tuning"]) > 1 for e in entrants.values())
            else {}
        ),
    }


def tuning(entrants: Mapping[str, Any]) -> list[dict[str, str]]:
    """The validation losses of the tuning runs. Some have more of them than others."""
    most = max(len(entrant["tuning"]) for entrant in entrants.values())
    rows = []
    for name, entrant in entrants.items():
        tried = [
            f"{at['rate']:g}: {count(median([at['validation_loss']]), '.4f')}"
            for at in entrant["tuning"]
        ]
        tried += ["–"] * (most - len(tried))
        row = {"optimizer": name} | {f"rate {n}": one for n, one in enumerate(tried, start=1)}
        row["chosen"] = "".join(f"{rate:g}, which diverged; then " for rate in diverged(entrant))
        row["chosen"] += f"{entrant['rate']:g}" + " (at the grid's edge)" * edge(entrant)
        rows.append(row)
    return rows


def times(contests: Mapping[str, Contest]) -> list[dict[str, str]]:
    """What a step costs in milliseconds, and how much of that is fetching its batch."""
    rows, names = [], {name: "–" for c in contests.values() for name in c["seconds_per_step"]}
    for title, contest in contests.items():
        pipeline = contest["pipeline"]
        row = {
            "": title,
            **names,
            **{name: f"{1e3 * s:.2f}" for name, s in contest["seconds_per_step"].items()},
            f"{pipeline['entrant']} on a batch at hand": f"{1e3 * pipeline['seconds_without']:.2f}",
            "share of fetching it": f"{pipeline['share']:.1%}",
        }
        rows.append(row)
    return rows


def measuring(results: Mapping[str, Any]) -> list[str]:
    """What all contests chose where their sources leave it open."""
    images = next(iter(results["contests"].values()))["images"]
    return [
        "The last tenth of the training images is for validation only; the training loss is that "
        f"of the first {images['training_loss']:,} of the others. The source took all.",
        "A step or second counts when the next evaluation, 15 in a run, finds the target reached. "
        "Seconds are of training, and of compilation where it says so; evaluation is off the "
        "clock.",
    ]


def all_tables(contests: Mapping[str, Contest]) -> dict[str, list[dict[str, str]]]:
    """The tables of each contest, and what a step costs in each."""
    each = {k: v for title, contest in contests.items() for k, v in tables(title, contest).items()}
    cores = next(iter(contests.values())).get("cores")  # pages from before it have none
    on = f" on {cores} core{'s' * (cores > 1)}" if cores else ""
    return {**each, f"Time per step{on}, in milliseconds": times(contests)}


def edge(entrant: Mapping[str, Any]) -> bool:
    """Whether the chosen rate is the least or the greatest of the rates that were tried."""
    rates = [at["rate"] for at in entrant["tuning"]]
    return len(rates) > 1 and entrant["rate"] in (min(rates), max(rates))


def draw_all(path: Path, contests: Mapping[str, Contest]) -> None:
    """Draw a row of panels for each contest into one file."""
    figure, axes = drawing.panels(len(contests), 3, (4.2, 3.6))
    for row, (title, contest) in zip(axes.reshape(-1, 3), contests.items(), strict=True):
        draw(row, contest, title)
    drawing.save(figure, path)


def draw(rows: Sequence[Any], contest: Contest, title: str) -> None:
    """Draw training loss by steps and by seconds, and test accuracy, into three panels."""
    by_steps, by_seconds, accuracy = rows
    entrants = contest["entrants"]
    for number, name in enumerate(sorted(entrants, key=lambda n: entrants[n]["role"] != "ours")):
        steps, seconds, loss = curves(contest, name, "train_loss")
        _, _, right = curves(contest, name, "test_accuracy")
        label = f"{name}, rate {entrants[name]['rate']:g}"
        its_seconds = middle(seconds)[0]
        drawing.band(by_steps, steps, *middle(loss), label, number)
        drawing.band(by_seconds, its_seconds, *middle(loss), label, number)
        drawing.band(accuracy, steps, *middle(100 * right), label, number)
    for axes in (by_steps, by_seconds):
        axes.axhline(contest["target"]["train_loss"], color="0.4", linewidth=0.8)
        drawing.logarithmic(axes)
        axes.set_ylabel("training loss (cross-entropy, log scale)")
    by_steps.set(title=title, xlabel="steps", xlim=(0, None))
    by_seconds.set(xlabel="seconds of training, compilation counted", xlim=(0, None))
    accuracy.set(xlabel="steps", ylabel="test accuracy, %", xlim=(0, None))
    accuracy.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        fontsize="small",
        title="grey line: the target",
        title_fontsize="small",
    )


def middle(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median, least and greatest over the seeds. What is not a number counts as infinite."""
    numbers = np.nan_to_num(values, nan=np.inf)
    middle, low, high = np.quantile(numbers, (0.5, 0, 1), axis=0, method="nearest")
    return middle, low, high
