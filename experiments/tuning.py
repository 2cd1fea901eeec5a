"""Which learning rate an optimizer takes, from its tuning runs."""

import math
from collections.abc import Iterable, Sequence

from experiments.history import History
from experiments.stored import VALIDATION

Tried = Sequence[tuple[float, History]]
"""Learning rates, each with its tuning run."""


def winner(tried: Tried) -> float:
    """The rate whose run ended with the lowest validation loss. If all diverged, the first."""
    return min(tried, key=_loss)[0]


def lowest(tried: Tried) -> float:
    """The lowest validation loss at the end of a tuning run."""
    return min(map(_loss, tried))


def beyond(tried: Tried) -> list[float]:
    """The rate half a decade beyond the winner, if this is the least or greatest of several."""
    if len(tried) < 2:
        return []
    order = sorted(tried, key=lambda one: one[0])
    best = winner(order)
    way = {order[-1][0]: 1, order[0][0]: -1}.get(best, 0)
    return [float(f"{10 ** (round(2 * math.log10(best)) / 2 + way / 2):.0e}")] if way else []


def slower(tried: Tried, rate: float, runs: Iterable[History]) -> list[float]:
    """The best of the lower rates, if one of the runs at this rate diverged, and if there is one.

    A run has diverged if its training loss in the end is not a number, or more than at first.
    """
    lower = [one for one in tried if one[0] < rate]
    ends = [run.metrics["train_loss"].value for run in runs]
    return [winner(lower)] if lower and not all(end[-1] <= end[0] for end in ends) else []


def summary(tried: Tried) -> list[dict[str, float]]:
    """The tuning runs, to be stored."""
    return [
        {
            "rate": rate,
            VALIDATION: history.last(VALIDATION),
            "seconds": history.train_seconds,
            "compile_seconds": history.compile_seconds,
        }
        for rate, history in tried
    ]


def _loss(tried: tuple[float, History]) -> float:
    """The validation loss at the end of a tuning run. It is infinite if it is not a number."""
    value = tried[1].last(VALIDATION)
    return math.inf if math.isnan(value) else value
