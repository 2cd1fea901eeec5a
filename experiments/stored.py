"""The training runs of a results.json, to go on from where the checkpoints were not kept."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import report
from experiments.checkpoints import ResumeError
from experiments.history import Curve, History
from experiments.page import median

PERIPHERAL = {
    "data_dir",
    "download",
    "output",
    "resume",
    "only_finished",
    "checkpoint_seconds",
    "tensorboard",
}
"""Options that no number depends on."""
ENVIRONMENT = {"versions", "device", "cpu", "cpu_count"}
"""The parts of the environment that must stay the same when an experiment is resumed."""
VALIDATION = "validation_loss"
SIMILAR = 1.2
"""A step that takes at most so many times as long as before, and at least the inverse, is as fast:
runs of one machine differ as much."""


def identity(settings: Any, digest: Any, environment: Any) -> dict[str, Any]:
    """Settings, data and environment, as far as results depend on them.

    The data are compared by their checksum, not by their name.
    """
    settings = {k: v for k, v in settings.items() if k not in PERIPHERAL | {"dataset"}}
    settings.setdefault("extensions", 0)  # as it was before there was this option
    environment = {k: v for k, v in environment.items() if k in ENVIRONMENT}
    return report.plain({**settings, "data": digest, **environment})


def label(title: str, name: str, rate: float, seed: int | None) -> str:
    """The name of an entrant's training run; without a seed, of a tuning run.

    Args:
      title: Stands before the names of the contest's runs.
      name: The entrant's name.
      rate: Its learning rate.
      seed: The run's seed.
    """
    return f"{title}{name} {rate:g}, {'tuning' if seed is None else f'seed {seed}'}"


def runs(
    folder: Path,
    digest: str,
    settings: Mapping[str, Any],
    prefixes: Mapping[str, str],
    times: Mapping[str, Any],
) -> tuple[dict[str, History], dict[str, dict[str, float]]]:
    """The training runs of a folder's results.json by their labels, if its settings are these.

    Runs made where a step takes more or less time than here do not compare with those made here. So
    their seconds are multiplied by the ratio: they are those that their steps would take here.

    Args:
      folder: The folder of the results.
      digest: The checksum of the data.
      settings: The settings.
      prefixes: By title of a contest, what stands before the names of its runs.
      times: By title, what a step takes here, as `pipeline.measure` returns it.

    Returns:
      The runs. By title and label, what the measured seconds of a run were multiplied by in all,
      now and by earlier sessions. Other runs are not there.

    Raises:
      ResumeError: If the file cannot be read.
    """
    path = folder / "results.json"
    if not path.exists():
        return {}, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results, environment = content["results"], content["environment"]
        theirs = identity(content["settings"], results["dataset"].get("digest"), environment)
        if theirs != identity(settings, digest, report.environment()):
            return {}, {}
        found, converted = {}, {}
        for title, prefix in prefixes.items():
            contest = results["contests"].get(title) or {"entrants": {}, "variants": {}}
            contest |= results.get("begun", {}).get(title, {})
            ratios = _ratios(contest, times[title]["seconds_per_step"])
            before = contest.get("converted", {})  # pages from before it have none
            converted[title] = its = {}
            for name, run, history in _of_contest(prefix, contest):
                found[run] = _multiplied(history, ratios[name]) if ratios else history
                if ratios or run in before:
                    its[run] = before.get(run, 1.0) * (ratios[name] if ratios else 1.0)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ResumeError(f"{path} cannot be read: {error!r}. Remove it to go on") from error
    return found, converted


def _ratios(contest: Mapping[str, Any], here: Mapping[str, float]) -> dict[str, float]:
    """By entrant, how many times as long a step takes here as in its runs.

    Variants are not timed, and have the others' median. Empty if steps are as fast here.
    """
    ratios: dict[str, list[float]] = {}
    for name, _, history in _of_contest("", contest):
        ratios.setdefault(name, [])
        if name in here and history.train_seconds:
            ratios[name].append(here[name] * history.taken / history.train_seconds)
    medians = {name: median(each) for name, each in ratios.items() if each}
    usual = median([*medians.values()]) if medians else 1.0
    if 1 / SIMILAR <= usual <= SIMILAR:
        return {}
    return {name: medians.get(name, usual) for name in ratios}


def _multiplied(history: History, ratio: float) -> History:
    """The history with all seconds multiplied."""

    def multiplied(curve: Curve) -> Curve:
        return Curve(curve.step, [ratio * s for s in curve.seconds], curve.value)

    return History(
        ratio * history.compile_seconds,
        ratio * history.train_seconds,
        multiplied(history.batch_loss),
        {name: multiplied(curve) for name, curve in history.metrics.items()},
    )


def _of_contest(title: str, held: Mapping[str, Any]) -> Iterator[tuple[str, str, History]]:
    """The runs of what `contest.hold` returned: entrant, label, history.

    JSON has null for what is not a number.
    """
    for name, entrant in (held["entrants"] | held["variants"]).items():
        for at in entrant["tuning"]:
            steps, loss = held["effort"]["tuning_steps"], at[VALIDATION]
            curve = Curve([steps], [at["seconds"]], [math.nan if loss is None else loss])
            history = History(at["compile_seconds"], at["seconds"], curve, {VALIDATION: curve})
            yield name, label(title, name, at["rate"], None), history
        for made in (entrant, *entrant.get("diverged", ())):
            for run in made.get("runs", ()):
                history = History.of(run["history"])
                yield name, label(title, name, made["rate"], run["seed"]), history
    for run in held.get("begun", ()):  # pages from before it have none
        name = run["entrant"]
        yield name, label(title, name, run["rate"], run["seed"]), History.of(run["history"])
