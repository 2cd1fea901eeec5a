"""Train by one optimizer over given batches, and time the training alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import cqjax

CHUNKS = 75  # parts of a run: the clock is read, and progress reported, after each
EVALUATE_EVERY = 5  # chunks

LossFn = Callable[[Any, jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
    """What a step changes."""

    params: Any
    opt_state: optax.OptState


Step = Callable[[State, jax.Array, jax.Array], tuple[State, jax.Array]]


@dataclass
class Curve:
    """A loss over the steps done and the seconds that they took."""

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def add(self, step: int, seconds: float, loss: float) -> None:
        """Append a point."""
        self.step.append(step)
        self.seconds.append(seconds)
        self.loss.append(loss)

    def first_at_most(self, loss: float) -> tuple[int, float] | None:
        """The step and the seconds of the first point that is no higher, if there is one."""
        points = zip(self.step, self.seconds, self.loss, strict=True)
        return next(((step, seconds) for step, seconds, value in points if value <= loss), None)


@dataclass
class History:
    """How a training run went. Seconds are of training alone: no compilation, no evaluation."""

    compile_seconds: float
    train_seconds: float = 0.0
    batch_loss: Curve = field(default_factory=Curve)
    """Means over the batches since the point before."""
    train_loss: Curve = field(default_factory=Curve)
    """On the same training images every time, from step 0."""


def shuffled_batches(seed: int, examples: int, batch_size: int, steps: int) -> np.ndarray:
    """Indices of every step's batch: a new permutation each epoch, without its last odd batch.

    Args:
      seed: The permutations' seed.
      examples: How many examples there are; at least `batch_size`.
      batch_size: Examples of a batch.
      steps: Number of batches.

    Returns:
      An int32 array `(steps, batch_size)`.
    """
    rng, per_epoch = np.random.default_rng(seed), examples // batch_size
    epochs = [
        rng.permutation(examples)[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        for _ in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)


def gradient_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> Step:
    """The usual step: differentiate, update."""

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    return step


def capturing_step(loss_fn: LossFn, optimizer: optax.GradientTransformationExtraArgs) -> Step:
    """A step that also hands the optimizer what cqjax captures."""

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(state.params, images, labels)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, captures=captures
        )
        return State(optax.apply_updates(state.params, updates), opt_state), loss

    return step


def train(
    step: Step,
    state: State,
    examples: tuple[jax.Array, jax.Array],
    batches: np.ndarray,
    evaluate: Callable[[Any], jax.Array],
    on_progress: Callable[[int, float, float], None],
) -> tuple[State, History]:
    """Take one step for each batch.

    The step is compiled ahead, and waited for only at the end of a chunk. (For the network of the
    quick start, `lax.scan` over the steps is no faster on a CPU, and slower for SGD.)

    Args:
      step: Takes a state and a batch of examples to the next state and the batch's loss.
      state: Where to start; its buffers are donated, so it cannot be used again.
      examples: All training images and labels.
      batches: Indices of each step's examples, `(steps, batch_size)`.
      evaluate: The training loss of some parameters; off the clock.
      on_progress: Called after each chunk with the steps done, their seconds, and the chunk's
        mean loss.

    Returns:
      The last state, and how the training went.
    """

    @partial(jax.jit, donate_argnums=0)
    def run(
        state: State, images: jax.Array, labels: jax.Array, batch: jax.Array
    ) -> tuple[State, jax.Array]:
        return step(state, images[batch], labels[batch])

    started = time.perf_counter()
    compiled = run.lower(state, *examples, batches[0]).compile()
    history, done = History(time.perf_counter() - started), 0
    history.train_loss.add(0, 0.0, float(evaluate(state.params)))

    chunks = np.array_split(batches, min(CHUNKS, len(batches)))
    for number, chunk in enumerate(chunks, start=1):
        losses = []
        started = time.perf_counter()
        for batch in chunk:
            state, loss = compiled(state, *examples, batch)
            losses.append(loss)
        jax.block_until_ready(state)
        history.train_seconds += time.perf_counter() - started
        done += len(chunk)
        history.batch_loss.add(done, history.train_seconds, float(np.mean(losses)))
        if number % EVALUATE_EVERY == 0 or number == len(chunks):
            loss = float(evaluate(state.params))
            history.train_loss.add(done, history.train_seconds, loss)
        on_progress(done, history.train_seconds, history.batch_loss.loss[-1])
    return state, history
