"""The six kinds of work: what is learnt, by which network and loss, and for how long."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from experiments.classification import (
    Each,
    LossFn,
    correct,
    cross_entropies,
    initialise,
    mean_over_batch,
)
from experiments.contest import Parts, Task, held_out
from experiments.data import Dataset, Split
from experiments.everyday import networks, sources


class Pace(NamedTuple):
    """How much is learnt at once, and how often."""

    batch_size: int
    steps: int
    """Steps of a run."""
    terms: int = 1
    """How many terms each example adds to the loss's mean."""


class Work(NamedTuple):
    """A kind of work."""

    task: Task
    loss_fn: LossFn
    pace: Pace
    rule: Mapping[str, Any] = {}
    """Settings of Adam's rule, for all who have one. The default is Optax's."""

    @property
    def terms(self) -> int:
        """How many terms the loss of a batch averages over: N, cqjax's `batch_size=`."""
        return self.pace.batch_size * self.pace.terms


class Size(NamedTuple):
    """How large the work is."""

    length: float = 1.0
    """The usual numbers of steps are multiplied by it."""
    narrower: int = 1
    """Widths are divided by it."""
    characters: int = 1_500_000
    """Length of the text."""
    side: int = 128
    """Rows and columns of the picture."""
    rows: int = 4000
    """Rows of the table."""
    evaluated: int = 1000
    """Validate and test on so many examples."""


LENGTH = 64  # of a piece of text
PACES = {
    "language": Pace(16, 300, LENGTH),
    "autoencoder": Pace(128, 300),
    "cnn": Pace(64, 300),
    "coordinates": Pace(512, 500),
    "tabular": Pace(64, 1000),
    "mlp": Pace(32, 500),
}


def pace(kind: str, length: float) -> Pace:
    """The pace of a kind of work, with so many times the usual steps."""
    usual = PACES[kind]
    return usual._replace(steps=max(2, round(length * usual.steps)))


def examples(kind: str, number: int) -> int:
    """So many examples; of texts fewer, since one of them is many terms."""
    return max(1, number // 16) if kind == "language" else number


def pixel_losses(logits: jax.Array, pixels: jax.Array) -> jax.Array:
    """The cross-entropy of each image's pixels in [0, 1], summed."""
    return optax.sigmoid_binary_cross_entropy(logits, pixels).sum(axis=-1)


def pixel_errors(logits: jax.Array, pixels: jax.Array) -> jax.Array:
    """The mean squared error of each image's pixels."""
    return ((jax.nn.sigmoid(logits) - pixels) ** 2).mean(axis=-1)


def squares(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The squared error of each example, summed over the outputs."""
    return ((outputs - targets) ** 2).sum(axis=-1)


def language(size: Size, dataset: Dataset) -> Work:
    """A transformer that continues Python's sources, character by character."""
    parts = sources.sequences(size.characters, LENGTH)
    width, blocks = max(8, 64 // size.narrower), 2 if size.narrower == 1 else 1
    return _work(size, "language", parts, networks.Language(sources.SYMBOLS, width, blocks))


def autoencoder(size: Size, dataset: Dataset) -> Work:
    """A deep autoencoder of the images' pixels."""

    def flat(part: Split) -> Split:
        pixels = part.images.reshape(len(part.images), -1)
        return Split(pixels, pixels)

    parts = Parts(*map(flat, held_out(dataset)))
    widths = tuple(width // size.narrower for width in (256, 128, 64))
    model = networks.Autoencoder(widths, max(4, 16 // size.narrower))
    return _work(size, "autoencoder", parts, model, pixel_losses, pixel_errors)


def cnn(size: Size, dataset: Dataset) -> Work:
    """Convolutions with batch normalisation, on small images."""
    pictures = dataset.pictures(1)
    by = 2 if min(pictures.train.images.shape[1:3]) > 16 else 1
    channels = tuple(max(2, number // size.narrower) for number in (8, 16, 16, 32))
    model = networks.ConvNet(channels, 64 // size.narrower, dataset.classes)
    return _work(size, "cnn", held_out(pictures.shrunk(by)), model, train=True)


def coordinates(size: Size, dataset: Dataset) -> Work:
    """A picture's colours as a function of the place, from Fourier features."""
    width = 128 // size.narrower
    model = networks.Coordinates(width, width=width)
    return _work(size, "coordinates", sources.pixels(size.side), model, squares, squares)


def tabular(size: Size, dataset: Dataset) -> Work:
    """A regression on a few thousand rows of heavy-tailed, correlated features."""
    model = networks.Dense(128 // size.narrower, 3, 1)
    return _work(size, "tabular", sources.table(size.rows), model, squares, squares)


def mlp(size: Size, dataset: Dataset) -> Work:
    """Hidden layers of ReLUs on raw pixels, without normalisation."""
    model = networks.Dense(256 // size.narrower, 4, dataset.classes)
    return _work(size, "mlp", held_out(dataset), model)


def _work(
    size: Size,
    kind: str,
    parts: Parts,
    model: Any,
    losses: Each = cross_entropies,
    scores: Each = correct,
    **call: Any,
) -> Work:
    def start(seed: int) -> tuple[Any, Any]:
        return initialise(model, seed, parts.train.images)

    task = Task(
        parts.evaluated(examples(kind, size.evaluated)),
        model,
        start,
        losses=losses,
        score="test_accuracy" if scores is correct else "test_error",
        scores=scores,
    )
    return Work(task, mean_over_batch(model, losses, **call), pace(kind, size.length))


ALL: dict[str, Callable[[Size, Dataset], Work]] = {
    make.__name__: make for make in (language, autoencoder, cnn, coordinates, tabular, mlp)
}
