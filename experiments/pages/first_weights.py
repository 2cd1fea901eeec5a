"""What a lecture (seed 002) says of first weights, momentum and losses, and what was measured."""

from typing import Any

import numpy as np

from experiments.homework import GAUSSIANS, INITIALISATIONS, LOSSES, RATES
from experiments.page import Claim, count, judge, median


def accuracy(training: Any, loss: str, method: str, kind: str, first: str) -> float:
    """The median test accuracy in the end."""
    return median(training[loss][method][kind][first]["last"]["accuracy"])


def steps_to_sgd(training: Any, kind: str, at: list[int]) -> dict[str, float]:
    """Steps until the median training loss is that of SGD in the end."""
    curves = {m: np.array(training[m][kind]["random"]["training_loss"][0]) for m in RATES}
    there = {m: np.flatnonzero(curve <= curves["SGD"][-1]) for m, curve in curves.items()}
    return {m: float(at[i[0]]) if len(i) else np.inf for m, i in there.items()}


def first_weights(training: Any) -> list[Claim]:
    """The claims on how to start."""
    best = {
        kind: {
            first: max(accuracy(training, "squared", m, kind, first) for m in RATES)
            for first in INITIALISATIONS
        }
        for kind in GAUSSIANS
    }
    unequal = {
        m: max(
            median(training[loss][m][kind][first]["unequal"], 1)
            for loss in LOSSES
            for kind in GAUSSIANS
            for first in ("zeros", "ones")
        )
        for m in RATES
    }
    pairs = {
        (m, kind): [accuracy(training, "squared", m, kind, x) for x in ("random", "Xavier")]
        for m in RATES
        for kind in GAUSSIANS
    }
    return [
        Claim(
            "section 19.123.1, homework 1",
            "random first weights are ideal, not zeros or ones",
            "test accuracy by the best optimizer for each, squared loss: "
            + "; ".join(
                f"{kind}: " + ", ".join(f"{first} {value:.1%}" for first, value in found.items())
                for kind, found in best.items()
            ),
            judge(*(b["random"] > 0.01 + max(b["zeros"], b["ones"]) for b in best.values())),
        ),
        Claim(
            "section 19.123.1 asks",
            "from zeros or ones, all neurons of a layer stay equal",
            "largest difference of their weights after training: "
            + ", ".join(f"{m} {count(value, '.1g')}" for m, value in unequal.items()),
            judge(*(value < 1e-6 for value in unequal.values())),
        ),
        Claim(
            "section 19.123.1",
            "Xavier's first weights work well",
            "test accuracy with random weights and with Xavier's: "
            + "; ".join(f"{m}, {k} {a:.1%}, {b:.1%}" for (m, k), (a, b) in pairs.items()),
            judge(*(b >= a - 0.01 for a, b in pairs.values())),
        ),
    ]


def losses(training: Any, steps: Any) -> list[Claim]:
    """The claims on momentum and on losses."""
    hinges = {
        (m, kind): [accuracy(training, loss, m, kind, "random") for loss in LOSSES]
        for m in RATES
        for kind in GAUSSIANS
    }
    return [
        Claim(
            "section 19.123.2",
            "momentum converges better than plain gradients",
            "steps of SGD and of momentum until SGD's last training loss: "
            + "; ".join(
                f"{loss}, {kind} {count(found['SGD'])}, {count(found['momentum'])}"
                for (loss, kind), found in steps.items()
            ),
            judge(*(found["momentum"] < found["SGD"] for found in steps.values())),
        ),
        Claim(
            "section 19.124",
            "the squared error is not the apt loss for classes",
            "test accuracy by squared and by hinge loss: "
            + "; ".join(f"{m}, {k} {a:.1%}, {b:.1%}" for (m, k), (a, b) in hinges.items()),
            judge(*(b > a for a, b in hinges.values())),
        ),
    ]
