"""The training runs of a results.json, to go on from where the checkpoints were not kept."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import report
from experiments.checkpoints import FOLDER, ResumeError
from experiments.page import median
from experiments.training import Curve, History

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
SIMILAR = 1.5
"""To go on, a step must take at most so many times as long as before, and at least the inverse."""


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
) -> dict[str, History]:
    """The training runs of a folder's results.json by their labels, if its settings are these.

    Args:
      folder: The folder of the results.
      digest: The checksum of the data.
      settings: The settings.
      prefixes: By title of a contest, what stands before the names of its runs.
      times: By title, what a step takes here, as `pipeline.measure` returns it.

    Raises:
      ResumeError: If the file cannot be read. If a step takes far more or less time here than where
        the runs were made: their seconds do not compare with those of runs on this machine.
    """
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results, environment = content["results"], content["environment"]
        theirs = identity(content["settings"], results["dataset"].get("digest"), environment)
        if theirs != identity(settings, digest, report.environment()):
            return {}
        contests = results["contests"]
        ratios = [_ratio(times[title], contest) for title, contest in contests.items()]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ResumeError(f"{path} cannot be read: {error!r}. Remove it to go on") from error
    for ratio in ratios:
        if not 1 / SIMILAR <= ratio <= SIMILAR:
            raise ResumeError(
                f"{path} is of a machine on which a step takes {ratio:.2g} times as long as it did "
                "here now: the seconds of its runs and of new ones would not compare. If the "
                f"machine was busy, remove {folder / FOLDER / 'times.json'} and try again. Or name "
                "another --output"
            )
    return {
        name: history
        for title, contest in contests.items()
        for name, history in _of_contest(prefixes[title], contest).items()
    }


def _ratio(here: Mapping[str, Any], there: Mapping[str, Any]) -> float:
    """How many times as long a step took there, in the median over the entrants."""
    ours, theirs = (each["seconds_per_step"] for each in (here, there))
    return median([theirs[name] / seconds for name, seconds in ours.items() if name in theirs])


def _of_contest(title: str, held: Mapping[str, Any]) -> dict[str, History]:
    """The runs of what `contest.hold` returned. JSON has null for what is not a number."""
    runs = {}
    for name, entrant in (held["entrants"] | held["variants"]).items():
        for at in entrant["tuning"]:
            steps, loss = held["effort"]["tuning_steps"], at[VALIDATION]
            curve = Curve([steps], [at["seconds"]], [math.nan if loss is None else loss])
            history = History(at["compile_seconds"], at["seconds"], curve, {VALIDATION: curve})
            runs[label(title, name, at["rate"], None)] = history
        for made in (entrant, *entrant.get("diverged", ())):
            for run in made.get("runs", ()):
                runs[label(title, name, made["rate"], run["seed"])] = History.of(run["history"])
    return runs
