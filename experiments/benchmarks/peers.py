"""The optimizers whose steps are timed."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import cqjax
from cqjax.linalg import conv_gram
from experiments.benchmarks import kfac, workloads
from experiments.benchmarks.timing import PERIOD, RATE, Training
from experiments.benchmarks.workloads import Task
from experiments.training import capturing_step, gradient_step

COMMON = (workloads.SGD, workloads.ADAM, workloads.MUON, workloads.CSGD, workloads.KFAC)
"""Every network is trained by these. All are compared with the first."""


Stepper = Training | kfac.Training
"""An optimizer at work; each call takes a step, and returns arrays to wait for."""


def _gradient(
    optimizer: Callable[[], optax.GradientTransformation],
) -> Callable[[Task, int], Stepper]:
    def build(task: Task, compiles: int) -> Stepper:
        tx = optimizer()
        step = gradient_step(task.loss_fn, tx)
        return Training(step, tx.init, task.start, task.batch, compiles)

    return build


def _muon() -> optax.GradientTransformation:
    return contrib.muon(RATE, muon_weight_dimension_numbers=_matrices)


def _matrices(params: Any) -> Any:
    """Which axes of each kernel are rows and columns of a matrix. Other arrays are for Adam."""

    def axes(path: Any, array: jax.Array) -> contrib.MuonDimensionNumbers | None:
        if array.ndim < 2:
            return None
        split = path[-2].key in ("query", "key", "value")  # (features, heads, outputs)
        inputs = 1 if split else array.ndim - 1
        every = tuple(range(array.ndim))
        return contrib.MuonDimensionNumbers(every[:inputs], every[inputs:])

    return jax.tree.map_with_path(axes, params)


def _capturing(task: Task, tx: Any, compiles: int, solver: Any = "auto") -> Stepper:
    """An optimizer that uses what cqjax captures."""
    step = capturing_step(task.loss_fn, tx, solver=solver)
    return Training(step, tx.init, task.start, task.batch, compiles)


def _csgd(task: Task, compiles: int) -> Stepper:
    """C-SGD, exact in every step."""
    return _capturing(
        task,
        cqjax.csgd(RATE, damping=task.workload.damping, relative_damping=0.0, max_change=None),
        compiles,
    )


def _every_10(task: Task, compiles: int) -> Stepper:
    """C-SGD that factorises in every tenth step."""
    plan = cqjax.plan(task.loss_fn, batch_size=len(task.batch[1]))(*task.start, *task.batch)
    first = cqjax.scale_by_consequentialism(
        damping=task.workload.damping, plan=plan, update_every=PERIOD, relative_damping=0.0
    )
    return _capturing(task, optax.chain(first, optax.sgd(RATE)), compiles)


def _by_patches(task: Task, compiles: int) -> Stepper:
    """C-SGD, with every convolution's Gram matrix from its patches.

    No argument asks for this. So while the step is traced, the other way is declared too costly.
    """
    with mock.patch.object(conv_gram, "correlation_cost", lambda *args, **options: math.inf):
        return _csgd(task, compiles)


def _pinv(task: Task, compiles: int) -> Stepper:
    """The paper's formula without damping: one `pinv` for each layer."""

    def update(layer: cqjax.Layer) -> cqjax.Matrices:
        rows = layer.rows()
        assert rows.h is not None
        x = jnp.concatenate([rows.x, rows.h[..., None]], -1)
        return cqjax.Matrices.parted(layer.terms * jnp.linalg.pinv(x) @ rows.dz, layer.has_bias)

    first = cqjax.for_each_layer(update, "pinv")
    return _capturing(task, optax.chain(first, optax.sgd(RATE)), compiles, "dual")


def _kfac(task: Task, compiles: int) -> Stepper:
    del compiles
    return kfac.Training(task)


PEERS: dict[str, Callable[[Task, int], Stepper]] = {
    workloads.SGD: _gradient(lambda: optax.sgd(RATE)),
    workloads.ADAM: _gradient(lambda: optax.adam(RATE)),
    workloads.MUON: _gradient(_muon),
    workloads.CSGD: _csgd,
    workloads.EVERY_10: _every_10,
    workloads.PATCHES: _by_patches,
    workloads.PINV: _pinv,
    workloads.KFAC: _kfac,
}
"""Takes a task, and how often to compile, to an optimizer that is ready to take steps."""
