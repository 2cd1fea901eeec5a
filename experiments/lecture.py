"""A lecture's homework: first weights, losses, L2, pruning.

Jawahar (2019), sections 19.123 and 19.124. The page is `experiments.pages.lecture`.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import homework, options
from experiments.homework import GAUSSIANS, INITIALISATIONS, LOSSES, RATES
from experiments.page import publish
from experiments.scans import stages, timed

PRESETS = options.presets(
    seeds=(2, 10, 10),
    steps=(80, 2000, 2000),
    retraining=(5, 100, 100),
    retrainers=(("Adam", "C-SGD"), tuple(RATES), tuple(RATES)),
)
EVERY, FEW = 40, 40  # steps between measurements; training points for L2
DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
REMOVED = (4, 8, 12, 16, 20, 23, 27, 31, 35)  # of 39 weights
CASES = list(product(GAUSSIANS, INITIALISATIONS))
CASE = "around", "random"  # what L2 and pruning are tried on


@dataclass(frozen=True)
class Lecture:
    """Do a lecture's homework: first weights, squared and hinge loss, L2, pruning.

    A network of 2-3-5-3-1 neurons with sigmoids divides two Gaussians. Each optimizer is tuned at
    six rates. The one with the least validation loss, in the median of the seeds, counts. All
    optimizers share data, first weights and batches.
    """

    preset: options.Preset = "cpu"
    """smoke for tests, or cpu. The source has no settings: paper is the same as cpu."""
    seeds: int | None = None
    """How many draws of data, weights and batches. By default the preset's."""
    steps: int | None = None
    """Training steps, a multiple of 40. By default the preset's."""
    retraining: int | None = None
    """Steps of decay, and then of retraining, at each sparsity. By default the preset's."""
    retrainers: tuple[Literal["SGD", "momentum", "Adam", "C-SGD"], ...] | None = None
    """The optimizers that retrain pruned networks. By default the preset's."""
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
        assert settings.seeds and settings.retrainers
        starts = jax.jit(jax.vmap(_starts))(jax.random.split(jax.random.key(0), settings.seeds))
        training: dict[str, Any] = {loss: {} for loss in LOSSES}
        for loss, method in stages(console, list(product(LOSSES, RATES))):
            training[loss][method] = _trained(settings, loss, method, starts)
        rates = {m: training["squared"][m][CASE[0]][CASE[1]]["rate"] for m in RATES}
        case = jax.tree.map(lambda leaf: leaf[:, CASES.index(CASE)], starts)
        decays = _decayed(settings, rates["Adam"], case)
        pruning: dict[str, Any] = {}
        for _, method in stages(console, [("pruning", m) for m in settings.retrainers]):
            pruning[method] = _pruned(settings, rates, method, case)
        at = list(range(0, (settings.steps or 0) + 1, EVERY))
        results = {"at": at, "training": training, "decays": decays, "pruning": pruning}
        publish("lecture", self, settings, results, console)


def _starts(key: jax.Array) -> Any:
    """The first parameters and the points of a seed, for all cases."""
    return jax.tree.map(lambda *a: jnp.stack(a), *(homework.setting(key, *c) for c in CASES))


def _trained(settings: Any, loss: str, method: str, starts: Any) -> dict[str, Any]:
    """Train from all first weights, on both pairs of Gaussians, at the best rate of each."""

    def run(rate: jax.Array, start: Any, order: jax.Array) -> Any:
        rule = homework.optimizer(method, rate)
        params, history = homework.train(LOSSES[loss], rule, *start, order=order, every=EVERY)
        return history | {"unequal": homework.unequal(params)}

    every = jax.vmap(jax.vmap(jax.vmap(run, (None, 0, None)), (None, 0, 0)), (0, None, None))
    orders = homework.orders(settings.seeds, homework.TRAINING, settings.steps)
    timing = timed(every, np.array(RATES[method]), starts, orders)
    found: dict[str, Any] = {kind: {} for kind in GAUSSIANS}
    for i, (kind, first) in enumerate(CASES):
        history = {name: value[:, :, i] for name, value in timing.result.items()}
        losses = np.nan_to_num(np.median(history["validation_loss"][:, :, -1], axis=1), nan=np.inf)
        best = int(losses.argmin())
        at_best = {name: value[best] for name, value in history.items()}
        found[kind][first] = {"rate": RATES[method][best], "tuning": losses.tolist()}
        found[kind][first] |= {"last": _last(at_best), "unequal": at_best["unequal"].tolist()}
        if first == CASE[1]:
            curve = np.quantile(at_best["training_loss"], (0.5, 0, 1), axis=0)
            found[kind][first]["training_loss"] = curve.tolist()
    return found | {"seconds": timing.seconds, "compile_seconds": timing.compile_seconds}


def _decayed(settings: Any, rate: float, starts: Any) -> dict[str, Any]:
    """Adam on few points, with the squared norm of the parameters in the loss."""

    def run(decay: jax.Array, start: Any, order: jax.Array) -> Any:
        rule = homework.optimizer("Adam", rate)
        return homework.train(
            homework.squared, rule, *start, order=order, every=EVERY, decay=decay
        )[1]

    every = jax.vmap(jax.vmap(run, (None, 0, 0)), (0, None, None))
    orders = homework.orders(settings.seeds, FEW, settings.steps)
    timing = timed(every, np.array(DECAYS), starts, orders)
    curves = {k: np.median(timing.result[k], axis=1).tolist() for k in ("accuracy", "squared_norm")}
    at = [{k: v[i] for k, v in timing.result.items()} for i in range(len(DECAYS))]
    return {"decays": DECAYS, "curves": curves, "last": [_last(history) for history in at]}


def _last(history: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """The last value of each seed, of every measurement `(seeds, points)`."""
    return {name: value[:, -1].tolist() for name, value in history.items() if value.ndim == 2}


def _pruned(settings: Any, rates: dict[str, float], method: str, starts: Any) -> dict[str, Any]:
    """Train networks by Adam, remove their smallest weights, and retrain them by a method."""

    def run(start: Any, order: jax.Array) -> Any:
        adam, rule = (homework.optimizer(m, rates[m]) for m in ("Adam", method))
        params, history = homework.train(homework.squared, adam, *start, order=order, every=EVERY)
        rest = rule, params, start[1], order[: settings.retraining], jnp.array(REMOVED)
        once = homework.at_once(*rest)[:, jnp.array([0, 1, 2, -1])]  # steps of retraining
        return {
            "whole": history["accuracy"][-1],
            "at_once": once,
            "by_and_by": homework.by_and_by(*rest),
        }

    orders = homework.orders(settings.seeds, homework.TRAINING, settings.steps)
    timing = timed(jax.vmap(run), starts, orders)
    return {"removed": REMOVED} | {k: v.tolist() for k, v in timing.result.items()}
