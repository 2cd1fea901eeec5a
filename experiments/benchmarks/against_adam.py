"""What C-Adam's step and its compilation cost, in those of Adam, on networks that people train."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from rich.progress import track

import cqjax
from experiments.benchmarks import timing
from experiments.benchmarks.bars import Bar, Result, Table, number, spread
from experiments.benchmarks.networks import ActorCritic, ScannedLanguage
from experiments.classification import LossFn, cross_entropies, initialise, mean_over_batch
from experiments.everyday import networks
from experiments.everyday.work import pixel_losses, squares
from experiments.models import MLP, ResNet, TransformerBlock
from experiments.training import capturing_step, gradient_step

SYMBOLS = 96


class Work(NamedTuple):
    """A network's loss, its first weights and a batch."""

    loss_fn: LossFn
    start: tuple[Any, Any]
    batch: tuple[jax.Array, jax.Array]


class Row(NamedTuple):
    """What is measured, and what it may cost, in units of Adam's."""

    make: Callable[[], Work]
    compiling: float | None = None
    """Trace, lower and compile, in seconds of the processor."""
    step: float | None = None
    """A step; None if none is timed."""


def images(model: Any, *shape: int, **call: Any) -> Work:
    """Cross-entropy on random images."""
    inputs = jax.random.uniform(jax.random.key(0), shape)
    labels = jax.random.randint(jax.random.key(1), shape[:1], 0, 10)
    return _work(model, mean_over_batch(model, cross_entropies, **call), inputs, labels)


def texts(model: Any, *shape: int) -> Work:
    """Cross-entropy on random texts."""
    inputs, labels = jax.random.randint(jax.random.key(0), (2, *shape), 0, SYMBOLS)
    return _work(model, mean_over_batch(model, cross_entropies), inputs, labels)


def pixels(model: Any, *shape: int) -> Work:
    """An autoencoder of random pixels."""
    inputs = jax.random.uniform(jax.random.key(0), shape)
    return _work(model, mean_over_batch(model, pixel_losses), inputs, inputs)


def distances(model: Any, *shape: int) -> Work:
    """Squared distances to random targets."""
    inputs, targets = jax.random.normal(jax.random.key(0), (2, *shape))
    return _work(model, mean_over_batch(model, squares), inputs, targets)


def screens(model: Any, *shape: int) -> Work:
    """A policy's gradient and a value's squared error, at random advantages."""
    inputs = jax.random.uniform(jax.random.key(0), shape)
    targets = jax.random.normal(jax.random.key(1), shape[:1])

    def losses(outputs: Any, targets: jax.Array) -> jax.Array:
        logits, values = outputs
        chosen = jax.nn.log_softmax(logits)[:, 0]
        return -chosen * targets + 0.5 * (values - targets) ** 2

    return _work(model, mean_over_batch(model, losses), inputs, targets)


def _work(model: Any, loss_fn: LossFn, inputs: jax.Array, targets: jax.Array) -> Work:
    start = jax.jit(partial(initialise, model, 2))(inputs)
    return Work(loss_fn, start, (inputs, targets))


def _language(blocks: int, width: int = 128, scanned: bool = False) -> Any:
    kind = ScannedLanguage if scanned else networks.Language
    return kind(SYMBOLS, width, blocks)


def _cnn(*channels: int) -> Any:
    return networks.ConvNet(channels)


ROWS = {
    "MLP 784–8×800–10, batch 32": Row(lambda: images(MLP(800, 8, 10), 32, 784), compiling=2),
    "MLP 784–8×800–10, batch 512": Row(lambda: images(MLP(800, 8, 10), 512, 784), step=1.6),
    "MLP 784–4×256–10, batch 256": Row(
        lambda: images(networks.Dense(256, 4, 10), 256, 784), step=1.5
    ),
    "autoencoder 784–1000–500–250–30, batch 128": Row(
        lambda: pixels(networks.Autoencoder((1000, 500, 250), 30), 128, 784), step=1.2
    ),
    "ResNet-20, batch 128": Row(
        lambda: images(ResNet(20), 128, 32, 32, 3, train=True), compiling=3
    ),
    "five convolutions, 16 to 64 channels, batch 64": Row(
        lambda: images(_cnn(16, 16, 32, 32, 64), 64, 28, 28, 1, train=True), compiling=3
    ),
    "convolutions of 24 to 64 channels, batch 64": Row(
        lambda: images(_cnn(24, 32, 48, 64), 64, 28, 28, 1, train=True), step=1.5
    ),
    "actor and critic of Atari's screens, batch 64": Row(
        lambda: screens(ActorCritic(), 64, 84, 84, 4), compiling=4
    ),
    "language, d = 96, 2 layers, 1,024 tokens": Row(
        lambda: texts(_language(2, 96), 16, 64), step=1.25
    ),
    "language, d = 128, 4 layers": Row(lambda: texts(_language(4), 8, 64), compiling=2),
    "language, d = 128, 12 layers by nn.scan": Row(
        lambda: texts(_language(12, scanned=True), 8, 64), compiling=1.7
    ),
    "transformer block, d = 512, 4,096 tokens": Row(
        lambda: distances(TransformerBlock(8), 8, 512, 512), step=1.25
    ),
}

DEPTHS = (2, 6, 12)


def measure(name: str, effort: timing.Effort) -> Result:
    """Compile both steps of each row, and time those that have a bar for it, interleaved."""
    numbers, rows, bars = {}, [], []
    for title, row in track(ROWS.items(), description=name):
        found = _measured(row, effort)
        numbers[title] = found
        rows.append(_cells(title, found))
        for key, words in (("step", "a step"), ("compiling", "trace, lower and compile")):
            limit = getattr(row, key)
            if limit is not None:
                value = found[key]["median"] if key == "step" else found[key]
                bars.append(Bar(f"{title}: C-Adam to Adam, {words}", value, limit))
    return Result(numbers, [Table("C-Adam to Adam", rows)], bars)


def scale(name: str, effort: timing.Effort) -> Result:
    """Compile C-Adam's step for transformers of several depths, with and without `nn.scan`."""
    numbers, rows = {}, []
    cases = [(depth, scanned) for scanned in (False, True) for depth in DEPTHS]
    for depth, scanned in track(cases, description=name):
        work = texts(_language(depth, scanned=scanned), 8, 64)
        title = f"{depth} layers{' by nn.scan' if scanned else ''}"
        numbers[title] = _spent(work, effort)
        rows.append(_cells(title, numbers[title]))
    return Result(numbers, [Table("C-Adam to Adam, by depth", rows)], [])


def steppers(work: Work, effort: timing.Effort) -> Sequence[timing.Training]:
    """Training by Adam, and by C-Adam."""
    adam, ours = optax.adam(timing.RATE), cqjax.cadam(timing.RATE)
    steps = gradient_step(work.loss_fn, adam), capturing_step(work.loss_fn, ours)
    return [
        timing.Training(step, tx.init, work.start, work.batch, effort.compiles)
        for step, tx in zip(steps, (adam, ours), strict=True)
    ]


def _spent(work: Work, effort: timing.Effort) -> dict[str, Any]:
    return _compiling(steppers(work, effort))


def _compiling(steppers: Sequence[timing.Training]) -> dict[str, Any]:
    spent = [dict(stepper.program.processor_seconds) for stepper in steppers]
    adam, ours = (sum(each.values()) for each in spent)
    return {"compiling": ours / adam, "processor_seconds": {"Adam": spent[0], "C-Adam": spent[1]}}


def _measured(row: Row, effort: timing.Effort) -> dict[str, Any]:
    both = steppers(row.make(), effort)
    return _compiling(both) | (timed(both, effort) if row.step is not None else {})


def timed(both: Sequence[timing.Training], effort: timing.Effort) -> dict[str, Any]:
    """The times of Adam's and C-Adam's steps, and their ratio."""
    samples = {
        name: timing.planned(stepper, effort)
        for name, stepper in zip(("Adam", "C-Adam"), both, strict=True)
    }
    fewest = min(sample.number for sample in samples.values())
    samples = {name: sample._replace(number=fewest) for name, sample in samples.items()}
    seconds = timing.interleaved(samples)
    step = timing.summary(seconds["C-Adam"] / seconds["Adam"])
    return {
        "step": step,
        "seconds": {name: timing.summary(values) for name, values in seconds.items()},
    }


def _cells(title: str, found: dict[str, Any]) -> dict[str, str]:
    spent = found["processor_seconds"]
    cells = {
        "work": title,
        "step": spread(found["step"]) if "step" in found else "–",
        "compiling": number(found["compiling"]),
    }
    for phase in timing.PHASES:
        both = (spent[name][phase] for name in ("C-Adam", "Adam"))
        cells[f"{phase}, s"] = " / ".join(number(each) for each in both)
    return cells
