"""What section 5.4 of seed 000 says of ResNet-20, judged by what was measured."""

from experiments.page import Claim, judge, median
from experiments.pages import resnet20_course
from experiments.pages.contests import Contest, last
from experiments.pages.resnet20_course import POINTS, WITHIN, number

LONG = 8000  # iterations after which the source has C-SGD at a training accuracy of 100 %


def claims(contest: Contest) -> list[Claim]:
    """Of the optimizers that took part."""
    names = contest["entrants"]
    return [
        _reach(contest),
        *([_nesterov(contest)] if "Nesterov" in names else []),
        _plain(contest),
        *([_adam(contest)] if "Adam" in names else []),
        resnet20_course.beginning(contest),
        resnet20_course.alike(contest),
        resnet20_course.seconds_without(contest),
        resnet20_course.seconds_with(contest),
        *([resnet20_course.perfect(contest)] if contest["effort"]["steps"] >= LONG else []),
        *([_settings(contest)] if contest["variants"] else []),
    ]


def unchecked(contest: Contest) -> list[str]:
    """What runs of this length cannot show."""
    steps = contest["effort"]["steps"]
    if steps >= LONG:
        return []
    return [
        f"Runs have {steps:,} steps. The source has a training accuracy of 100 % after about 8,000 "
        "(C-SGD) and 7,000 (C-Nesterov), and SGD-BN ahead of C-SGD after 25,000: not checked here."
    ]


def _reach(contest: Contest) -> Claim:
    """The question that this project asks."""
    ours, bn = (_end(contest, name) for name in ("C-SGD", "SGD-BN"))
    accuracies = {
        metric: [median(last(contest, name, metric)) for name in ("C-SGD", "SGD-BN")]
        for metric in ("train_accuracy", "test_accuracy")
    }
    return Claim(
        "section 5.4, Fig. 6",
        "C-SGD without BN is within reach of SGD with it: here, its training loss in the end is at "
        f"most {WITHIN} times SGD-BN's, and training and test accuracy at most {POINTS:.0%} below",
        f"training loss {number(ours)} and {number(bn)}; "
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
        f"C-SGD {number(ours)}, SGD-BN {number(bn)}; less than C-SGD's: "
        + (", ".join(f"{words} {number(loss)}" for loss, words in better) or "none"),
        judge(not better),
    )


def _end(contest: Contest, name: str) -> float:
    return median(last(contest, name, "train_loss"))


def _losses(contest: Contest, *names: str) -> str:
    return "training loss in the end: " + ", ".join(
        f"{name} {number(_end(contest, name))}" for name in names
    )
