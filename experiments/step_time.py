"""What a step of C-SGD costs beside SGD's: both interleaved in one process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

import cqjax
from experiments import options, report
from experiments.classification import cross_entropy, initialise
from experiments.models import MLP
from experiments.training import State, Step, capturing_step, gradient_step

WARM_UP = 10
RATE = 1e-6  # so small that the batch is never fitted: denormal numbers are slow on CPUs


@dataclass(frozen=True)
class StepTime:
    """Time a training step of C-SGD against SGD's, on the paper's fully-connected network.

    Both steps are compiled with donated buffers and take turns in one process. The ratio is the
    median of the pairs' ratios.
    """

    batch_size: int = 32
    """Images of a batch."""
    width: int = 800
    """Neurons of a hidden layer."""
    depth: int = 8
    """Number of hidden layers."""
    repeats: int = 200
    """Steps of each optimizer that are timed."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.AT_LEAST_ONE, "batch_size", "width", "depth", "repeats")

    def run(self) -> None:
        """Time the steps and print a table."""
        model = MLP(self.width, self.depth, 10)
        images = jax.random.uniform(jax.random.key(0), (self.batch_size, 784))
        labels = jax.random.randint(jax.random.key(1), (self.batch_size,), 0, 10)
        start = initialise(model, 2, images)
        loss_fn = cross_entropy(model)
        sgd, csgd = optax.sgd(RATE), cqjax.csgd(RATE)
        timed = {
            "SGD": _Timed(gradient_step(loss_fn, sgd), start, sgd.init, (images, labels)),
            "C-SGD": _Timed(capturing_step(loss_fn, csgd), start, csgd.init, (images, labels)),
        }
        for _ in track(range(WARM_UP + self.repeats), description="timing"):
            for step in timed.values():
                step()
        seconds = {name: np.array(step.seconds[WARM_UP:]) for name, step in timed.items()}
        rows = [
            {
                "optimizer": name,
                "to SGD's step": f"{np.median(times / seconds['SGD']):.2f}",
                "ms (median)": f"{1e3 * np.median(times):.2f}",
                "ms (quartiles)": " – ".join(
                    f"{1e3 * quartile:.2f}" for quartile in np.quantile(times, (0.25, 0.75))
                ),
                "trace and compile, s": f"{timed[name].compile_seconds:.2f}",
            }
            for name, times in seconds.items()
        ]
        title = f"{self.depth} hidden layers of {self.width}, batches of {self.batch_size}"
        report.print_table(Console(), title, rows)


class _Timed:
    """A compiled step that notes how long each of its calls takes."""

    def __init__(
        self,
        step: Step,
        start: tuple[Any, Any],
        init: Callable[[Any], Any],
        batch: tuple[jax.Array, jax.Array],
    ):
        params, model_state = jax.tree.map(jnp.copy, start)  # the step donates its buffers
        self._state, self._batch = State(params, model_state, init(params)), batch
        started = time.perf_counter()
        self._step = jax.jit(step, donate_argnums=0).lower(self._state, *batch).compile()
        self.compile_seconds = time.perf_counter() - started
        self.seconds: list[float] = []

    def __call__(self) -> None:
        started = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._step(self._state, *self._batch))
        self.seconds.append(time.perf_counter() - started)
