"""The six kinds of work: what is learnt, by which network and loss, and for how long."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.classification import LossFn, correct, cross_entropies, initialise, mean_over_batch
from experiments.contest import Parts, Task, held_out
from experiments.data import Dataset, Split
from experiments.everyday import networks, sources


class Work(NamedTuple):
    """A kind of work."""

    title: str
    task: Task
    loss_fn: LossFn
    batch_size: int
    terms: int
    """How many terms the loss of a batch averages over: N, cqjax's `batch_size=`."""
    steps: int
    """Steps of a run in the preset cpu."""


class Size(NamedTuple):
    """How large the work is."""

    narrower: int = 1
    """Widths are divided by it."""
    characters: int = 1_500_000
    rows: int = 4000
    side: int = 128
    """Of the picture, in pixels."""
    evaluated: int = 1000
    """Validate and test on so many examples; of texts, an eighth."""


def pixel_losses(logits: jax.Array, pixels: jax.Array) -> jax.Array:
    """The cross-entropy of each image's pixels in [0, 1], summed."""
    return optax.sigmoid_binary_cross_entropy(logits, pixels).sum(axis=-1)


def pixel_errors(logits: jax.Array, pixels: jax.Array) -> jax.Array:
    """The mean squared error of each image's pixels."""
    return ((jax.nn.sigmoid(logits) - pixels) ** 2).mean(axis=-1)


def squared_errors(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The squared error of each example, summed over the outputs."""
    return ((outputs - targets) ** 2).sum(axis=-1)


def language(size: Size, dataset: Dataset) -> Work:
    """A transformer that continues Python's sources, character by character."""
    parts = sources.sequences(size.characters, length=64)
    width = max(8, 64 // size.narrower)
    model = networks.Language(sources.SYMBOLS, width, 2 if size.narrower == 1 else 1)
    few = parts.evaluated(size.evaluated // 8)
    return _work("language", few, model, 16, steps=300, terms=16 * 64)


def autoencoder(size: Size, dataset: Dataset) -> Work:
    """A deep autoencoder of the images' pixels."""

    def flat(part: Split) -> Split:
        pixels = part.images.reshape(len(part.images), -1)
        return Split(pixels, pixels)

    parts = Parts(*map(flat, held_out(dataset))).evaluated(size.evaluated)
    widths = tuple(width // size.narrower for width in (256, 128, 64))
    model = networks.Autoencoder(widths, max(4, 16 // size.narrower))
    return _work(
        "autoencoder",
        parts,
        model,
        128,
        steps=300,
        losses=pixel_losses,
        score="test_error",
        scores=pixel_errors,
    )


def cnn(size: Size, dataset: Dataset) -> Work:
    """Convolutions with batch normalisation, on small images."""
    pictures = dataset.pictures(1)
    by = 2 if min(pictures.train.images.shape[1:3]) > 16 else 1
    parts = held_out(pictures.shrunk(by)).evaluated(size.evaluated)
    channels = tuple(max(2, number // size.narrower) for number in (16, 16, 32, 32))
    model = networks.ConvNet(channels, 64 // size.narrower, dataset.classes)
    return _work("cnn", parts, model, 64, steps=300, call={"train": True})


def coordinates(size: Size, dataset: Dataset) -> Work:
    """A picture's colours as a function of the place, from Fourier features."""
    parts = sources.pixels(size.side).evaluated(size.evaluated)
    model = networks.Coordinates(128 // size.narrower, width=128 // size.narrower)
    return _squares("coordinates", parts, model, 512 // size.narrower, 500)


def tabular(size: Size, dataset: Dataset) -> Work:
    """A regression on a few thousand rows of heavy-tailed, correlated features."""
    parts = sources.table(size.rows)
    return _squares("tabular", parts, networks.Dense(128 // size.narrower, 3, 1), 64, 1000)


def mlp(size: Size, dataset: Dataset) -> Work:
    """Hidden layers of ReLUs on raw pixels, without normalisation."""
    parts = held_out(dataset).evaluated(size.evaluated)
    model = networks.Dense(256 // size.narrower, 4, dataset.classes)
    return _work("mlp", parts, model, 32, steps=600)


def _squares(title: str, parts: Parts, model: Any, batch_size: int, steps: int) -> Work:
    """A regression."""
    return _work(
        title,
        parts,
        model,
        batch_size,
        steps=steps,
        losses=squared_errors,
        score="test_error",
        scores=squared_errors,
    )


def _work(
    title: str,
    parts: Parts,
    model: Any,
    batch_size: int,
    *,
    steps: int,
    terms: int | None = None,
    losses: Any = cross_entropies,
    score: str = "test_accuracy",
    scores: Any = correct,
    call: Any = None,
) -> Work:
    first = jnp.asarray(parts.train.images[:1])
    start = lambda seed: initialise(model, seed, first)  # noqa: E731
    task = Task(parts, model, start, losses=losses, score=score, scores=scores)
    loss_fn = mean_over_batch(model, losses, **(call or {}))
    return Work(title, task, loss_fn, batch_size, terms or batch_size, steps)


ALL: dict[str, Callable[[Size, Dataset], Work]] = {
    work.__name__: work for work in (language, autoencoder, cnn, coordinates, tabular, mlp)
}
