"""Contests whose training runs have a known outcome."""

import contextlib
from types import SimpleNamespace

import numpy as np

from experiments.contest import Effort, Entrant, Parts
from experiments.data import Split
from experiments.history import Curve, History
from experiments.runs import UnfinishedError

EFFORT = Effort(steps=20, tuning_steps=5, seeds=3, seed=7, batch_size=4, measured=6)
STEPS = [0, 10, 20]
NAN = float("nan")


def split(n, first=0):
    labels = np.arange(first, first + n, dtype=np.int32)
    return Split(np.full((n, 2, 2), 0.5, np.float32) * labels[:, None, None], labels)


PARTS = Parts(split(12), split(2, 20), split(3, 30))


def entrant(name, role="baseline", rates=(0.1, 0.2)):
    return Entrant(name, lambda rate: ((name, rate), None), rates, role)


def tuned(loss):
    return History(
        1.0, 2.0, Curve([5], [2.0], [1.0]), {"validation_loss": Curve([5], [2.0], [loss])}
    )


def trained(*losses):
    """A run with these training losses at the steps 0, 10 and 20."""
    seconds = [0.0, 3.0, 6.0]
    metrics = {
        "train_loss": Curve(STEPS, seconds, list(losses)),
        "validation_loss": Curve(STEPS, seconds, [1.0, 1.0, 1.0]),
        "test_accuracy": Curve(STEPS, seconds, [0.1, 0.5, 0.6]),
    }
    return History(1.5, 6.0, Curve([20], [6.0], [1.0]), metrics)


class Runs:
    """Has the outcomes ready, and remembers what it was asked for. Some may not be finished."""

    def __init__(self, tuning, final, missing=()):
        self.tuning, self.final, self.calls, self.more = tuning, final, [], 0
        self.missing = missing

    def expect_another(self):
        self.more += 1

    def several(self, runs):
        found = [None] * len(runs)
        for i, run in enumerate(runs):
            with contextlib.suppress(UnfinishedError):
                found[i] = run()
        return found

    def train(
        self, label, optimizer, step, start, examples, batches, metrics, at_end=None, **options
    ):
        self.calls.append(
            SimpleNamespace(
                label=label,
                at=optimizer,
                step=step,
                start=start,
                examples=examples,
                batches=batches,
                metrics=metrics,
                at_end=at_end,
                **options,
            )
        )
        name, rate = optimizer
        history = tuned(self.tuning[name, rate]) if at_end else next(self.final[name])
        if (name, rate, None if at_end else start[0].get("seed")) in self.missing:
            raise UnfinishedError(label)
        return history
