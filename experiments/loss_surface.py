"""Two weights on their way down the loss surface.

Paeedeh and Ghiasi-Shirazi, section 5.1, Fig. 3. The page is `experiments.pages.loss_surface`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import cqjax
from experiments import options
from experiments.page import publish
from experiments.scans import descend, timed

PRESETS = options.presets(steps=(60, 2000, 2000), sweep=(5, 60, 60))
METHODS = ("C-SGD", "SGD", "SGD with momentum")
NEAR = 0.01  # of the distance at the start
SHOWN = 120  # steps of the paths that are drawn


@dataclass(frozen=True)
class LossSurface:
    """Follow two weights to their optimum by C-SGD, SGD and SGD with momentum.

    The network has two inputs, two weights and two outputs z = w x. Its loss is half the squared
    error, and the contours of the loss are ellipses. Each method starts from the same weights, at a
    high rate, at a low one, and at many others.
    """

    preset: options.Preset = "cpu"
    """smoke for tests, or cpu. paper is the same as cpu."""
    rates: tuple[float, float] = (0.49, 0.05)
    """The high and the low learning rate, the same for all methods."""
    momentum: float = 0.9
    """The momentum of SGD with momentum."""
    damping: float = 1e-3
    """C-SGD's damping, lambda in the paper's Eq. 63."""
    inputs: tuple[float, float] = (0.5, 2.0)
    """The two inputs. Their squares are the curvatures of the loss."""
    targets: tuple[float, float] = (1.0, 2.0)
    """The targets of the outputs."""
    start: tuple[float, float] = (-1.0, 2.5)
    """The first weights."""
    steps: int | None = None
    """Steps of each path. By default the preset's."""
    sweep: int | None = None
    """How many more rates, between 0.01 and 1, to try. By default the preset's."""
    output: Path = Path("results/loss_surface")
    """Folder for README.md, paths.png and results.json."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.AT_LEAST_ONE, "steps", "sweep")
        options.require(self, options.POSITIVE, "rates", "damping", "inputs")
        options.require(self, options.FRACTION, "momentum")

    def run(self) -> None:
        """Follow the paths, draw them, and judge the source's claims."""
        settings = options.filled(self, PRESETS)
        assert settings.sweep
        sweep = np.geomspace(0.01, 1, settings.sweep)
        rates = np.concatenate([settings.rates, sweep])
        timings = {method: timed(jax.vmap(_path(settings, method)), rates) for method in METHODS}
        optimum = np.divide(settings.targets, settings.inputs)
        results = {
            method: {
                "seconds": timing.seconds,
                "compile_seconds": timing.compile_seconds,
                "paths": timing.result[: len(settings.rates), :SHOWN].tolist(),
                "rates": [
                    {"rate": rate, **_summary(np.float64(path) - optimum)}
                    for rate, path in zip(rates.tolist(), timing.result, strict=True)
                ],
            }
            for method, timing in timings.items()
        }
        publish("loss_surface", self, settings, results, Console())


def _path(settings: LossSurface, method: str) -> Any:
    """A function from a rate to the weights before each step, `(steps, 2)`."""
    x, t, steps = jnp.array([settings.inputs]), jnp.array([settings.targets]), settings.steps
    assert steps

    def loss_fn(w: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        z = jnp.einsum("ngd,gdo->ngo", x[..., None], w)[..., 0]  # two layers of one weight
        return 0.5 * jnp.mean(jnp.sum((t - z) ** 2, axis=1))

    def path(rate: jax.Array) -> jax.Array:
        optimizer = {
            "C-SGD": cqjax.csgd(
                rate, damping=settings.damping, relative_damping=0.0, max_change=None
            ),
            "SGD": optax.sgd(rate),
            "SGD with momentum": optax.sgd(rate, settings.momentum),
        }[method]
        return descend(
            cqjax.value_and_grad(loss_fn),
            optimizer,
            jnp.array(settings.start).reshape(2, 1, 1),
            (jnp.broadcast_to(x, (steps, 1, 2)), jnp.broadcast_to(t, (steps, 1, 2))),
            jnp.ravel,
        )[1]

    return path


def _summary(error: np.ndarray) -> dict[str, Any]:
    """Describe a path `(steps, 2)`, given as differences from the optimum."""
    with np.errstate(all="ignore"):
        distance, walked = np.linalg.norm(error, axis=1), np.abs(np.diff(error, axis=0))
        reached = _steps(distance)
        return {
            "steps": reached,
            "weights_steps": [_steps(np.abs(weight)) for weight in error.T],
            "length": float(np.linalg.norm(walked, axis=1).sum() / distance[0]),
            "travel": np.nan_to_num(walked.sum(axis=0) / np.abs(error[0]), nan=np.inf).tolist(),
            "overshoot": np.max(-error / error[0], axis=0, initial=0).tolist(),
            "crossings": (np.diff(np.sign(error[:reached]), axis=0) != 0).sum(axis=0).tolist(),
        }


def _steps(distance: np.ndarray) -> int | None:
    """The number of steps after which the path stays near the optimum."""
    away = np.flatnonzero(~(distance <= NEAR * distance[0]))
    return int(away[-1]) + 1 if away[-1] + 1 < len(distance) else None
