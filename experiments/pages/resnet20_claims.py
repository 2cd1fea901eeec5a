"""What Paeedeh and Ghiasi-Shirazi say of ResNet-20 in section 5.4, judged by what was measured."""

import numpy as np

from experiments.page import Claim, count, judge, median
from experiments.pages.contests import Contest, curves, last

LONG = 8000  # steps after which the source has C-SGD at a training accuracy of 100 %
WITHIN = 1.1  # "within reach": at most so many times SGD-BN's training loss
POINTS = 0.05  # "alike": accuracies that are at most so far apart


def claims(contest: Contest) -> list[Claim]:
    """The claims on the optimizers that took part."""
    names = contest["entrants"]
    return [
        _reach(contest),
        *([_nesterov(contest)] if "Nesterov" in names else []),
        _plain(contest),
        *([_adam(contest)] if "Adam" in names else []),
        _beginning(contest),
        _alike(contest),
        _seconds_without(contest),
        _seconds_with(contest),
        *([_perfect(contest)] if contest["effort"]["steps"] >= LONG else []),
        *([_settings(contest)] if len(contest["variants"]) > 1 else []),
    ]


def unchecked(contest: Contest) -> list[str]:
    """The claims that runs of this length cannot check."""
    steps = contest["effort"]["steps"]
    if steps >= LONG:
        return []
    minutes = LONG * contest["seconds_per_step"]["C-SGD"] / 60
    return [
        f"Runs have {steps:,} steps. The source has a training accuracy of 100 % after about 8,000 "
        "(C-SGD) and 7,000 (C-Nesterov), and SGD-BN ahead of C-SGD after 25,000: not checked here. "
        f"By its time per step, C-SGD takes {minutes:,.0f} minutes for {LONG:,}."
    ]


def _reach(contest: Contest) -> Claim:
    """The main question: whether C-SGD without BN replaces BN."""
    ours, bn = (_end(contest, name) for name in ("C-SGD", "SGD-BN"))
    accuracies = {
        metric: [median(last(contest, name, metric)) for name in ("C-SGD", "SGD-BN")]
        for metric in ("train_accuracy", "test_accuracy")
    }
    return Claim(
        "section 5.4, Fig. 6",
        "C-SGD without BN is within reach of SGD with it: here, its training loss in the end is at "
        f"most {WITHIN} times SGD-BN's, and training and test accuracy at most {POINTS:.0%} below",
        f"training loss {_number(ours)} and {_number(bn)}; "
        + "; ".join(
            f"{metric.replace('_', 'ing ' if metric[1] == 'r' else ' ')} {a:.2%} and {b:.2%}"
            for metric, (a, b) in accuracies.items()
        ),
        judge(ours <= WITHIN * bn, *(a >= b - POINTS for a, b in accuracies.values())),
    )


def _plain(contest: Contest) -> Claim:
    duels = [(f"C-{name}", name) for name in ("SGD", "Nesterov") if name in contest["entrants"]]
    return Claim(
        "section 5.4, Fig. 6",
        "without BN, C-SGD and C-Nesterov perform better than SGD and Nesterov",
        _losses(contest, *(name for duel in duels for name in duel)),
        judge(*(_end(contest, ours) < _end(contest, theirs) for ours, theirs in duels)),
    )


def _adam(contest: Contest) -> Claim:
    others = [name for name in ("SGD", "Nesterov") if name in contest["entrants"]]
    adam, ours = _end(contest, "Adam"), _end(contest, "C-Adam")
    return Claim(
        "section 5.4, Figs. 6, 7",
        "without BN, Adam performs no better than the other two, and C-Adam does not change that",
        _losses(contest, *others, "Adam", *(f"C-{name}" for name in others), "C-Adam"),
        judge(
            adam >= min(_end(contest, name) for name in others),
            ours >= min(_end(contest, f"C-{name}") for name in others),
        ),
    )


def _nesterov(contest: Contest) -> Claim:
    bn, plain, ours = (_end(contest, n) for n in ("Nesterov-BN", "Nesterov", "C-Nesterov"))
    return Claim(
        "section 5.4, Fig. 6",
        "BN improves Nesterov's convergence, and C-Nesterov stays competitive: here, its training "
        f"loss in the end is at most {WITHIN} times Nesterov-BN's",
        _losses(contest, "Nesterov", "Nesterov-BN", "C-Nesterov"),
        judge(bn < plain, ours <= WITHIN * bn),
    )


def _settings(contest: Contest) -> Claim:
    entrants, steps = contest["entrants"], contest["effort"]["tuning_steps"]
    tried = {"C-SGD": entrants["C-SGD"], **contest["variants"], "SGD-BN": entrants["SGD-BN"]}
    best = {
        name.removeprefix("C-SGD, "): min(median([at["validation_loss"]]) for at in each["tuning"])
        for name, each in tried.items()
    }
    (_, ours), *changed, (_, bn) = best.items()
    better = sorted((loss, words) for words, loss in changed if loss < ours)
    return Claim(
        "section 5.4",
        "the source's settings are right for C-SGD: here, no single change of those tried makes "
        f"its validation loss after {steps:,} steps less, each at the best of its rates",
        f"C-SGD {_number(ours)}, SGD-BN {_number(bn)}; less than C-SGD's: "
        + (", ".join(f"{words} {_number(loss)}" for loss, words in better) or "none"),
        judge(not better),
    )


def _beginning(contest: Contest) -> Claim:
    """Which is ahead in the beginning."""
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


def _alike(contest: Contest) -> Claim:
    """How far the training accuracies are apart."""
    (_, ours), (_, bn) = (_medians(contest, n, "train_accuracy") for n in ("C-SGD", "SGD-BN"))
    apart = np.abs(ours - bn)[1:]
    return Claim(
        "section 5.4, Fig. 6",
        f"C-SGD's accuracy strikingly resembles SGD-BN's (here: training accuracies, {POINTS:.0%})",
        f"they are {np.median(apart):.1%} apart in the median of the evaluations, and at most "
        f"{apart.max():.1%}",
        judge(bool(np.median(apart) <= POINTS), bool(apart.max() <= POINTS)),
    )


def _seconds_without(contest: Contest) -> Claim:
    """Which is ahead after equal times, of the forms without BN."""
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


def _seconds_with(contest: Contest) -> Claim:
    """Whether the C- forms are ahead of the forms with BN, after equal times."""
    duels = [("C-SGD", "SGD-BN"), ("C-Nesterov", "Nesterov-BN")]
    return _in_time(
        contest,
        "by seconds, SGD-BN performs almost as C-SGD, and C-Nesterov better than Nesterov-BN: "
        f"here, C-SGD has at most {WITHIN} times the loss, and C-Nesterov less",
        [duel for duel in duels if duel[0] in contest["entrants"]],
        WITHIN,
    )


def _in_time(contest: Contest, claim: str, duels: list[tuple[str, str]], first: float) -> Claim:
    """A claim on duels. The first may be lost by a factor, the others must be won."""
    found = [_at_same_time(contest, *duel) for duel in duels]
    return Claim(
        "section 5.4, Fig. 7",
        claim,
        "training loss where the shorter of both trainings ends, compilation counted: "
        + "; ".join(
            f"{a} {_number(loss)} and {b} {_number(other)} after {seconds:,.0f} s"
            for (a, b), (seconds, loss, other) in zip(duels, found, strict=True)
        ),
        judge(
            *(
                loss <= (1.0 if turn else first) * other
                for turn, (_, loss, other) in enumerate(found)
            )
        ),
    )


def _perfect(contest: Contest) -> Claim:
    """Whether the training accuracy reaches 100 %, and when."""
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


def _number(loss: float) -> str:
    """A loss as text."""
    return count(loss, ".4f")


def _medians(contest: Contest, name: str, metric: str) -> tuple[list[int], np.ndarray]:
    steps, _, values = curves(contest, name, metric)
    worst = np.inf if metric == "train_loss" else 0.0
    return steps, np.median(np.nan_to_num(values, nan=worst), axis=0)


def _at_same_time(contest: Contest, *names: str) -> tuple[float, float, float]:
    """When the shorter of two trainings ends, and the last losses of both before this time."""
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


def _end(contest: Contest, name: str) -> float:
    return median(last(contest, name, "train_loss"))


def _losses(contest: Contest, *names: str) -> str:
    return "training loss in the end: " + ", ".join(
        f"{name} {_number(_end(contest, name))}" for name in names
    )
