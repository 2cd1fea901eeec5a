"""What is trained when a step is timed: networks, batches, and what a step may cost."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.classification import LossFn, cross_entropy, initialise
from experiments.models import MLP, ResNet, TransformerBlock

SGD, ADAM, MUON, KFAC = "SGD", "Adam", "Muon", "K-FAC-JAX"
CSGD, EVERY_10 = "C-SGD", "C-SGD, update_every=10"
PINV, PATCHES = "pinv per layer", "C-SGD by patches"


class Workload(NamedTuple):
    """A network, the shape of its batch, and the optimizers that take steps on it."""

    title: str
    model: nn.Module
    inputs: tuple[int, ...]
    """The shape of a batch of inputs."""
    damping: float
    """C-SGD's damping, by the paper."""
    peers: tuple[str, ...]
    """Optimizers that are timed beside SGD, Adam, Muon, C-SGD and K-FAC-JAX."""
    bars: Mapping[str, float]
    """By optimizer: the time that a step may take on a CPU, in steps of SGD."""
    gpu_bars: Mapping[str, float] = {}
    """The same on a GPU, where it differs."""
    memory_bars: Mapping[str, float] = {}
    """By optimizer: the temporary memory that it may need, in units of SGD's."""
    regression: bool = False
    """Whether the loss is the squared distance to targets of the outputs' shape."""


class Task(NamedTuple):
    """A workload with its first weights and its batch."""

    workload: Workload
    loss_fn: LossFn
    start: tuple[Any, Any]
    """The first parameters and network state."""
    batch: tuple[jax.Array, jax.Array]


def task(workload: Workload) -> Task:
    """Initialise a workload's network, and draw its batch."""
    keys = jax.random.split(jax.random.key(0))
    model = workload.model
    if workload.regression:
        inputs, targets = (jax.random.normal(key, workload.inputs) for key in keys)
        loss_fn = _squared_distance(model)
    else:
        inputs = jax.random.uniform(keys[0], workload.inputs)
        targets = jax.random.randint(keys[1], workload.inputs[:1], 0, 10)
        loss_fn = cross_entropy(model)
    start = jax.jit(partial(initialise, model, 2))(inputs)
    return Task(workload, loss_fn, start, (inputs, targets))


def _squared_distance(model: Any) -> LossFn:
    """Half the squared distance to the targets, a mean over the batch."""

    def loss_fn(
        params: Any, model_state: Any, inputs: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, Any]:
        outputs = model.apply({"params": params, **model_state}, inputs)
        return 0.5 * jnp.sum((outputs - targets) ** 2) / len(targets), model_state

    return loss_fn


def _mlp(width: int, batch: int, bar: float) -> Workload:
    return Workload(
        f"MLP 784–8×{width}–10 with biases, batch {batch}",
        MLP(width, 8, 10),
        (batch, 784),
        damping=1e-3,
        peers=(PINV,) if width == 800 and batch <= 128 else (),
        bars={CSGD: bar},
        gpu_bars={CSGD: 1.5},
    )


WORKLOADS = {
    "mlp-32": _mlp(800, 32, 1.15),
    "mlp-128": _mlp(800, 128, 1.25),
    "mlp-512": _mlp(800, 512, 1.25),
    "mlp-1600": _mlp(1600, 32, 1.25),
    "resnet20": Workload(
        "ResNet-20 without batch normalisation, batch 128",
        ResNet(20, batch_norm=False),
        (128, 32, 32, 3),
        damping=0.03,
        peers=(EVERY_10, PATCHES),
        bars={CSGD: 2.0, EVERY_10: 1.2},
        gpu_bars={CSGD: 1.5},
        memory_bars={CSGD: 1.25},
    ),
    "transformer": Workload(
        "transformer block, d = 512, 4,096 tokens",
        TransformerBlock(heads=8),
        (8, 512, 512),
        damping=1e-2,
        peers=(EVERY_10,),
        bars={EVERY_10: 1.2},
        regression=True,
    ),
}
