"""The outputs' way to their targets, in a layer of 20 inputs and 2 outputs.

Paeedeh and Ghiasi-Shirazi, section 5.2, Fig. 4. The page is `experiments.pages.output_paths`.
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

PRESETS = options.presets(
    steps=(40, 400, 400), seeds=(3, 50, 50), batch_sizes=((10,), (10, 5), (10, 5))
)
FEATURES, OUTPUTS, SAMPLES = 20, 2, 10
RUNS = {"C-SGD": (0.7, 0.1, 1.0), "SGD": (0.03, 0.01), "NLMS": (0.7, 0.1)}  # rates
NEAR = 0.01  # of the loss, or a distance, at the start
SHOWN = 60  # steps of the paths that are drawn


@dataclass(frozen=True)
class OutputPaths:
    """Follow a linear layer's outputs to their targets by C-SGD, SGD and NLMS for batches.

    The layer has 20 inputs and 2 outputs. There are 10 samples, with random inputs and targets.
    Each seed has its own samples and weights, which all methods share.
    """

    preset: options.Preset = "cpu"
    """smoke for tests, or cpu. paper is the same as cpu."""
    steps: int | None = None
    """Steps of each run. By default the preset's."""
    seeds: int | None = None
    """How many draws of samples and weights. By default the preset's. The figure has the first."""
    batch_sizes: tuple[int, ...] | None = None
    """Samples of a mini-batch, of all 10. By default the preset's. The first size judges claims."""
    damping: float = 1e-3
    """C-SGD's damping, lambda in the paper's Eq. 63, and epsilon of NLMS (Eq. 49)."""
    output: Path = Path("results/output_paths")
    """Folder for README.md, paths.png and results.json."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.AT_LEAST_ONE, "steps", "seeds", "batch_sizes")
        options.require(self, options.POSITIVE, "damping")
        if any(SAMPLES % size for size in self.batch_sizes or ()):
            raise ValueError(f"--batch-sizes must divide {SAMPLES}, got {self.batch_sizes}")

    def run(self) -> None:
        """Follow the outputs, draw them, and judge the source's claims."""
        settings = options.filled(self, PRESETS)
        assert settings.seeds and settings.batch_sizes
        keys = jax.random.split(jax.random.key(0), settings.seeds)
        _, x, t = jax.device_get(jax.vmap(draw)(keys))
        results = {
            "first_targets": t[0].tolist(),
            "nlms_largest_eigenvalues": [_largest_eigenvalue(draw) for draw in x],
            "runs": [
                run
                for size in settings.batch_sizes
                for method in RUNS
                for run in _runs(settings, method, size, keys, t)
            ],
        }
        publish("output_paths", self, settings, results, Console())


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weights `(20, 2)` of a seed, from Glorot's distribution, its inputs and its targets."""
    weights, inputs, targets = jax.random.split(key, 3)
    return (
        jax.nn.initializers.glorot_normal()(weights, (FEATURES, OUTPUTS)),
        jax.random.normal(inputs, (SAMPLES, FEATURES)),
        jax.random.normal(targets, (SAMPLES, OUTPUTS)),
    )


def _runs(settings: OutputPaths, method: str, size: int, keys: Any, t: Any) -> list[dict[str, Any]]:
    """One method at each of its rates, for all seeds."""
    rates = np.array(RUNS[method])

    def loss_fn(w: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((t - x @ w) ** 2)

    def path(rate: jax.Array, key: jax.Array) -> jax.Array:
        optimizer = {
            "C-SGD": cqjax.csgd(
                rate, damping=settings.damping, relative_damping=0.0, max_change=None
            ),
            "SGD": optax.sgd(rate),
            "NLMS": cqjax.nlms(rate, settings.damping),
        }[method]
        w, x, t = draw(key)
        assert settings.steps
        order = jnp.arange(settings.steps * size).reshape(-1, size) % SAMPLES
        differentiate = cqjax.value_and_grad(loss_fn, loss_reduction="sum", solver="dual")
        batches = x[order], t[order]
        return descend(differentiate, optimizer, w, batches, lambda w: x @ w)[1]

    timing = timed(jax.vmap(jax.vmap(path, (None, 0)), (0, None)), rates, keys)
    return [
        {
            "method": method,
            "rate": rate,
            "batch_size": size,
            "seconds": timing.seconds,
            "compile_seconds": timing.compile_seconds,
            **_summary(z.astype(np.float64), t),
        }
        for rate, z in zip(rates.tolist(), timing.result, strict=True)
    ]


def _summary(z: np.ndarray, t: np.ndarray) -> dict[str, Any]:
    """Describe the paths of the outputs z, `(seeds, steps, samples, outputs)`."""
    with np.errstate(all="ignore"):
        distance = np.linalg.norm(z - t[:, None], axis=-1)
        squares, moved = np.sum(distance**2, axis=-1), np.linalg.norm(np.diff(z, axis=1), axis=-1)
        far = distance[:, :-1] > NEAR * distance[:, :1]
        astray = (np.diff(distance, axis=1) > 0) & far
        lengths = moved.sum(axis=1) / distance[:, 0]
        late = ~(squares <= NEAR * squares[:, :1])
    last = late.shape[1] - np.argmax(late[:, ::-1], axis=1)
    return {
        "paths": z[0, :SHOWN, :2].tolist(),  # of two samples
        "median_length": np.median(lengths, axis=1).tolist(),
        "longest": lengths.max(axis=1).tolist(),
        "astray": (astray.sum(axis=(1, 2)) / far.sum(axis=(1, 2))).tolist(),
        "steps": [int(step) if step < len(z[0]) else None for step in last],
        "final": (squares[:, -1] / squares[:, 0]).tolist(),
    }


def _largest_eigenvalue(x: np.ndarray) -> float:
    """The largest eigenvalue of the matrix of Eq. 54. NLMS is stable if it is below 2 / rate."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return float(np.linalg.eigvalsh(x @ x.T).max())
