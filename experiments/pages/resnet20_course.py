"""What section 5.4 of seed 000 says of the way of ResNet-20's training, by steps and seconds."""

import numpy as np

from experiments.page import Claim, count, judge, median
from experiments.pages.contests import Contest, curves

WITHIN = 1.1  # times SGD-BN's training loss: within its reach
POINTS = 0.05  # of accuracy: alike


def beginning(contest: Contest) -> Claim:
    """Who is ahead first."""
    (steps, ours), (_, bn) = (_medians(contest, n, "train_loss") for n in ("C-SGD", "SGD-BN"))
    below = ours[1:] < bn[1:]
    early = below[: max(1, len(below) // 3)]
    crossed = [step for step, first in zip(steps[1:], below, strict=True) if not first]
    return Claim(
        "section 5.4, Fig. 6",
        "C-SGD converges faster than SGD-BN in the beginning (here, the first third of the "
        "evaluations)",
        f"C-SGD's training loss is below SGD-BN's at {early.sum()} of the first {len(early)} "
        f"evaluations and at {below.sum()} of all {len(below)}; "
        + (f"it is above first after {crossed[0]:,} steps" if crossed else "it is never above"),
        judge(bool(early.all())),
    )


def alike(contest: Contest) -> Claim:
    """How far the accuracies are apart."""
    (_, ours), (_, bn) = (_medians(contest, n, "train_accuracy") for n in ("C-SGD", "SGD-BN"))
    apart = np.abs(ours - bn)[1:]
    return Claim(
        "section 5.4, Fig. 6",
        f"C-SGD's accuracy strikingly resembles SGD-BN's (here: training accuracies, {POINTS:.0%})",
        f"they are {np.median(apart):.1%} apart in the median of the evaluations, and at most "
        f"{apart.max():.1%}",
        judge(bool(np.median(apart) <= POINTS), bool(apart.max() <= POINTS)),
    )


def seconds_without(contest: Contest) -> Claim:
    """Who is ahead at equal times, of those without batch normalisation."""
    names = contest["entrants"]
    duels = [(f"C-{name}", name) for name in ("SGD", "Nesterov") if name in names]
    duels += [(name, "Adam") for name in ("SGD", "Nesterov") if {name, "Adam"} <= set(names)]
    return _in_time(
        contest,
        "by seconds, without BN: C-SGD and C-Nesterov perform much better than SGD and Nesterov, "
        "and these better than Adam",
        duels,
        1.0,
    )


def seconds_with(contest: Contest) -> Claim:
    """Whether the C- forms are, of those with batch normalisation."""
    duels = [("C-SGD", "SGD-BN"), ("C-Nesterov", "Nesterov-BN")]
    return _in_time(
        contest,
        "by seconds, SGD-BN performs almost as C-SGD, and C-Nesterov better than Nesterov-BN: "
        f"here, C-SGD has at most {WITHIN} times the loss, and C-Nesterov less",
        [duel for duel in duels if duel[0] in contest["entrants"]],
        WITHIN,
    )


def _in_time(contest: Contest, claim: str, duels: list[tuple[str, str]], first: float) -> Claim:
    """The first duel is won within a factor, the others without."""
    found = [_at_same_time(contest, *duel) for duel in duels]
    return Claim(
        "section 5.4, Fig. 7",
        claim,
        "training loss where the shorter of both trainings ends, compilation counted: "
        + "; ".join(
            f"{a} {number(loss)} and {b} {number(other)} after {seconds:,.0f} s"
            for (a, b), (seconds, loss, other) in zip(duels, found, strict=True)
        ),
        judge(
            *(
                loss <= (1.0 if turn else first) * other
                for turn, (_, loss, other) in enumerate(found)
            )
        ),
    )


def perfect(contest: Contest) -> Claim:
    """Whether all training images are learnt, and when."""
    names = [name for name in ("C-SGD", "C-Nesterov") if name in contest["entrants"]]
    first = {}
    for name in names:
        steps, accuracy = _medians(contest, name, "train_accuracy")
        first[name] = min((s for s, a in zip(steps, accuracy, strict=True) if a == 1), default=None)
    return Claim(
        "section 5.4",
        "C-SGD has a training accuracy of 100 % after about 8,000 steps, C-Nesterov after 7,000",
        "; ".join(
            f"{name} {f'after {at:,} steps' if at else 'never'}" for name, at in first.items()
        ),
        judge(*(at is not None and at <= 10_000 for at in first.values())),
    )


def number(loss: float) -> str:
    """A loss in words."""
    return count(loss, ".4f")


def _medians(contest: Contest, name: str, metric: str) -> tuple[list[int], np.ndarray]:
    steps, _, values = curves(contest, name, metric)
    worst = np.inf if metric == "train_loss" else 0.0
    return steps, np.median(np.nan_to_num(values, nan=worst), axis=0)


def _at_same_time(contest: Contest, *names: str) -> tuple[float, float, float]:
    """When the shorter of two trainings ends, and both losses at the last evaluation before."""
    runs = [curves(contest, name, "train_loss")[1:] for name in names]
    seconds = min(median(times[:, -1].tolist()) for times, _ in runs)
    first, second = (
        median(
            [
                loss[max(0, np.searchsorted(at, seconds * (1 + 1e-9)) - 1)]
                for at, loss in zip(times, losses, strict=True)
            ]
        )
        for times, losses in runs
    )
    return seconds, first, second
