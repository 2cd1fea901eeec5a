"""What a lecture (seed 002) says of L2 and of pruning, and what its homework showed."""

from typing import Any

import numpy as np

from experiments.page import Claim, judge, median, spread

WEIGHTS = 39  # of 2-3-5-3-1


def l2(decays: Any) -> Claim:
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


def pruning(results: Any) -> list[Claim]:
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


def pruning_behind(results: Any) -> list[str]:
    """Where C-SGD's networks bear less pruning than another's."""
    sparse = {m: _sparsest(result, _gradual(result)) for m, result in results.items()}
    ours = sparse.get("C-SGD", 1.0)
    return [
        f"Pruned by and by, a network keeps its accuracy without {part:.0%} of its weights when "
        f"{method} retrains it, without {ours:.0%} when C-SGD does."
        for method, part in sparse.items()
        if part > ours
    ]


def _once(result: Any) -> np.ndarray:
    """Median accuracies `(counts, 4)` after removal at once, and 0, 1, 2, and all iterations."""
    return np.median(result["at_once"], axis=0)


def _gradual(result: Any) -> np.ndarray:
    return np.median(result["by_and_by"], axis=0)


def _recovered(result: Any) -> float:
    """What part of the accuracy lost is back after two iterations."""
    once, whole = _once(result), median(result["whole"])
    counts = np.array(result["removed"])
    lost = (whole - once[:, 0] > 0.01) & (counts <= WEIGHTS / 2)
    gain = np.sum((once[:, 2] - once[:, 0])[lost])
    return float(gain / np.sum((whole - once[:, 0])[lost])) if lost.any() else 1.0


def _sparsest(result: Any, accuracies: np.ndarray) -> float:
    """The largest part of the weights without which the accuracy is nearly the whole network's."""
    fine = np.flatnonzero(accuracies >= median(result["whole"]) - 0.01)
    return result["removed"][fine[-1]] / WEIGHTS if len(fine) else 0.0


def l2_rows(decays: Any) -> list[dict[str, str]]:
    """A table's."""
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


def pruning_rows(results: Any) -> list[dict[str, str]]:
    """A table's."""
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
