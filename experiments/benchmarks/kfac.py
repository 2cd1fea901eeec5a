"""K-FAC-JAX, a peer that is timed where it is installed and works."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks.timing import RATE, Program, seconds_of
from experiments.benchmarks.workloads import Task


def installed() -> bool:
    """Whether K-FAC-JAX is there."""
    return importlib.util.find_spec("kfac_jax") is not None


class NotInstalledError(Exception):
    """K-FAC-JAX is not there."""


class Training:
    """Steps of K-FAC-JAX on one batch, with its defaults: it inverts in every fifth step.

    K-FAC-JAX compiles its programs in its first step. The time of compiling is what the first step
    takes more than the second. The memory of its programs is not known.

    Raises:
      NotInstalledError: If it is not there.
    """

    def __init__(self, task: Task):
        if not installed():
            raise NotInstalledError("not installed (pip install 'cqjax[bench]')")
        kfac_jax = importlib.import_module("kfac_jax")
        model, regression = task.workload.model, task.workload.regression

        def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            inputs, targets = batch
            outputs: Any = model.apply({"params": params}, inputs)
            if regression:
                kfac_jax.register_squared_error_loss(outputs, targets, weight=0.5)
                return 0.5 * jnp.sum((outputs - targets) ** 2) / len(targets)
            kfac_jax.register_softmax_cross_entropy_loss(outputs, targets)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

        jax.clear_caches()
        self._optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss_fn), l2_reg=0.0, num_burnin_steps=0
        )
        self._key, self._batch, self._damping = jax.random.key(0), task.batch, task.workload.damping
        params = jax.tree.map(jnp.copy, task.start[0])
        self.state: Any = params, self._optimizer.init(params, self._key, self._batch)
        self.loss: Any = None
        first = seconds_of(self)
        self.program = Program(self, max(0.0, first - seconds_of(self)), {}, None, None)

    def __call__(self) -> Any:
        """Take a step."""
        params, opt_state, stats = self._optimizer.step(
            *self.state,
            self._key,
            batch=self._batch,
            learning_rate=jnp.asarray(RATE),
            momentum=jnp.asarray(0.0),
            damping=jnp.asarray(self._damping),
        )
        self.state, self.loss = (params, opt_state), stats["loss"]
        return self.state
