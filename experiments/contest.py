"""Optimizers are tuned alike and then compared: the protocol of the experiments that train."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.classification import Metric, accuracy, mean_loss
from experiments.data import Dataset, Split
from experiments.page import median
from experiments.runs import Runs
from experiments.training import Augment, History, Step, shuffled_batches


class Parts(NamedTuple):
    """A data set's images: to train on, to pick rates by, to test."""

    train: Split
    validation: Split
    test: Split

    def evaluated(self, number: int | None) -> "Parts":
        """The same, with the first so many images to pick rates by and to test."""
        few = (Split(*(array[:number] for array in part)) for part in self[1:])
        return Parts(self.train, *few)


class Task(NamedTuple):
    """What all entrants learn."""

    parts: Parts
    model: Any
    """The Flax network, called without further arguments where it is evaluated."""
    start: Callable[[int], tuple[Any, Any]]
    """Takes a seed to the first parameters and network state."""
    augment: Augment | None = None
    """What is done to each batch's images."""
    watched: Mapping[str, Metric] = {}
    """What else is evaluated now and then."""


class Entrant(NamedTuple):
    """An optimizer, and the learning rates that are tried for it."""

    name: str
    at: Callable[[float], tuple[optax.GradientTransformation, Step]]
    """Takes a rate to the optimizer and its step."""
    rates: Sequence[float]
    role: Literal["ours", "baseline", "other", "variant", "timed"] = "baseline"
    """The best of the baselines sets the target. Of the variants, all are tuned, and only the best
    then runs. Who is "timed" takes no part: only a step is timed."""
    task: Task | None = None
    """What it learns, if that is another network, or has other inputs, than the contest's task. It
    has as many images."""

    def remembering(self) -> "Entrant":
        """The same with one step for each rate, so that it is compiled once."""
        return self._replace(at=cache(self.at))


class Effort(NamedTuple):
    """How much is done for each entrant."""

    steps: int
    """Of each run."""
    tuning_steps: int
    """Of a tuning run."""
    seeds: int
    """Runs at the rate that won."""
    seed: int
    """Of the tuning runs; the others have the seeds after it."""
    batch_size: int
    measured: int
    """The training loss is that of the first so many training images."""

    def costs(self, entrants: Sequence[Entrant], seconds: Mapping[str, float]) -> list[float]:
        """Seconds of each run of a contest, in order.

        Args:
          entrants: Who takes part.
          seconds: Of a step of each entrant. A variant was not timed: its steps count as the
            slowest one's.

        Returns:
          The seconds of the tuning runs, then of the others. One of the variants has whole runs.
        """
        slowest = max(seconds.values())
        tuning = [seconds.get(e.name, slowest) for e in entrants for _ in e.rates]
        whole = [seconds[e.name] for e in entrants if e.role != "variant"] * self.seeds
        if any(e.role == "variant" for e in entrants):
            whole += [slowest] * self.seeds
        return [self.tuning_steps * s for s in tuning] + [self.steps * s for s in whole]


def held_out(dataset: Dataset, fraction: float = 0.1) -> Parts:
    """The last of the training images are for validation."""
    images, labels = dataset.train
    cut = len(labels) - max(1, round(fraction * len(labels)))
    return Parts(Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]), dataset.test)


def hold(
    runs: Runs,
    title: str,
    task: Task,
    entrants: Sequence[Entrant],
    effort: Effort,
) -> dict[str, Any]:
    """Tune all entrants with equal effort, then let them run from the same starts.

    A tuning run takes `effort.tuning_steps` at one rate; the rate whose run ends with the lowest
    validation loss wins, and a loss that is not a number loses. At each of the seeds all entrants
    but the variants then start from the same weights and see the same batches. The best baseline's
    training loss in the end, in the median, is the target.

    Args:
      runs: Takes the training runs, and shows how far all of them are.
      title: Stands before the runs' names, to tell them from another contest's.
      task: What is learnt.
      entrants: Who takes part, each with as many rates as the others.
      effort: How much is done for each.

    Returns:
      Every number, by entrant, and the target; of the variants the tuning runs, and the best
      one's runs.

    Raises:
      ValueError: If some entrant has more rates than another.
    """
    if len({len(entrant.rates) for entrant in entrants}) > 1:
        counts = {entrant.name: len(entrant.rates) for entrant in entrants}
        raise ValueError(f"all entrants get the same number of tuning runs; rates: {counts}")
    tasks = {entrant.name: entrant.task or task for entrant in entrants}
    evaluated = {id(its): _Evaluated.of(its, effort.measured) for its in tasks.values()}

    def run(entrant: Entrant, rate: float, seed: int, tuning: bool) -> History:
        kind = "tuning" if tuning else f"seed {seed}"
        label = f"{title}{entrant.name} {rate:g}, {kind}"
        steps = effort.tuning_steps if tuning else effort.steps
        its = tasks[entrant.name]
        examples, validating, evaluating = evaluated[id(its)]
        return runs.train(
            label,
            *entrant.at(rate),
            its.start(seed),
            examples,
            shuffled_batches(seed, len(examples[1]), effort.batch_size, steps),
            {} if tuning else evaluating,
            validating if tuning else None,
            augment=its.augment,
        )

    tuned = {
        entrant.name: [(rate, run(entrant, rate, effort.seed, True)) for rate in entrant.rates]
        for entrant in entrants
    }
    rates = {name: winner(tried) for name, tried in tuned.items()}
    seeds = range(effort.seed + 1, effort.seed + 1 + effort.seeds)
    variants = [entrant for entrant in entrants if entrant.role == "variant"]
    running = [entrant for entrant in entrants if entrant not in variants]
    ran: dict[str, list[History]] = {entrant.name: [] for entrant in running}
    for seed in seeds:
        for entrant in running:
            ran[entrant.name].append(run(entrant, rates[entrant.name], seed, False))
    if variants:
        best = min(variants, key=lambda entrant: min(map(_loss, tuned[entrant.name])))
        ran[best.name] = [run(best, rates[best.name], seed, False) for seed in seeds]
    baselines = [entrant.name for entrant in entrants if entrant.role == "baseline"]
    target = _target({name: ran[name] for name in baselines})

    def results(name: str) -> dict[str, Any]:
        runs = [
            {"seed": seed, **history.summary(), "to_target": reached(history, target)}
            for seed, history in zip(seeds, ran.get(name, ()), strict=name in ran)
        ]
        return _tuning(tuned[name]) | ({"runs": runs} if runs else {})

    return {
        "images": dict(zip(Parts._fields, (len(part.labels) for part in task.parts), strict=True))
        | {"training_loss": min(effort.measured, len(task.parts.train.labels))},
        "effort": effort._asdict(),
        "target": target,
        "entrants": {
            entrant.name: {"role": entrant.role, **results(entrant.name)} for entrant in running
        },
        "variants": {variant.name: results(variant.name) for variant in variants},
    }


def winner(tried: Sequence[tuple[float, History]]) -> float:
    """The rate whose run ended with the lowest validation loss; the first, if all diverged."""
    return min(tried, key=_loss)[0]


def _loss(tried: tuple[float, History]) -> float:
    """The validation loss that a tuning run ended with, infinite if it is not a number."""
    value = tried[1].last("validation_loss")
    return math.inf if math.isnan(value) else value


def reached(history: History, target: Mapping[str, Any]) -> dict[str, float] | None:
    """The first evaluation whose training loss is at most the target's, if there is one."""
    first = history.metrics["train_loss"].first_at_most(target["train_loss"])
    if first is None:
        return None
    step, seconds = first
    curve = history.metrics["test_accuracy"]
    return {
        "step": step,
        "seconds": seconds,
        "seconds_with_compilation": history.compile_seconds + seconds,
        "test_accuracy": curve.value[curve.step.index(step)],
    }


def _target(ran: Mapping[str, Sequence[History]]) -> dict[str, Any]:
    """The best of some entrants, by the training loss in the end, and this loss."""
    losses = {
        name: median([history.last("train_loss") for history in histories])
        for name, histories in ran.items()
    }
    best = min(losses, key=losses.__getitem__)
    return {"entrant": best, "train_loss": losses[best]}


def _tuning(tried: Sequence[tuple[float, History]]) -> dict[str, Any]:
    """What came of the tuning runs."""
    return {
        "tuning": [
            {
                "rate": rate,
                "validation_loss": history.last("validation_loss"),
                "seconds": history.train_seconds,
                "compile_seconds": history.compile_seconds,
            }
            for rate, history in tried
        ],
        "rate": winner(tried),
    }


class _Evaluated(NamedTuple):
    """A task's training images and labels, and what is evaluated."""

    examples: tuple[jax.Array, jax.Array]
    validating: dict[str, Metric]
    """After a tuning run."""
    evaluating: dict[str, Metric]
    """In the other runs, now and then."""

    @classmethod
    def of(cls, task: Task, measured: int) -> "_Evaluated":
        (images, labels), validation, test = task.parts
        validating = {"validation_loss": mean_loss(task.model, *validation)}
        evaluating = {
            "train_loss": mean_loss(task.model, images[:measured], labels[:measured]),
            **validating,
            "test_accuracy": accuracy(task.model, *test),
            **task.watched,
        }
        return cls((jnp.asarray(images), jnp.asarray(labels)), validating, evaluating)
