"""What the precision of products does to Gram matrices, to updates and to training."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.progress import track

import cqjax
from experiments import data
from experiments.benchmarks import solve_errors
from experiments.benchmarks.bars import Result, Table
from experiments.benchmarks.rounding import emulated, settings
from experiments.benchmarks.solve_errors import Found
from experiments.benchmarks.timing import PERIOD, Effort
from experiments.classification import cross_entropy, initialise, mean_loss
from experiments.models import MLP, ResNet
from experiments.quickstart import DEFAULTS
from experiments.training import State, capturing_step, shuffled_batches

MEASURED = 2_000  # the training loss is that of the first so many training images

Start = tuple[Any, Any]


class Network(NamedTuple):
    """A network, and how C-SGD trains it."""

    model: Any
    dampings: tuple[float, ...]
    scopes: str
    """What is rounded: see `rounding.SCOPES`."""
    batch: int = 32
    rate: float | None = None
    """C-SGD's; the quick start's if not given."""
    twice: tuple[bool, ...] = (False,)
    """Whether half of the batch is the other half again, with a fifth of its labels shuffled."""


TRAINED = {
    "MLP": Network(MLP(800, 8, 10), (1e-3, 1e-4, 1e-5), "ab", twice=(False, True)),
    "ResNet-8": Network(ResNet(8, 8, batch_norm=False), (3e-2,), "a", rate=0.05),
}
ANALYSED = {
    "MLP, batch 32": Network(MLP(800, 8, 10), (1e-3,), "ab"),
    "MLP, batch 128": Network(MLP(800, 8, 10), (1e-3,), "abc", 128),
    "ResNet-20, batch 128": Network(ResNet(20, batch_norm=False), (3e-2,), "a", 128),
}
"""The MLPs also as they are after training."""


def measure(name: str, effort: Effort) -> Result:
    """Train with each emulated format; look at Gram matrices and updates before and after.

    Args:
      name: Stands beside the progress bars.
      effort: As many times ten steps are taken as it has repeats, from as many seeds as compiles.
    """
    dataset = data.load("auto", None, False)
    runs = [
        (title, network, *setting)
        for title, network in TRAINED.items()
        for setting in settings(network.scopes)
    ]
    trained: list[Found] = []
    ends: dict[str, Start] = {}
    for title, network, format_, scope in track(runs, f"{name}: training"):
        for found, end in _train(network, dataset, format_, scope, effort):
            trained.append({"network": title, "products": f"{format_} ({scope})"} | found)
            ends.setdefault(title, end)  # in float32, at the first damping
    layers: dict[str, list[Found]] = {}
    for title, network in track(ANALYSED.items(), f"{name}: Gram matrices"):
        batch = _examples(network, dataset, network.batch)
        starts = {title: _start(network, dataset, 0)}
        if title.split(",")[0] in ends:
            starts[f"{title}, trained"] = ends[title.split(",")[0]]
        for when, start in starts.items():
            layers[when] = solve_errors.analyse(
                network.model, start, *batch, network.dampings[0], network.scopes
            )
    steps = f"{PERIOD * effort.repeats:,} steps, {dataset.name}"
    return Result(
        {"dataset": dataset.summary(), "training": trained, "layers": layers},
        [
            *solve_errors.tables(layers),
            Table(f"training loss after C-SGD's {steps}, for each seed", _losses(trained)),
        ],
        [],
    )


def _start(network: Network, dataset: data.Dataset, seed: int) -> Start:
    images, _ = _examples(network, dataset, 1)
    return jax.jit(partial(initialise, network.model, seed))(images)


def _examples(
    network: Network, dataset: data.Dataset, number: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The first training images, with a channel and a margin for convolutions, and labels."""
    images, labels = (part[:number] for part in dataset.train)
    if isinstance(network.model, ResNet):
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    return images, labels


def _train(
    network: Network, dataset: data.Dataset, format_: str, scope: str, effort: Effort
) -> list[tuple[Found, Start]]:
    """Train at every damping from every seed; the ends come too."""
    images, labels = _examples(network, dataset)
    some = min(MEASURED, len(labels))
    metric = mean_loss(network.model, images[:some], labels[:some])
    rate = network.rate or float(DEFAULTS[dataset.name]["csgd_learning_rate"])
    solve = optax.inject_hyperparams(cqjax.scale_by_consequentialism, "relative_damping")

    def optimizer(damping: float) -> optax.GradientTransformationExtraArgs:
        return optax.chain(solve(damping=damping), optax.sgd(rate))

    loss_fn, some_damping = cross_entropy(network.model), optimizer(1.0)  # the state has it
    step = jax.jit(capturing_step(loss_fn, some_damping), donate_argnums=0)
    results = []
    with emulated(format_, scope):
        seeds = range(effort.compiles)
        for twice, damping, seed in itertools.product(network.twice, network.dampings, seeds):
            start = _start(network, dataset, seed)
            state = State(*start, optimizer(damping).init(start[0]))
            for batch in shuffled_batches(
                seed, len(labels), network.batch, PERIOD * effort.repeats
            ):
                batch, answers = _twice(batch, labels, seed) if twice else (batch, labels[batch])
                state, _ = step(state, images[batch], answers)
            loss = metric(state.params, state.model_state)
            fallbacks = sum(
                int(n.sum()) for _, n in optax.tree.get_all_with_path(state, "fallbacks")
            )
            found = {"twice": twice, "damping": damping, "seed": seed}
            found |= {"loss": loss, "fallbacks": fallbacks}
            results.append((found, (state.params, state.model_state)))
    return results


def _twice(batch: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of a batch's examples, each twice, with two labels."""
    half, rng = batch[: len(batch) // 2], np.random.default_rng([seed, *batch[:2]])
    other = np.where(rng.random(len(half)) < 0.2, rng.permutation(labels[half]), labels[half])
    return np.tile(half, 2), np.concatenate([labels[half], other])


def _losses(trained: Sequence[Found]) -> list[dict[str, str]]:
    """Losses of all seeds, and how many solves failed in all."""
    rows = []
    settings_ = ("network", "twice", "damping", "products")
    for keys, runs in itertools.groupby(trained, lambda run: [run[key] for key in settings_]):
        network, twice, damping, products = keys
        runs = list(runs)
        rows.append(
            {
                "network": f"{network}, images twice" if twice else network,
                "λ": f"{damping:g}",
                "products": products,
                "loss": ", ".join(f"{run['loss']:.4g}" for run in runs),
                "fallbacks": str(sum(run["fallbacks"] for run in runs)),
            }
        )
    return rows
