"""SGD, Adam, C-SGD and C-Adam train the network of Paeedeh and Ghiasi-Shirazi, section 5.3."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax
from rich.console import Console

import cqjax
from experiments import data, drawing, options, report
from experiments.classification import accuracy, cross_entropy, initialise, mean_loss
from experiments.experiment import Experiment
from experiments.history import History
from experiments.models import MLP
from experiments.runs import Runs
from experiments.training import capturing_step, gradient_step, shuffled_batches

DEFAULTS = {  # one epoch; five epochs. The rates are the best of those tried for each optimizer
    "Fashion-MNIST": {
        "steps": 1250,
        "sgd_learning_rate": 0.03,
        "adam_learning_rate": 1e-4,
        "csgd_learning_rate": 0.05,
        "cadam_learning_rate": 1e-4,
    },
    "digits": {
        "steps": 225,
        "sgd_learning_rate": 0.05,
        "adam_learning_rate": 2e-4,
        "csgd_learning_rate": 0.2,
        "cadam_learning_rate": 3e-4,
    },
}
MEASURED = 5_000  # the training loss is measured on the first so many training images
LABELS = {"sgd": "SGD", "adam": "Adam", "csgd": "C-SGD", "cadam": "C-Adam"}
# Paul Tol's high-contrast colours and black: told apart by colour-blind readers and in grey.
STYLES = (("#004488", "o"), ("#DDAA33", "s"), ("#BB5566", "^"), ("#000000", "D"))
AGAINST = {"step": "steps", "seconds": "training time in seconds, without compilation"}


@dataclass(frozen=True)
class Quickstart(Experiment):
    """Train the paper's fully-connected network by SGD, Adam, C-SGD and C-Adam.

    All start from the same weights and see the same batches. The data are Fashion-MNIST if its
    files are found, and otherwise the digits that come with scikit-learn. The files are looked for
    in --data-dir. Without it, the places are the folder that the variable CQJAX_DATA_DIR names, the
    folder of Debian's dataset-fashion-mnist, and the download cache. The results are a table, a
    figure in losses.png, and every number in results.json. During the run, the metrics go to
    metrics.jsonl.
    """

    optimizers: tuple[Literal["sgd", "adam", "csgd", "cadam"], ...] = (
        "sgd",
        "adam",
        "csgd",
        "cadam",
    )
    """The optimizers to run, in this order."""
    steps: int | None = None
    """Training steps; 1,250 on Fashion-MNIST and 225 on digits (five epochs) if not given."""
    batch_size: int = 32
    """Images of a batch."""
    width: int = 800
    """Neurons of a hidden layer."""
    depth: int = 8
    """Number of hidden layers."""
    sgd_learning_rate: float | None = None
    """SGD's learning rate; 0.03 on Fashion-MNIST and 0.05 on digits if not given."""
    adam_learning_rate: float | None = None
    """Adam's learning rate; 1e-4 on Fashion-MNIST and 2e-4 on digits if not given."""
    csgd_learning_rate: float | None = None
    """C-SGD's learning rate, the part of the virtual error that a step removes; 0.05 on
    Fashion-MNIST and 0.2 on digits if not given."""
    damping: float = 1e-3
    """C-SGD's damping, lambda in the paper's Eq. 63. C-Adam has the library's defaults."""
    cadam_learning_rate: float | None = None
    """C-Adam's learning rate; 1e-4 on Fashion-MNIST and 3e-4 on digits if not given."""
    dataset: data.DatasetName = "auto"
    """The data set. auto is Fashion-MNIST if its files are found, and digits otherwise."""
    data_dir: Path | None = None
    """Folder of Fashion-MNIST's four official files, gzipped or not."""
    download: bool = False
    """Fetch Fashion-MNIST's files (30 MB) if they are not found, into --data-dir or the cache."""
    output: Path = Path("results/quickstart")
    """Folder for losses.png and results.json."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "steps", "batch_size", "width", "depth")
        rates = (f"{name}_learning_rate" for name in LABELS)
        options.require(self, options.POSITIVE, *rates, "damping")
        options.require_distinct(self, "optimizers")
        if self.dataset == "digits" and (self.data_dir or self.download):
            raise ValueError("--data-dir and --download are for Fashion-MNIST, not for digits")

    def run(self) -> None:
        """Train by each optimizer and write the results.

        Raises:
          DataError: If there is no such data set, or its files are bad.
          ResumeError: If an earlier session cannot be resumed.
        """
        console = Console()
        dataset = data.load(self.dataset, self.data_dir, self.download)
        dataset.check_batch_size(self.batch_size)
        console.print(f"Data: {dataset}", highlight=False, soft_wrap=True)
        if dataset.name == "digits" and self.dataset == "auto":
            console.print("Fashion-MNIST was not found; --download fetches it")

        defaults = DEFAULTS[dataset.name].items()
        settings = replace(self, **{k: v for k, v in defaults if getattr(self, k) is None})
        histories = _train_all(settings, dataset, console)
        results = _summaries(histories)
        batches = f"batches of {self.batch_size}"
        report.print_table(console, f"{dataset.name}, {batches}", _rows(results))
        measured = min(MEASURED, len(dataset.train.labels))
        lines = {
            f"{LABELS[name]}, rate {getattr(settings, f'{name}_learning_rate'):g}": its
            for name, its in histories.items()
        }
        title = f"{dataset.name}: {self.depth} hidden layers of {self.width}, {batches}"
        _draw(self.output / "losses.png", title, measured, lines)
        content = {
            "experiment": "quickstart",
            "dataset": dataset.summary() | {"images_for_training_loss": measured},
            "settings": asdict(settings),
            "environment": report.environment(),
            "results": results,
        }
        report.write_json(self.output / "results.json", content)
        written = f"Written: {self.output}/losses.png and {self.output}/results.json"
        console.print(written, highlight=False, soft_wrap=True)


def _train_all(settings: Quickstart, dataset: data.Dataset, console: Console) -> dict[str, History]:
    """Train by each optimizer."""
    assert settings.steps and settings.sgd_learning_rate
    assert settings.adam_learning_rate and settings.csgd_learning_rate
    assert settings.cadam_learning_rate
    model = MLP(settings.width, settings.depth, dataset.classes)
    images, labels = dataset.train
    loss_fn = cross_entropy(model)
    sgd, adam = optax.sgd(settings.sgd_learning_rate), optax.adam(settings.adam_learning_rate)
    csgd = cqjax.csgd(
        settings.csgd_learning_rate, damping=settings.damping, relative_damping=0.0, max_change=None
    )
    cadam = cqjax.cadam(settings.cadam_learning_rate)
    methods = {
        "sgd": (sgd, gradient_step(loss_fn, sgd)),
        "adam": (adam, gradient_step(loss_fn, adam)),
        "csgd": (csgd, capturing_step(loss_fn, csgd)),
        "cadam": (cadam, capturing_step(loss_fn, cadam)),
    }
    start = initialise(model, settings.seed, images)
    examples = jnp.asarray(images), jnp.asarray(labels)
    batches = shuffled_batches(settings.seed, len(labels), settings.batch_size, settings.steps)
    watched = {"train_loss": mean_loss(model, images[:MEASURED], labels[:MEASURED])}
    at_end = {"test_accuracy": accuracy(model, *dataset.test)}
    names = settings.optimizers
    with Runs(console, settings.session(dataset), [settings.steps] * len(names)) as runs:
        return {
            name: runs.train(
                LABELS[name], *methods[name], start, examples, batches, watched, at_end
            )
            for name in names
        }


def _summaries(histories: Mapping[str, History]) -> dict[str, dict[str, Any]]:
    """The numbers of each optimizer for the JSON file."""
    target = histories["sgd"].last("train_loss") if "sgd" in histories else None
    results = {name: history.summary() for name, history in histories.items()}
    if target is not None:
        for name, history in histories.items():
            reached = history.metrics["train_loss"].first_at_most(target)
            reached = reached and {"step": reached[0], "seconds": reached[1]}
            results[name]["reaches_sgd_loss"] = reached
    return results


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row of the table for each optimizer."""
    return [_row(LABELS[name], result) for name, result in results.items()]


def _row(label: str, result: Mapping[str, Any]) -> dict[str, str]:
    row = {
        "optimizer": label,
        "steps": f"{result['steps']:,}",
        "seconds": f"{result['seconds']:.1f}",
        "with\ncompiling": f"{result['seconds_with_compilation']:.1f}",
        "training\nloss": f"{result['train_loss']:.4f}",
        "test\naccuracy": f"{result['test_accuracy']:.2%}",
    }
    if "reaches_sgd_loss" in result:
        reached = result["reaches_sgd_loss"]
        row["SGD's final loss\nreached after"] = (
            f"{reached['step']:,} steps, {reached['seconds']:.1f} s" if reached else "not reached"
        )
    return row


def _draw(path: Path, title: str, images: int, lines: Mapping[str, History]) -> None:
    """Draw the training loss, by steps and by seconds.

    Args:
      path: The file.
      title: The title of the figure.
      images: How many images the training loss is measured on.
      lines: The history of each training run, by the label of its line.
    """
    figure, panels = drawing.panels(1, 2, (5.5, 4.8))
    for axes, (against, words) in zip(panels, AGAINST.items(), strict=True):
        for (label, history), (colour, marker) in zip(lines.items(), STYLES, strict=False):
            faint, curve = history.batch_loss, history.metrics["train_loss"]
            axes.plot(getattr(faint, against), faint.value, color=colour, alpha=0.3, linewidth=1)
            line = {"color": colour, "marker": marker, "markersize": 4.5, "label": label}
            axes.plot(getattr(curve, against), curve.value, **line)
        axes.set(xlim=(0, None), xlabel=words)
        drawing.logarithmic(axes)
    first, second = panels
    second.sharey(first)
    second.tick_params(labelleft=False)
    first.set_ylabel("training loss (cross-entropy, log scale)")
    note = f"{images:,} training images;\nfaint: batches, averaged"
    first.legend(title=note, title_fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
