"""Back-matching's layer-wise rates: Zhang, Chen and Liu, Algorithm 1 and supplement."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import cqjax
from experiments import options, report
from experiments.classification import cross_entropy, initialise
from experiments.data import cifar
from experiments.models import VGG, LeNet, ResNet
from experiments.runs import bar, progress_bars
from experiments.training import State, gradient_step, shuffled_batches, train

NETWORKS = {
    "lenet": ("LeNet", LeNet()),
    "vgg16": ("VGG-16", VGG(16)),
    "resnet20": ("ResNet-20", ResNet(20)),
}
SGD = (0.05, 0.9)  # rate and momentum of the training with --steps


@dataclass(frozen=True)
class Rates:
    """Show the rate 1/(m s) that back-matching gives each layer of a network.

    m is the layer's backward factor, and also a factor of every layer below. s is the number of
    positions that share the layer's weights. LeNet and VGG-16 are chains of layers: m follows from
    their weights, and beside it stands m as measured. ResNet-20 has branches: m is measured. The
    networks are freshly initialised, and m is measured on a batch of noise with mean 0 and standard
    deviation 1. With --steps, they are first trained on CIFAR-10 by SGD with momentum, and the
    batch is of its images. The tables are also written as Markdown.
    """

    networks: tuple[Literal["lenet", "vgg16", "resnet20"], ...] = ("lenet", "vgg16", "resnet20")
    """The networks."""
    steps: int = 0
    """Train for so many steps before."""
    batch_size: int = 128
    """Images of a batch."""
    seed: int = 0
    """Seed of the weights and of the batches."""
    data_dir: Path | None = None
    """The folder cifar-10-batches-py, or its parent."""
    download: bool = False
    """Fetch CIFAR-10 (170 MB) if it is not found, into --data-dir or the cache."""
    output: Path = Path("results/rates")
    """Folder for rates.md."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.AT_LEAST_ONE, "batch_size")
        options.require(self, options.COUNT, "steps")
        options.require(self, options.SEED, "seed")

    def run(self) -> None:
        """Compute the rates, print them and write them.

        Raises:
          DataError: If CIFAR-10 is needed and not there, or its files are bad.
        """
        console, tables = Console(), []
        self.output.mkdir(parents=True, exist_ok=True)
        examples = _examples(self)
        for name in self.networks:
            title, model = NETWORKS[name]
            chain = not isinstance(model, ResNet)
            title += ", m from the weights" if chain else ", m measured"
            if self.steps:
                title += f", after {self.steps:,} steps"
            start = initialise(model, self.seed, examples[0])
            if self.steps:
                start = _trained(self, title, model, start, examples)
            rows = _rows(model, chain, start, *(array[: self.batch_size] for array in examples))
            report.print_table(console, title, rows)
            tables.append(f"## {title}\n\n{report.markdown_table(rows)}")
        (self.output / "rates.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
        console.print(f"Written: {self.output}/rates.md", highlight=False, soft_wrap=True)


Examples = tuple[jax.Array, jax.Array]
"""Images and labels."""


def _examples(settings: Rates) -> Examples:
    """Noise, or all training images of CIFAR-10."""
    if settings.steps == 0:
        image_key, label_key = jax.random.split(jax.random.key(settings.seed))
        images = jax.random.normal(image_key, (settings.batch_size, 32, 32, 3))
        return images, jax.random.randint(label_key, (settings.batch_size,), 0, 10)
    dataset = cifar.CIFAR10.load(settings.data_dir, settings.download)
    dataset.check_batch_size(settings.batch_size)
    images, labels = dataset.standardised().train
    return jnp.asarray(images), jnp.asarray(labels)


def _trained(
    settings: Rates, title: str, model: Any, start: tuple[Any, Any], examples: Examples
) -> tuple[Any, Any]:
    """The network's parameters and state after some steps of SGD."""
    sgd = optax.sgd(*SGD)
    step = gradient_step(cross_entropy(model, train=True), sgd)
    batches = shuffled_batches(settings.seed, len(examples[1]), settings.batch_size, settings.steps)
    with progress_bars(Console()) as progress:
        show = bar(progress, title, settings.steps)
        state = State(*start, sgd.init(start[0]))
        state, _ = train(step, state, examples, batches, {}, lambda _, history: show(history))
    return state.params, state.model_state


def _rows(
    model: Any, chain: bool, start: tuple[Any, Any], images: jax.Array, labels: jax.Array
) -> list[dict[str, str]]:
    """The rows of a table, one for each layer, the lowest layer first."""
    params, state = start
    loss_fn = cross_entropy(model, train=True)
    plan = cqjax.plan(loss_fn, batch_size=len(labels))(params, state, images, labels)

    @jax.jit
    def measured(params: Any) -> Any:
        return cqjax.back_matching_rates(
            plan, params, value_fn=lambda params: loss_fn(params, state, images, labels)[0]
        )

    by_measure = measured(params)
    rates, rows = cqjax.back_matching_rates(plan, params) if chain else by_measure, []
    for unit in cqjax.back_matching_units(plan):
        layer = unit.paths[0].removesuffix("/kernel")
        rate, other = (float(tree[layer]["kernel"]) for tree in (rates, by_measure))
        shared, positions = unit.pooled / len(labels), unit.rows / len(labels)
        row = {
            "layer": layer,
            "kernel": " × ".join(map(str, params[layer]["kernel"].shape)),
            "s": f"{shared if chain else positions:,.0f}",
            "m": f"{1 / (rate * (shared if chain else positions)):.3g}",
            "rate": f"{rate:.3g}",
        }
        if chain:
            row["m measured"] = f"{1 / (other * positions):.3g}"
        rows.append(row)
    return rows
