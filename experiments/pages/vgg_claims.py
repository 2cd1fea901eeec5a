"""What seed 004 claims of its Tables 1 and 2 and of Figure 3, judged by what came of it here."""

import numpy as np

from experiments.page import Claim, judge, median, spread
from experiments.pages.contests import Contest, curves, last
from experiments.vgg_entrants import OURS, PHASES, SGD

TABLES = {"CIFAR-100": "section 4.2, Table 1", "CIFAR-10": "section 4.2, Table 2"}
ALMOST = 0.9  # of the times are "almost always"


def table(tables: dict[str, Contest], data: str) -> Claim:
    """What is said of the table of a data set."""
    ends = {
        title: {name: median(last(c, name, "test_accuracy")) for name in c["entrants"]}
        for title, c in tables.items()
    }
    ahead = {title: by[OURS] == max(by.values()) for title, by in ends.items()}
    best = {title: max((by[n], n) for n in by if n != OURS) for title, by in ends.items()}
    almost = "" if data == "CIFAR-100" else "almost "
    return Claim(
        TABLES[data],
        f"back-matching achieves higher test accuracy than its competitors on {almost}all VGG "
        f"models (on {data})",
        "; ".join(
            f"{title}: {ends[title][OURS]:.2%}, the best of the others {name} {accuracy:.2%}"
            for title, (accuracy, name) in best.items()
        ),
        judge(*ahead.values()),
    )


def figure3(alike: Contest) -> list[Claim]:
    """What is said of Figure 3."""
    steps, _, _ = curves(alike, SGD, "train_loss")
    loss = {n: np.median(curves(alike, n, "train_loss")[2], 0) for n in (SGD, OURS)}
    errors = {n: 100 * (1 - curves(alike, n, "test_accuracy")[2]) for n in (SGD, OURS)}
    below = loss[OURS][1:] < loss[SGD][1:]
    early = [i for i, step in enumerate(steps) if 0 < step <= 2 * steps[-1] / PHASES]
    swings = {
        n: median(np.diff(e[:, early]).clip(min=0).sum(axis=1).tolist()) for n, e in errors.items()
    }
    ends = {n: (100 * (1 - np.array(last(alike, n, "test_accuracy")))).tolist() for n in errors}
    gain = median(ends[SGD]) - median(ends[OURS])
    jumps = {n: _jumps(np.array(steps), values) for n, values in loss.items()}
    return [
        Claim(
            "section 4.2, Fig. 3",
            "at the same rate, back-matching's training loss is almost always lower than SGD's",
            f"lower at {below.sum()} of {len(below)} times, in the median of the seeds",
            judge(below.mean() >= ALMOST, below.mean() > 0.5),
        ),
        Claim(
            "section 4.2, Fig. 3",
            "its test error fluctuates heavier initially",
            "in the first two fifths the test error's rises from one evaluation to the next add up "
            f"to {swings[OURS]:.1f} points, SGD's to {swings[SGD]:.1f}",
            judge(swings[OURS] > swings[SGD]),
        ),
        Claim(
            "section 4.2, Fig. 3",
            "its test error ends with a considerably lower number (by a point or more)",
            f"{spread(ends[OURS], '.1f')} %, SGD's {spread(ends[SGD], '.1f')} %",
            judge(gain > 0, gain >= 1),
        ),
        Claim(
            "section 4.2, Fig. 3",
            "both curves jump at each decay of the rate",
            "the training loss falls by more after a decay than just before it at "
            + ", ".join(f"{jumps[n]} of {PHASES - 1} ({n})" for n in (SGD, OURS)),
            judge(*(jumps[n] == PHASES - 1 for n in (SGD, OURS))),
        ),
    ]


def _jumps(steps: np.ndarray, losses: np.ndarray) -> int:
    """After how many of the rate's decays the loss falls by more than just before."""
    decays = steps[-1] * np.arange(1, PHASES) / PHASES
    away = steps[-1] / (3 * PHASES)  # the way from one evaluation to the next
    before, at, after = (np.interp(decays + way, steps, losses) for way in (-away, 0, away))
    return int((at - after > before - at).sum())
