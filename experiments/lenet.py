"""SGD and back-matching train LeNet on CIFAR-10 (seed 004, section 3.3 and Figure 2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax
from rich.console import Console

import cqjax
from experiments import models, options, report
from experiments.classification import accuracy, cross_entropy, initialise, mean_loss
from experiments.comparison import Method, compare
from experiments.data import Dataset, cifar
from experiments.experiment import Experiment
from experiments.training import Curve, History, gradient_step, shuffled_batches

LABELS = {"sgd": "SGD", "back_matching": "back-matching"}
POOLS = {"sgd": (0.02, 0.05, 0.1, 0.2, 0.5), "back_matching": (0.005, 0.01, 0.02, 0.05, 0.1)}
PAPER = {"sgd": 0.1, "back_matching": 0.02}  # what the paper chose, after 200 epochs
MEASURED = 10_000  # the training loss is that of the first so many training images


@dataclass(frozen=True)
class LeNet(Experiment):
    """Train LeNet on CIFAR-10 by SGD and by SGD with back-matching rates, and compare them.

    All runs have momentum, start from the same weights and see the same batches, without
    augmentation. Each channel of the images has the training set's mean and standard deviation
    taken out. The training loss is that of the first 10,000 training images without the
    weight-decay term; it and the test accuracy are measured with batch normalisation's running
    averages. The results are a table, a figure in lenet.png, and every number in results.json;
    while it runs, the metrics go to metrics.jsonl.

    CIFAR-10 are the official files cifar-10-batches-py for Python. They are looked for in
    --data-dir; else in the folder that the variable CQJAX_DATA_DIR names and in the download
    cache.
    """

    rates: Literal["all", "paper"] = "all"
    """The learning rates: for each method all five candidates of the paper, or only the one that
    the paper chose."""
    steps: int = 2000
    """Training steps of each run; an epoch has 390."""
    batch_size: int = 128
    """Images of a batch."""
    momentum: float = 0.9
    """Momentum of both methods."""
    nesterov: bool = False
    """Use Nesterov's form of momentum."""
    weight_decay: float = 0.0
    """Weight decay of both methods, added to the gradient; the paper's other setting is 5e-4."""
    channels: tuple[int, int] = (6, 16)
    """Output channels of the two convolutions."""
    hidden: tuple[int, int] = (120, 84)
    """Neurons of the two hidden fully-connected layers."""
    data_dir: Path | None = None
    """The folder cifar-10-batches-py, or the one that it is in."""
    download: bool = False
    """Fetch CIFAR-10 (170 MB) if it is not found, into --data-dir or the cache."""
    output: Path = Path("results/lenet")
    """Folder for lenet.png and results.json."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        sizes = ("steps", "batch_size", "channels", "hidden")
        options.require(self, options.AT_LEAST_ONE, *sizes)
        options.require(self, options.FRACTION, "momentum")
        options.require(self, options.NOT_NEGATIVE, "weight_decay")

    def run(self) -> None:
        """Train at each rate and write the results.

        Raises:
          DataError: If CIFAR-10 is not there, or its files are bad.
          ResumeError: If it cannot go on from what there is.
        """
        console = Console()
        dataset = cifar.CIFAR10.load(self.data_dir, self.download)
        dataset.check_batch_size(self.batch_size)
        console.print(f"Data: {dataset}", highlight=False, soft_wrap=True)

        runs = _train_all(self, dataset.standardised(), console)
        decay = f"weight decay {self.weight_decay:g}" if self.weight_decay else "no weight decay"
        title = (
            f"LeNet on {dataset.name}\n"
            f"{self.steps:,} steps with batches of {self.batch_size}, {decay}"
        )
        report.print_table(console, title, _table(runs))
        measured = min(MEASURED, len(dataset.train.labels))
        report.plot(self.output / "lenet.png", title, _panels(runs, measured))
        results = [
            {"method": run.method, "learning_rate": run.rate} | run.history.summary()
            for run in runs
        ]
        self.write(console, "lenet.png", dataset, measured, results)


class Run(NamedTuple):
    """One method at one learning rate."""

    method: str
    rate: float
    history: History


def _train_all(settings: LeNet, dataset: Dataset, console: Console) -> list[Run]:
    """Train by both methods at each rate."""
    model = models.LeNet(settings.channels, settings.hidden, dataset.classes)
    images, labels = dataset.train
    start = initialise(model, settings.seed, images)
    loss_fn = cross_entropy(model, train=True)
    few = slice(settings.batch_size)
    plan = cqjax.plan(loss_fn, batch_size=settings.batch_size)(*start, images[few], labels[few])

    def method(name: str, rate: float) -> Method:
        momentum, decay = (settings.momentum, settings.nesterov), settings.weight_decay
        if name == "sgd":
            tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, *momentum))
        else:
            tx = cqjax.back_matching_sgd(rate, *momentum, decay, plan=plan)
        return Method(f"{LABELS[name]} {rate:g}", tx, gradient_step(loss_fn, tx))

    pools = POOLS if settings.rates == "all" else {name: (rate,) for name, rate in PAPER.items()}
    pairs = [(name, rate) for name, pool in pools.items() for rate in pool]
    metrics = {
        "train_loss": mean_loss(model, images[:MEASURED], labels[:MEASURED]),
        "test_accuracy": accuracy(model, *dataset.test),
    }
    methods = [method(*pair) for pair in pairs]
    examples = jnp.asarray(images), jnp.asarray(labels)
    batches = shuffled_batches(settings.seed, len(labels), settings.batch_size, settings.steps)
    with settings.session(dataset) as session:
        histories = compare(console, session, methods, start, examples, batches, metrics)
    return [Run(*pair, history) for pair, history in zip(pairs, histories, strict=True)]


def _best(runs: Sequence[Run], metric: str) -> list[Run]:
    """For each method the run that ended with the lowest training loss, or the highest accuracy."""
    sign = -1 if metric == "test_accuracy" else 1

    def badness(run: Run) -> float:
        value = sign * run.history.last(metric)
        return math.inf if math.isnan(value) else value

    return [min((run for run in runs if run.method == name), key=badness) for name in LABELS]


def _table(runs: Sequence[Run]) -> list[dict[str, str]]:
    by_loss, by_accuracy = _best(runs, "train_loss"), _best(runs, "test_accuracy")
    rows, several = [], len(runs) > len(PAPER)
    for run in runs:
        chosen = {
            "the paper": run.rate == PAPER[run.method],
            "loss": several and run in by_loss,
            "accuracy": several and run in by_accuracy,
        }
        row = {
            "method": LABELS[run.method],
            "rate": f"{run.rate:g}",
            "seconds": f"{run.history.train_seconds:.1f}",
            "training\nloss": f"{run.history.last('train_loss'):.4f}",
            "test\naccuracy": f"{run.history.last('test_accuracy'):.2%}",
            "chosen by": ", ".join(name for name in chosen if chosen[name]),
        }
        rows.append(row)
    return rows


def _panels(runs: Sequence[Run], measured: int) -> list[list[report.Panel]]:
    """Training loss and test error: at the paper's rates, and at the best by that measure."""

    def panel(metric: str, runs: Sequence[Run], note: str) -> report.Panel:
        lines, is_loss = [], metric == "train_loss"
        for run, style in zip(runs, (0, 2), strict=True):
            curve, batches = run.history.metrics[metric], run.history.batch_loss
            values = curve.value if is_loss else [100 * (1 - value) for value in curve.value]
            trained = Curve(curve.step[1:], curve.seconds[1:], values[1:])
            label = f"{LABELS[run.method]}, rate {run.rate:g}"
            lines.append(report.Line(label, trained, style, batches if is_loss else None))
        if is_loss:
            note += ";\nfaint: batches, averaged"
        ylabel = f"training loss ({measured:,} images, log scale)" if is_loss else "test error, %"
        return report.Panel(lines, ylabel, note, log=is_loss)

    paper = [run for run in runs if run.rate == PAPER[run.method]]
    rows = []
    for metric in ("train_loss", "test_accuracy"):
        row = [panel(metric, paper, "the paper's rates")]
        if len(runs) > len(paper):
            row.append(panel(metric, _best(runs, metric), "each method's best rate here"))
        rows.append(row)
    return rows
