"""What Paeedeh and Ghiasi-Shirazi say of Fig. 5, and what was measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.page import Claim, Page, count, judge, median, spread
from experiments.pages import contests, protocol, sources
from experiments.pages.contests import Contest, accuracies_then, curves, last, to_target

OURS, SGD = "C-SGD", "SGD"
DEFAULT = "C-SGD, default damping"
STEPS_BAR, SECONDS_BAR = 0.35, 0.5  # the limits that this project sets itself


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    held, data = results["contests"], results["dataset"]["name"]
    first = next(iter(held.values()))
    seconds = first["seconds_per_step"]
    return Page(
        f"{settings.depth} hidden layers on {data}",
        f"{sources.CONSEQUENTIALISM}, section 5.3, Fig. 5",
        protocol.words(settings, results),
        contests.behind(held),
        [*(_bar(title, contest) for title, contest in held.items()), *_source(results)],
        [
            "The source tells no rates of SGD and C-SGD for this figure. Nesterov's momentum is "
            "0.95, as in its section 5.4; Adam and Muon are Optax's, with their defaults.",
            *(
                [
                    f"{DEFAULT} is `cqjax.csgd` as it comes: λ is a tenth of the mean eigenvalue, "
                    "and a bound limits what a step does. C-SGD has the source's λ and no bound."
                ]
                if DEFAULT in first["entrants"]
                else []
            ),
            *contests.measuring(results),
            *(
                f"{name} takes no part: its step takes {seconds[name] / seconds[SGD]:.0f} times "
                f"as long as SGD's ({1e3 * seconds[name]:,.0f} ms) here."
                for name in seconds
                if name not in first["entrants"]
            ),
        ],
        contests.all_tables(held),
        {"losses.png": contests.CAPTION},
    )


def _bar(title: str, contest: Contest) -> Claim:
    """Whether C-SGD keeps the limits that this project sets itself."""
    target, effort = contest["target"], contest["effort"]
    best = target["entrant"]
    steps = median(to_target(contest, OURS, "step")) / effort["steps"]
    theirs = median(last(contest, best, "seconds_with_compilation"))
    seconds = median(to_target(contest, OURS, "seconds_with_compilation")) / theirs
    accuracies = accuracies_then(contest, OURS)
    accuracy = median(last(contest, best, "test_accuracy"))
    return Claim(
        "this project's own bar",
        f"{title} inputs: C-SGD has the training loss that the best of the baselines has in the "
        f"end after at most {STEPS_BAR} of its steps and {SECONDS_BAR} of its seconds, compilation "
        "counted, with a test accuracy not below",
        f"the best is {best} with {count(target['train_loss'], '.4f')} and a test accuracy of "
        f"{accuracy:.2%}; C-SGD "
        + (
            f"takes {steps:.2f} of its steps and {seconds:.2f} of its seconds, and then has "
            f"{spread(accuracies, '.2%')}"
            if steps < np.inf
            else "does not get there in the median"
        ),
        judge(
            steps <= STEPS_BAR,
            seconds <= SECONDS_BAR,
            steps < np.inf and median(accuracies) >= accuracy,
        ),
    )


def _source(results: dict[str, Any]) -> list[Claim]:
    """The claims of the source on this figure."""
    held, data = results["contests"], results["dataset"]["name"]
    seconds = next(iter(held.values()))["seconds_per_step"]
    below = {title: _below(contest) for title, contest in held.items()}
    rises = {
        title: [_rises(contest, name) for name in (OURS, SGD)] for title, contest in held.items()
    }
    times = {title: _seconds_to_sgd(contest) for title, contest in held.items()}
    alike = "Fashion" in data
    ends = {
        title: {
            name: median(last(contest, name, "train_loss"))
            for name, entrant in contest["entrants"].items()
            if entrant["role"] == "baseline"
        }
        for title, contest in held.items()
    }
    claims = [
        Claim(
            "section 5.3, Fig. 5",
            "C-SGD optimizes faster than SGD from the beginning, regardless of the distribution "
            "of the features",
            _each(below, lambda b: f"below SGD's training loss at {b.sum()} of {len(b)} times")
            + ("" if len(held) > 1 else " (the other inputs were not tried)"),
            judge(*(bool(b.all()) for b in below.values())),
        ),
        Claim(
            "section 5.3",
            "more overall stability throughout the training for C-SGD",
            _each(rises, lambda r: f"its training loss rises {r[0]:g} times, SGD's {r[1]:g}"),
            judge(*(ours < sgd for ours, sgd in rises.values())),
        ),
        Claim(
            "section 5.3",
            "its step takes more time than SGD's",
            f"{seconds[OURS] / seconds[SGD]:.2f} times",
            judge(seconds[OURS] > seconds[SGD]),
        ),
        Claim(
            "section 5.3",
            "by elapsed time, both are almost identical on Fashion-MNIST"
            if alike
            else "it stays competitive by elapsed time, too (on CIFAR-10 and CIFAR-100)",
            _each(
                times,
                lambda t: f"SGD's last loss after {count(t[0], ',.1f')} s, SGD {t[1]:,.1f} s",
            ),
            judge(
                *(
                    (0.8 <= ours / sgd <= 1.25 if alike else ours <= sgd)
                    for ours, sgd in times.values()
                )
            ),
        ),
        Claim(
            "section 5.3",
            "SGD does better than other optimizers such as Adam and Nesterov",
            "training loss in the end, "
            + _each(ends, lambda e: ", ".join(f"{k} {count(v, '.4f')}" for k, v in e.items())),
            judge(*(e[SGD] == min(e.values()) for e in ends.values())),
        ),
    ]
    if "CIFAR-100" in data and len(held) > 1:
        both = {
            name: [median(last(held[title], name, "train_loss")) for title in ("raw", "normalised")]
            for name in (OURS, SGD)
        }
        claims.append(
            Claim(
                "section 5.3",
                "for CIFAR-100, normalising the features does not help",
                _each(both, lambda b: f"training loss in the end {b[0]:.4f} raw, {b[1]:.4f}"),
                judge(*(normalised >= raw for raw, normalised in both.values())),
            )
        )
    return claims


def _each(found: Mapping[str, Any], words: Any) -> str:
    return "; ".join(f"{title}: {words(value)}" for title, value in found.items())


def _below(contest: Contest) -> np.ndarray:
    """For each evaluation but the first: whether C-SGD's median loss is below SGD's."""
    ours, sgd = (np.median(curves(contest, name, "train_loss")[2], 0) for name in (OURS, SGD))
    return ours[1:] < sgd[1:]


def _rises(contest: Contest, name: str) -> float:
    """How often the training loss rises from one evaluation to the next, in the median."""
    losses = curves(contest, name, "train_loss")[2]
    return median((~(np.diff(losses) <= 0)).sum(axis=1).tolist())


def _seconds_to_sgd(contest: Contest) -> tuple[float, float]:
    """Seconds until C-SGD has the final loss of SGD, and until SGD has it, with compilation."""
    goal = median(last(contest, SGD, "train_loss"))
    _, seconds, losses = curves(contest, OURS, "train_loss")
    reached = [
        min(s[loss <= goal], default=np.inf) for s, loss in zip(seconds, losses, strict=True)
    ]
    return median(reached), median(last(contest, SGD, "seconds_with_compilation"))


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw losses.png, with a row of panels for each kind of inputs."""
    held = {f"{title} inputs": contest for title, contest in results["contests"].items()}
    contests.draw_all(settings.output / "losses.png", held)
