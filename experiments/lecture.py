"""A lecture's homework: first weights, losses, L2, pruning (seed 002)."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import homework, options
from experiments.homework import GAUSSIANS, INITIALISATIONS, LOSSES, RATES
from experiments.page import publish
from experiments.pages import lecture as pages
from experiments.pruning import at_once, by_and_by
from experiments.scans import stages, timed

PRESETS: dict[options.Preset, dict[str, Any]] = {
    "smoke": {"seeds": 2, "steps": 60, "retraining": 5},
    "cpu": {"seeds": 10, "steps": 2000, "retraining": 100},
    "paper": {"seeds": 10, "steps": 2000, "retraining": 100},
}
EVERY, FEW = 20, 40  # steps between measurements; L2's training points
DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
REMOVED = (4, 8, 12, 16, 20, 23, 27, 31, 35)  # of 39 weights
CASE = "around", "random"  # what L2 and pruning are tried on


@dataclass(frozen=True)
class Lecture:
    """Do a lecture's homework: first weights, squared and hinge loss, L2, pruning.

    A network of 2-3-5-3-1 neurons with sigmoids divides two Gaussians. Each optimizer has the
    rate, of six, that has the least validation loss in the median of the seeds; all share data,
    first weights and batches.
    """

    preset: options.Preset = "cpu"
    """smoke for tests, cpu, or paper, which is no other: the source has no settings."""
    seeds: int | None = None
    """How many draws of data, weights and batches; by the preset if not given."""
    steps: int | None = None
    """Training steps, a multiple of 20; by the preset if not given."""
    retraining: int | None = None
    """Steps of decay, and then of retraining, at each sparsity; by the preset if not given."""
    output: Path = Path("results/lecture")
    """Folder for README.md, the figures and results.json."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.AT_LEAST_ONE, "seeds", "steps", "retraining")
        if self.steps and self.steps % EVERY:
            raise ValueError(f"--steps must be a multiple of {EVERY}, got {self.steps}")

    def run(self) -> None:
        """Train, draw how it went, and judge the source's claims."""
        settings, console = options.filled(self, PRESETS), Console()
        assert settings.seeds
        keys = jax.random.split(jax.random.key(0), settings.seeds)
        training: dict[str, Any] = {loss: {} for loss in LOSSES}
        for loss, method in stages(console, list(product(LOSSES, RATES))):
            training[loss][method] = _trained(settings, loss, method, keys)
        rates = {m: training["squared"][m][CASE[0]][CASE[1]]["rate"] for m in RATES}
        decays = _decayed(settings, rates["Adam"], keys)
        pruning: dict[str, Any] = {}
        for _, method in stages(console, [("pruning", method) for method in RATES]):
            pruning[method] = _pruned(settings, rates, method, keys)
        results = {"training": training, "decays": decays, "pruning": pruning}
        publish("lecture", self, settings, pages, results, console)


def _trained(settings: Any, loss: str, method: str, keys: jax.Array) -> dict[str, Any]:
    """All first weights on both pairs of Gaussians, at the rate that is best for each."""
    cases = [(kind, first) for kind in GAUSSIANS for first in INITIALISATIONS]

    def run(rate: jax.Array, start: Any) -> Any:
        rule = homework.optimizer(method, rate)
        params, history = homework.train(LOSSES[loss], rule, *start, every=EVERY)
        return history | {"unequal": homework.unequal(params)}

    def start(case: tuple[str, str]) -> Any:
        return jax.vmap(
            lambda key: homework.setting(key, *case, homework.TRAINING, settings.steps)
        )(keys)

    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(start, cases))
    every = jax.vmap(jax.vmap(jax.vmap(run, (None, 0)), (None, 0)), (0, None))
    timing = timed(every, np.array(RATES[method]), starts)
    found: dict[str, Any] = {kind: {} for kind in GAUSSIANS}
    for i, (kind, first) in enumerate(cases):
        history = {name: value[:, i] for name, value in timing.result.items()}
        losses = np.nan_to_num(np.median(history["validation_loss"][:, :, -1], axis=1), nan=np.inf)
        best = int(losses.argmin())
        at_best = {name: value[best] for name, value in history.items()}
        found[kind][first] = {"rate": RATES[method][best], "tuning": losses.tolist()}
        found[kind][first] |= {"last": _last(at_best), "unequal": at_best["unequal"].tolist()}
        if first == CASE[1]:
            curve = np.quantile(at_best["training_loss"], (0.5, 0, 1), axis=0)
            found[kind][first]["training_loss"] = curve.tolist()
    return found | {"seconds": timing.seconds, "compile_seconds": timing.compile_seconds}


def _decayed(settings: Any, rate: float, keys: jax.Array) -> dict[str, Any]:
    """Adam from few points, with the squared norm of the parameters in the loss."""

    def run(decay: jax.Array, key: jax.Array) -> Any:
        rule = homework.optimizer("Adam", rate)
        start = homework.setting(key, *CASE, FEW, settings.steps)
        return homework.train(homework.squared, rule, *start, every=EVERY, decay=decay)[1]

    timing = timed(jax.vmap(jax.vmap(run, (None, 0)), (0, None)), np.array(DECAYS), keys)
    curves = {k: np.median(timing.result[k], axis=1).tolist() for k in ("accuracy", "squared_norm")}
    at = [{k: v[i] for k, v in timing.result.items()} for i in range(len(DECAYS))]
    return {"decays": DECAYS, "curves": curves, "last": [_last(history) for history in at]}


def _last(history: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """What it was in the end, for each seed; of what was measured on the way, `(seeds, points)`."""
    return {name: value[:, -1].tolist() for name, value in history.items() if value.ndim == 2}


def _pruned(settings: Any, rates: dict[str, float], method: str, keys: jax.Array) -> dict[str, Any]:
    """Networks that Adam trained, without their smallest weights, retrained by a method."""

    def run(key: jax.Array) -> Any:
        start, examples, order = homework.setting(key, *CASE, homework.TRAINING, settings.steps)
        adam, rule = (homework.optimizer(m, rates[m]) for m in ("Adam", method))
        params, history = homework.train(homework.squared, adam, start, examples, order, EVERY)
        rest = rule, params, examples, order[: settings.retraining], jnp.array(REMOVED)
        once = at_once(*rest)[:, jnp.array([0, 1, 2, -1])]  # steps of retraining
        return {"whole": history["accuracy"][-1], "at_once": once, "by_and_by": by_and_by(*rest)}

    timing = timed(jax.vmap(run), keys)
    return {"removed": REMOVED} | {k: v.tolist() for k, v in timing.result.items()}
