"""What Jawahar (2019) says, and what doing the lecture's homework showed."""

from typing import Any

import numpy as np

from experiments.homework import GAUSSIANS, INITIALISATIONS, LOSSES, RATES, WEIGHTS
from experiments.page import Claim, Page, count, judge, median, spread
from experiments.pages import sources
from experiments.pages.lecture_figures import draw as draw


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    training = results["training"]
    steps = {
        (loss, kind): _steps_to_sgd(training[loss], kind, results["at"])
        for loss in LOSSES
        for kind in GAUSSIANS
    }
    behind = [
        f"{loss.capitalize()} loss, Gaussians {kind}, weights {first}: C-SGD's test accuracy is "
        f"{_accuracy(training, loss, 'C-SGD', kind, first):.1%} in the median, {best}'s "
        f"{_accuracy(training, loss, best, kind, first):.1%}."
        for loss in LOSSES
        for kind in GAUSSIANS
        for first in INITIALISATIONS
        for best in [max(RATES, key=lambda m: _accuracy(training, loss, m, kind, first))]
        if _accuracy(training, loss, best, kind, first)
        > 0.01 + _accuracy(training, loss, "C-SGD", kind, first)
    ]
    behind += [
        f"{loss.capitalize()} loss, Gaussians {kind}: {method} is at SGD's last training loss "
        f"after {count(found[method])} steps, C-SGD after {count(found['C-SGD'])}."
        for (loss, kind), found in steps.items()
        for method in found
        if found[method] < found["C-SGD"]
    ]
    seconds = {m: sum(training[loss][m]["seconds"] for loss in LOSSES) for m in RATES}
    behind += _pruning_behind(results["pruning"])
    compiling = {m: sum(training[loss][m]["compile_seconds"] for loss in LOSSES) for m in RATES}
    behind.append(
        f"A step of C-SGD takes {seconds['C-SGD'] / seconds['SGD']:.1f} times as long as SGD's, "
        "in networks as small as this."
    )
    return Page(
        "A lecture's homework: first weights, losses, L2, pruning",
        f"{sources.LECTURE}, sections 19.123 and 19.124 and homework 1 to 3",
        "A network of 2-3-5-3-1 neurons, sigmoids in the hidden layers, divides two Gaussians in "
        "the plane: *apart*, where a straight line does nearly as well as any curve, and "
        "*around*, where one lies around the other and no line does. It has 200 points to train "
        "with, 200 to choose the rate by, 1,000 to test. Each optimizer had six rates for every "
        "case, and has the one with the least validation loss; data, first weights and batches "
        f"are the same for all. Medians of {settings.seeds} seeds, and ranges in brackets.",
        behind,
        [
            *_first_weights(training),
            *_losses(training, steps),
            _l2(results["decays"]),
            *_pruning(results["pruning"]),
        ],
        [
            "The source names neither the Gaussians, the sizes, the rates, the number of steps "
            "nor the optimizer; batches of 20 for homework 2 and 3 alike, classes ±1, a linear "
            "output.",
            "*Random* weights are standard normal; biases are zero in all cases. From equal "
            "weights C-SGD's neurons, too, would stay equal in exact arithmetic.",
            "L2 is tried with Adam, from 40 training points, on *around*: the squared norm of all "
            "parameters, times a coefficient, is part of the loss. (C-SGD would want its decay "
            "after the solve.)",
            "Pruning starts from networks that Adam trained on *around* by squared error. *By and "
            "by*: at each sparsity the smallest weights decay by a tenth a step while the others "
            f"are trained, for {settings.retraining} steps, and as many steps without them follow.",
        ],
        {
            **{
                f"Test accuracy (rate), {loss} loss": _accuracies(training[loss]) for loss in LOSSES
            },
            "Steps until SGD's last training loss, random weights": [
                {"loss": loss, "Gaussians": kind, **{m: count(n) for m, n in found.items()}}
                for (loss, kind), found in steps.items()
            ],
            "Seconds for all cases, rates and seeds, both losses": [
                {
                    "optimizer": method,
                    "training": f"{seconds[method]:.1f}",
                    "compilation": f"{compiling[method]:.1f}",
                }
                for method in RATES
            ],
            "L2": _l2_rows(results["decays"]),
            "Pruning: test accuracy": _pruning_rows(results["pruning"]),
        },
        {
            "training.png": "Training loss from random weights: medians and ranges of the seeds.",
            "initialisation.png": "Test accuracy by first weights, squared loss.",
            "regularisation.png": "L2 with Adam from 40 points: medians.",
            "pruning.png": "Test accuracy against the part of the weights that is removed.",
        },
    )


def _accuracies(training: Any) -> list[dict[str, str]]:
    return [
        {
            "Gaussians": kind,
            "first weights": first,
            **{
                m: f"{spread(found['last']['accuracy'], '.1%')} ({found['rate']:g})"
                for m in RATES
                for found in [training[m][kind][first]]
            },
        }
        for kind in GAUSSIANS
        for first in INITIALISATIONS
    ]


def _accuracy(training: Any, loss: str, method: str, kind: str, first: str) -> float:
    """The median of the final test accuracies."""
    return median(training[loss][method][kind][first]["last"]["accuracy"])


def _steps_to_sgd(training: Any, kind: str, at: list[int]) -> dict[str, float]:
    """Steps until the median training loss reaches the final one of SGD."""
    curves = {m: np.array(training[m][kind]["random"]["training_loss"][0]) for m in RATES}
    there = {m: np.flatnonzero(curve <= curves["SGD"][-1]) for m, curve in curves.items()}
    return {m: float(at[i[0]]) if len(i) else np.inf for m, i in there.items()}


def _first_weights(training: Any) -> list[Claim]:
    """The claims on first weights."""
    best = {
        kind: {
            first: max(_accuracy(training, "squared", m, kind, first) for m in RATES)
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
        (m, kind): [_accuracy(training, "squared", m, kind, x) for x in ("random", "Xavier")]
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


def _losses(training: Any, steps: Any) -> list[Claim]:
    """The claims on momentum and on losses."""
    hinges = {
        (m, kind): [_accuracy(training, loss, m, kind, "random") for loss in LOSSES]
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


def _l2(decays: Any) -> Claim:
    """The claim on L2."""
    accuracies = [median(last["accuracy"]) for last in decays["last"]]
    gaps = [median(last["training_accuracy"]) - median(last["accuracy"]) for last in decays["last"]]
    best = int(np.argmax(accuracies[1:])) + 1
    return Claim(
        "section 19.124.1, homework 3",
        "adding the squared norm of the weights to the loss prevents overfitting",
        f"test accuracy {accuracies[0]:.1%} without, {accuracies[best]:.1%} with "
        f"{decays['decays'][best]:g} times it; training accuracy is above that by {gaps[0]:.1%} "
        f"and {gaps[best]:.1%}; with once it, as printed, test accuracy {accuracies[-1]:.1%}",
        judge(accuracies[best] > accuracies[0], gaps[best] < gaps[0], accuracies[-1] > 0.55),
    )


def _pruning(results: Any) -> list[Claim]:
    """The claims on removing small weights."""
    first = next(iter(results.values()))
    whole, once, removed = median(first["whole"]), _once(first), first["removed"]
    few = [i for i, n in enumerate(removed) if n <= WEIGHTS / 4]
    recovered = {m: _recovered(result) for m, result in results.items()}
    sparse = {m: _sparsest(result, _gradual(result)) for m, result in results.items()}
    at_once = {
        m: [_sparsest(result, _once(result)[:, i]) for i in (0, -1)]
        for m, result in results.items()
    }
    return [
        Claim(
            "section 19.124.1",
            "removing some of the tiny weights need not change the performance",
            f"test accuracy {whole:.1%}; without retraining "
            + ", ".join(f"{once[i, 0]:.1%} without {removed[i]} of {WEIGHTS} weights" for i in few),
            judge(*(once[i, 0] >= whole - 0.01 for i in few)),
        ),
        Claim(
            "section 19.124.1",
            "one or two iterations recover what is lost",
            "of the accuracy that was lost, where that is over 1 % and up to half of the weights "
            "are removed, two iterations recover: "
            + ", ".join(f"{m} {share:.0%}" for m, share in recovered.items()),
            judge(*(share >= 0.9 for share in recovered.values())),
        ),
        Claim(
            "homework 3",
            "decaying and retraining step by step keeps the performance",
            "most weights removed with an accuracy within 1 % of the whole network's, by and by / "
            "at once without retraining / at once with it: "
            + "; ".join(
                f"{m} {sparse[m]:.0%} / {a:.0%} / {b:.0%}" for m, (a, b) in at_once.items()
            ),
            judge(*(sparse[m] > n for m in results for n in at_once[m])),
        ),
    ]


def _pruning_behind(results: Any) -> list[str]:
    """Where networks that C-SGD retrains bear less pruning than others."""
    sparse = {m: _sparsest(result, _gradual(result)) for m, result in results.items()}
    ours = sparse.get("C-SGD", 1.0)
    return [
        f"Pruned by and by, a network keeps its accuracy without {part:.0%} of its weights when "
        f"{method} retrains it, without {ours:.0%} when C-SGD does."
        for method, part in sparse.items()
        if part > ours
    ]


def _once(result: Any) -> np.ndarray:
    """Median accuracies `(counts, 4)`: removed at once, then 0, 1, 2 and all iterations."""
    return np.median(result["at_once"], axis=0)


def _gradual(result: Any) -> np.ndarray:
    return np.median(result["by_and_by"], axis=0)


def _recovered(result: Any) -> float:
    """The part of the lost accuracy that two iterations recover."""
    once, whole = _once(result), median(result["whole"])
    counts = np.array(result["removed"])
    lost = (whole - once[:, 0] > 0.01) & (counts <= WEIGHTS / 2)
    gain = np.sum((once[:, 2] - once[:, 0])[lost])
    return float(gain / np.sum((whole - once[:, 0])[lost])) if lost.any() else 1.0


def _sparsest(result: Any, accuracies: np.ndarray) -> float:
    """The largest part of the weights that can go without loss of more than 1 % of accuracy."""
    fine = np.flatnonzero(accuracies >= median(result["whole"]) - 0.01)
    return result["removed"][fine[-1]] / WEIGHTS if len(fine) else 0.0


def _l2_rows(decays: Any) -> list[dict[str, str]]:
    """The rows of the table on L2."""
    return [
        {
            "coefficient": f"{decay:g}",
            "test accuracy": spread(last["accuracy"], ".1%"),
            "training accuracy": spread(last["training_accuracy"], ".1%"),
            "training loss": spread(last["training_loss"], ".3f"),
            "squared norm": spread(last["squared_norm"], ".3g"),
        }
        for decay, last in zip(decays["decays"], decays["last"], strict=True)
    ]


def _pruning_rows(results: Any) -> list[dict[str, str]]:
    """The rows of the table on pruning."""
    return [
        {
            "retrained by": method,
            "removed": f"{removed / WEIGHTS:.0%}",
            **{
                f"at once, {after}": f"{value:.1%}"
                for after, value in zip(("0 iterations", "1", "2", "all"), once, strict=True)
            },
            "by and by": spread(gradual, ".1%"),
        }
        for method, result in results.items()
        for removed, once, gradual in zip(
            result["removed"], _once(result), np.transpose(result["by_and_by"]), strict=True
        )
    ]
