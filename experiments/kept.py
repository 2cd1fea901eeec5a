"""Why a kept inverse loses: a language model, trained by C-Adam with inverses of other rows.

The question is this library's own. The page is `experiments.pages.kept`, and the methods are in
`experiments.kept_methods`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console

import cqjax
from experiments import kept_methods, options
from experiments.data import DataError
from experiments.everyday import sources
from experiments.page import publish
from experiments.scans import stages, timed

CHARACTERS = 1_000_000  # of source code, of which the last tenth is for validation
WIDTH, HEADS, LENGTH = 64, 4, 64
METHODS = ("Adam", *kept_methods.METHODS)
PRESETS = options.presets(
    steps=(4, 100, 300),
    seeds=(1, 3, 3),
    sequences=(4, 16, 16),
    blocks=(1, 2, 2),
    every=(2, 10, 10),
    methods=(("Adam", "exact", "kept"), METHODS, METHODS),
)


@dataclass(frozen=True)
class Kept:
    """Train a language model by C-Adam, with inverses of this batch, of others, and of mixtures.

    A transformer learns the characters of Python's standard library. All methods have the same
    weights at the start and the same batches. They differ in the rows whose inverse multiplies the
    gradient.
    """

    preset: options.Preset = "cpu"
    """smoke for tests, cpu, or paper for a longer run (the question has no source)."""
    steps: int | None = None
    """Steps of each run. By default the preset's."""
    seeds: int | None = None
    """How many draws of weights and batches. By default the preset's."""
    sequences: int | None = None
    """Sequences of 64 characters in a batch. By default the preset's."""
    methods: tuple[str, ...] | None = None
    """What to train by, Adam and exact among them. By default all."""
    blocks: int | None = None
    """Blocks of the transformer. By default the preset's."""
    every: int | None = None
    """Steps from one kept inverse to the next. By default the preset's."""
    decay: float = 0.9
    """Of the moving averages."""
    sketch: int = 32
    """Rows that a batch's rows are summed up to, to be added to a kept inverse."""
    damping: float = 0.1
    """The damping, in units of the mean eigenvalue: `relative_damping`."""
    rate: float = 0.01
    """The highest learning rate, of all methods."""
    output: Path = Path("results/kept")
    """Folder for README.md, losses.png and results.json."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        counts = "steps", "seeds", "sequences", "blocks", "every", "sketch"
        options.require(self, options.AT_LEAST_ONE, *counts)
        options.require(self, options.FRACTION, "decay")
        options.require(self, options.POSITIVE, "damping", "rate")
        options.require_distinct(self, "methods", "Adam", "exact")
        if unknown := [name for name in self.methods or () if name not in METHODS]:
            raise ValueError(f"--methods has no {unknown[0]}; there are {', '.join(METHODS)}")

    def run(self) -> None:
        """Train by every method, and say which of them keep the gain."""
        settings, console = options.filled(self, PRESETS), Console()
        assert settings.methods
        training, validation = text()
        runs = [
            {"method": name, **_train(settings, name, training, validation)}
            for (name,) in stages(console, [(name,) for name in settings.methods])
        ]
        results = {"characters": len(training) + len(validation), "runs": runs}
        publish("kept", self, settings, results, console)


def text() -> tuple[np.ndarray, np.ndarray]:
    """Characters of Python's standard library, as numbers: those to train on, and the others.

    Raises:
      DataError: If this Python has no sources.
    """
    symbols = sources.text(CHARACTERS)
    if len(symbols) < CHARACTERS:
        raise DataError(f"expected a megabyte of Python sources, found {len(symbols):,} characters")
    cut = len(symbols) * 9 // 10
    return symbols[:cut], symbols[cut:]


def sequences(characters: np.ndarray, seed: int, *shape: int) -> np.ndarray:
    """Parts of the text, `(*shape, LENGTH + 1)`, from random places."""
    starts = np.random.default_rng(seed).integers(len(characters) - LENGTH, size=shape)
    return characters[starts[..., None] + np.arange(LENGTH + 1)]


def initial(key: jax.Array, blocks: int) -> dict[str, Any]:
    """The parameters of a transformer."""

    def normal(scale: float, *shape: int) -> jax.Array:
        nonlocal key
        key, own = jax.random.split(key)
        return scale * jax.random.normal(own, shape)

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)}

    def block() -> dict[str, Any]:
        return {
            "attention": norm(),
            "qkv": normal(WIDTH**-0.5, WIDTH, 3 * WIDTH),
            "out": normal(0.5 * WIDTH**-0.5, WIDTH, WIDTH),
            "mlp": norm(),
            "up": normal(WIDTH**-0.5, WIDTH, 4 * WIDTH),
            "down": normal(0.25 * WIDTH**-0.5, 4 * WIDTH, WIDTH),
        }

    return {
        "characters": normal(0.5, sources.SYMBOLS, WIDTH),
        "positions": normal(0.1, LENGTH, WIDTH),
        "blocks": [block() for _ in range(blocks)],
        "norm": norm(),
        "head": normal(WIDTH**-0.5, WIDTH, sources.SYMBOLS),
    }


def loss_fn(params: dict[str, Any], characters: jax.Array) -> jax.Array:
    """The cross-entropy of each next character, its mean over all `(sequences, LENGTH)`."""
    x = params["characters"][characters[:, :-1]] + params["positions"]
    for block in params["blocks"]:
        x += _attention(_normalised(x, block["attention"]) @ block["qkv"]) @ block["out"]
        x += jax.nn.gelu(_normalised(x, block["mlp"]) @ block["up"]) @ block["down"]
    logits = _normalised(x, params["norm"]) @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, characters[:, 1:])
    return losses.mean()


def _normalised(x: jax.Array, norm: dict[str, jax.Array]) -> jax.Array:
    x -= x.mean(-1, keepdims=True)
    x *= lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    return x * norm["scale"] + norm["shift"]


def _attention(qkv: jax.Array) -> jax.Array:
    """Causal attention of the heads, from their queries, keys and values side by side."""
    q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, HEADS, -1), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tri(LENGTH, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(*qkv.shape[:2], -1)


def _train(settings: Kept, method: str, training: np.ndarray, held_out: np.ndarray) -> Any:
    """One method's losses, for all seeds."""
    assert settings.steps and settings.seeds and settings.sequences
    assert settings.blocks and settings.every
    steps, terms = settings.steps, settings.sequences * LENGTH
    shape, seeds = (steps, settings.sequences), range(settings.seeds)
    batches = np.stack([sequences(training, seed, *shape) for seed in seeds])
    others = np.stack([sequences(training, 1000 + seed, *shape) for seed in seeds])
    validation = jnp.asarray(sequences(held_out, 0, 8, settings.sequences))
    rate = optax.warmup_cosine_decay_schedule(
        0, settings.rate, max(1, steps // 10), steps, settings.rate / 20
    )
    differentiate = cqjax.value_and_grad(loss_fn, capture=cqjax.Rows, batch_size=terms)
    plan = differentiate.plan(initial(jax.random.key(0), settings.blocks), batches[0, 0])
    optimizer = optax.adam(rate)
    if method != "Adam":
        optimizer = optax.chain(kept_methods.scale_by_method(method, settings, plan), optimizer)
    optimizer: Any = optax.with_extra_args_support(optimizer)

    def step(carry: Any, batches: Any) -> Any:
        params, state = carry
        loss, grads, captures = differentiate(params, batches[0])
        other = None
        if method in kept_methods.OF_OTHERS:
            other = differentiate(params, batches[1])[2]
        updates, state = optimizer.update(grads, state, params, captures=(captures, other))
        found = {} if method == "Adam" else state[0].measured
        return (optax.apply_updates(params, updates), state), (loss, found)

    def run(arguments: Any) -> Any:
        key, *batches = arguments
        params = initial(key, settings.blocks or 1)
        (params, _), (losses, found) = lax.scan(step, (params, optimizer.init(params)), batches)
        return losses, found, lax.map(lambda batch: loss_fn(params, batch), validation).mean()

    keys = jax.vmap(jax.random.key)(jnp.arange(settings.seeds))
    timing = timed(lambda *arguments: lax.map(run, arguments), keys, batches, others)
    losses, found, on_others = timing.result
    tail = max(1, steps // 10)
    blocks = [block for block in plan.blocks if block.name in found]
    sizes = [(block.rows, block.features, block.outputs) for block in blocks]
    # Kept inverses are measured when they are oldest, just before their turn; the first are left
    # out, when the rate is still low.
    oldest = slice(settings.every * (-(-tail // settings.every) + 1) - 1, None, settings.every)
    return {
        "losses": np.float64(losses).tolist(),
        "final": losses[:, -tail:].mean(1).tolist(),
        "validation": on_others.tolist(),
        "cost": sum(kept_methods.flops(method, settings, *size) for size in sizes),
        "measured": {
            label: np.median(values[:, oldest], axis=(0, 1)).tolist()
            for label, values in found.items()
            if values[:, oldest].size
        },
        "seconds": timing.seconds / settings.seeds / steps,
        "compile_seconds": timing.compile_seconds,
    }
