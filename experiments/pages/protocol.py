"""What was done, in the words that the pages of all contests share."""

from collections.abc import Mapping
from typing import Any

from experiments.history import History

Contest = Mapping[str, Any]
"""The results of a contest, as `experiments.contest.hold` returns them."""


def words(settings: Any, results: Mapping[str, Any]) -> str:
    """What was done: steps, data, tuning, seeds, the target, and what went another way."""
    held = results["contests"]
    effort = next(iter(held.values()))["effort"]
    entrants = [entrant for contest in held.values() for entrant in contest["entrants"].items()]
    baselines = dict.fromkeys(name for name, entrant in entrants if entrant["role"] == "baseline")
    best = f"the best of the baselines ({', '.join(baselines)})"
    epochs, seeds = (
        f"{number:g} {word}{'s' * (number != 1)}"
        for number, word in ((settings.epochs, "epoch"), (effort["seeds"], "run"))
    )
    return (
        f"Batches of {settings.batch_size}, {effort['steps']:,} steps ({epochs}). "
        f"{_recompressed(results['dataset']['name'])}{_tuning(settings, effort)} then had {seeds}. "
        "At each seed all optimizers share first weights and batches "
        "(medians, and ranges in brackets). The target is the training loss that "
        f"{best if len(baselines) > 1 else next(iter(baselines))} has in the end, in the median."
        f"{_again(held)}{_lost(held)}{_converted(held)}{_unfinished(results)}"
    )


def _tuning(settings: Any, effort: Mapping[str, Any]) -> str:
    """How the rates were chosen, up to the words for the rate that was."""
    further = effort.get("extensions", 0)  # pages from before it have none
    more = f", and up to {further} more beyond it while the best was at its edge" if further else ""
    if settings.tries == 1:
        return "Nothing was tuned: the first rate of each optimizer's grid"
    return (
        f"Each optimizer had {settings.tries} tuning runs of {effort['tuning_steps']:,} steps, one "
        f"at each rate of its grid{more}; the rate with the lowest validation loss"
    )


def _again(held: Mapping[str, Contest]) -> str:
    """Which runs diverged, and were made again."""
    everyone = (contest["entrants"] | contest.get("variants", {}) for contest in held.values())
    entrants = [entrant for each in everyone for entrant in each.items()]
    rates = [(name, its["rate"], diverged(its)) for name, its in entrants if diverged(its)]
    if not rates:
        return ""
    each = "; ".join(
        f"{name}'s at {' and '.join(f'{rate:g}' for rate in lost)}, then at {rate:g}"
        for name, rate, lost in rates
    )
    return (
        " Where a run ended with more training loss than it began with, or with none that is a "
        f"number, the optimizer's runs were made again at the best of its lower rates: {each}. "
        "This rule was made after C-SGD's run of 4,000 steps on CIFAR-10 had diverged."
    )


def _lost(held: Mapping[str, Contest]) -> str:
    """Which runs on the page took no more steps after a part of them."""
    runs = {
        f"{name} at {made['rate']:g} after {history.taken:,}": None
        for contest in held.values()
        for name, entrant in (contest["entrants"] | contest.get("variants", {})).items()
        for made in (entrant, *entrant.get("diverged", ()))
        for history in (History.of(run["history"]) for run in made.get("runs", ()))
        if history.taken < history.steps
    }
    if not runs:
        return ""
    return (
        " A run takes no more steps once its loss is no number, or a million times what it was at "
        f"first: {', '.join(runs)}."
    )


def diverged(entrant: Mapping[str, Any]) -> list[float]:
    """The rates at which an entrant's runs diverged, before it took a lower one."""
    return [made["rate"] for made in entrant.get("diverged", ())]


def _converted(held: Mapping[str, Contest]) -> str:
    """Which runs were made on a machine of another speed."""
    ratios = {
        run.rpartition(", ")[0]: f"{ratio:.2f}"
        for contest in held.values()
        for run, ratio in contest.get("converted", {}).items()  # pages from before it have none
        if not run.endswith(", tuning")
    }
    if not ratios:
        return ""
    return (
        " Some runs were made on a machine of another speed. Their seconds are multiplied by what "
        "a step takes here, over what it took there: "
        f"{', '.join(f'{run} by {ratio}' for run, ratio in ratios.items())}."
    )


def _unfinished(results: Mapping[str, Any]) -> str:
    """What the page lacks, if it was made before all runs were finished."""
    missing = [f"the contest {title}" for title in results.get("unfinished", ())]
    for title, contest in results["contests"].items():
        if names := contest.get("unfinished"):
            missing.append(f"of {title}, {', '.join(names)}")
    return f" **Not finished when this page was made**: {'; '.join(missing)}." if missing else ""


def _recompressed(data: str) -> str:
    """A warning, if the files have the structure of the official ones, but other contents."""
    if "not the official" not in data:
        return ""
    return (
        "**The files are not the official ones**, but a copy with their structure, such as one of "
        "images recompressed as JPEG: losses and accuracies on them differ a little. "
    )
