"""Train by one optimizer on given batches, and time only the training."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cqjax
from experiments.classification import LossFn, Metric
from experiments.history import Curve, History

CHUNKS = 75  # parts of a run. After each, the clock is read and progress is reported
EVALUATE_EVERY = 5  # chunks
LOST = 1e6  # times the loss of the first chunk: from there nothing comes back


class State(NamedTuple):
    """What a step changes."""

    params: Any
    model_state: Any
    """What else changes in the network: the running averages of batch normalisation."""
    opt_state: optax.OptState


Step = Callable[[State, jax.Array, jax.Array], tuple[State, jax.Array]]
"""Takes a state and a batch to the next state and the batch's loss."""

Augment = Callable[[jax.Array, jax.Array], jax.Array]
"""Takes the number of a step and its images to the images that are trained on."""


def shuffled_batches(seed: int, examples: int, batch_size: int, steps: int) -> np.ndarray:
    """Indices of the examples of each batch. Each epoch is a new permutation of the examples.

    What is left at the end of an epoch, less than a batch, is not used.

    Args:
      seed: The seed of the permutations.
      examples: Number of examples, at least `batch_size`.
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

    def differentiate(*args: Any) -> Any:
        return *jax.value_and_grad(loss_fn, has_aux=True)(*args), {}

    return _step(differentiate, optimizer)


def capturing_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    terms: int | None = None,
    **capture: Any,
) -> Step:
    """A step that also hands the optimizer what cqjax captures.

    Args:
      loss_fn: The loss.
      optimizer: The optimizer.
      terms: How many terms the loss averages over. By default it is the number of labels.
      **capture: What `cqjax.value_and_grad` takes besides: `solver`, `block_size`, ...

    Returns:
      The step.
    """

    def differentiate(*args: Any) -> Any:
        size = len(args[-1]) if terms is None else terms
        its = cqjax.value_and_grad(loss_fn, has_aux=True, batch_size=size, **capture)
        value, grads, captures = its(*args)
        return value, grads, {"captures": captures}

    return _step(differentiate, optimizer)


def _step(differentiate: Callable[..., Any], optimizer: Any) -> Step:
    """A step, from a function that returns value, gradients and what else the optimizer takes."""

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        params, model_state, opt_state = state
        (loss, model_state), grads, extra = differentiate(params, model_state, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return State(optax.apply_updates(params, updates), model_state, opt_state), loss

    return step


def fetching(
    step: Step, augment: Augment | None = None
) -> Callable[[State, jax.Array, jax.Array, jax.Array, jax.Array], tuple[State, jax.Array]]:
    """A step that also fetches and augments its batch, to be compiled as a whole.

    Args:
      step: Takes a state and a batch of examples to the next state and the batch's loss.
      augment: What is done to the images, if anything.

    Returns:
      A step that takes a state, all images, all labels, the indices of a batch and its number.
    """

    def run(
        state: State, images: jax.Array, labels: jax.Array, batch: jax.Array, number: jax.Array
    ) -> tuple[State, jax.Array]:
        some = images[batch]
        return step(state, augment(number, some) if augment else some, labels[batch])

    return run


_programs: WeakKeyDictionary[Step, dict[Any, Any]] = WeakKeyDictionary()


def compiled(key: tuple[Step, Augment | None], function: Callable[..., Any], *args: Any) -> Any:
    """The compiled function, which donates its first argument, and the seconds that this took.

    If the key and the shapes of the arguments are the same as in an earlier call, the program and
    the seconds are those of that call.
    """
    step, augment = key
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    known = _programs.setdefault(step, {})
    if (augment, structure, shapes) not in known:
        started = time.perf_counter()
        program = jax.jit(function, donate_argnums=0).lower(*args).compile()
        known[augment, structure, shapes] = program, time.perf_counter() - started
    return known[augment, structure, shapes]


def _chunks(
    key: tuple[Step, Augment | None],
    state: State,
    examples: tuple[jax.Array, jax.Array],
    batches: np.ndarray,
    looped: bool,
) -> tuple[Callable[[State, int, int], tuple[State, Any]], float]:
    """A function that takes the steps from one number up to another, and its compile seconds.

    The function returns the losses of the steps, or their mean.
    """
    run = fetching(*key)
    if not looped:
        step, seconds = compiled(key, run, state, *examples, batches[0], np.int32(0))

        def one_by_one(state: State, first: int, last: int) -> tuple[State, Any]:
            losses = []
            for number in range(first, last):
                state, loss = step(state, *examples, batches[number], np.int32(number))
                losses.append(loss)
            return state, losses

        return one_by_one, seconds

    def loop(
        state: State,
        images: jax.Array,
        labels: jax.Array,
        batches: jax.Array,
        first: Any,
        last: Any,
    ) -> tuple[State, jax.Array]:
        def body(number: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, loss = run(carry[0], images, labels, batches[number], number)
            return state, carry[1] + loss.astype(jnp.float32)

        state, total = jax.lax.fori_loop(first, last, body, (state, jnp.float32(0)))
        return state, total / (last - first)

    given = (*examples, jnp.asarray(batches))
    program, seconds = compiled(key, loop, state, *given, np.int32(0), np.int32(1))
    return lambda state, *bounds: program(state, *given, *map(np.int32, bounds)), seconds


def train(
    step: Step,
    state: State,
    examples: tuple[jax.Array, jax.Array],
    batches: np.ndarray,
    metrics: Mapping[str, Metric],
    on_chunk: Callable[[State, History], None],
    *,
    at_end: Mapping[str, Metric] | None = None,
    history: History | None = None,
    augment: Augment | None = None,
    looped: bool | None = None,
) -> tuple[State, History]:
    """Take one step for each batch.

    The step is compiled before the clock starts. Runs of the same step, with arguments of the same
    shapes, share one program, and the seconds of its compilation count for each run.

    Args:
      step: Takes a state and a batch of examples to the next state and the batch's loss.
      state: The first state. It can be used again.
      examples: All training images and labels.
      batches: Indices of each step's examples, `(steps, batch_size)`.
      metrics: They are evaluated before the first step and after some chunks, while the clock
        stands still.
      on_chunk: Called before the first step and after each chunk, with the state and the history
        so far. The next step invalidates the state.
      at_end: Metrics that are evaluated after the last step only.
      history: The history of earlier training that stopped at `state`, at the end of a chunk. It is
        continued, and the batches until then are skipped.
      augment: What is done to each batch's images, as a part of the compiled step.
      looped: Whether a chunk is one program, without Python between its steps. The default is no
        on CPUs and yes elsewhere: on CPUs XLA's loops are no faster for the network of the quick
        start, and far slower for convolutions.

    Returns:
      The last state, and the history. If the mean loss of a chunk is no number, or a million times
      that of the first, no more steps are taken, and what would have come is NaN.
    """
    history = history or History()
    if history.steps == len(batches):
        on_chunk(state, history)
        return state, history
    state = jax.tree.map(jnp.copy, state)
    looped = jax.default_backend() != "cpu" if looped is None else looped
    chunk, compile_seconds = _chunks((step, augment), state, examples, batches, looped)
    history.compile_seconds += compile_seconds

    def evaluate(metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            curve = history.metrics.setdefault(name, Curve())
            value = math.nan if lost else metric(state.params, state.model_state)
            curve.add(history.steps, history.train_seconds, value)

    lost = False
    if history.steps == 0:
        evaluate(metrics)
    on_chunk(state, history)
    lengths = [len(part) for part in np.array_split(batches, min(CHUNKS, len(batches)))]
    for number, done in enumerate(np.cumsum(lengths).tolist(), start=1):
        if done <= history.steps:
            continue
        lost = _is_lost(history.batch_loss.value)
        started, losses = time.perf_counter(), math.nan
        if not lost:
            state, losses = jax.block_until_ready(chunk(state, history.steps, done))
        history.train_seconds += time.perf_counter() - started
        history.batch_loss.add(done, history.train_seconds, float(np.mean(losses)))
        if number % EVALUATE_EVERY == 0 or number == len(lengths):
            evaluate(metrics)
        if number == len(lengths):
            evaluate(at_end or {})
        on_chunk(state, history)
    return state, history


def _is_lost(losses: Sequence[float]) -> bool:
    """Whether nothing can be learnt any more, by the mean losses of the chunks so far."""
    return bool(losses) and not abs(losses[-1]) <= LOST * max(1.0, abs(losses[0]))
