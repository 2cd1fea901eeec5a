"""The figures of the lecture's page."""

from typing import Any

import numpy as np

from experiments import drawing
from experiments.homework import GAUSSIANS, INITIALISATIONS, LOSSES, RATES, WEIGHTS
from experiments.page import median


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw all figures into the output folder."""
    training, folder = results["training"], settings.output
    drawing.save(_training(training, results["at"]), folder / "training.png")
    drawing.save(_initialisation(training["squared"]), folder / "initialisation.png")
    drawing.save(_l2(results["decays"], results["at"]), folder / "regularisation.png")
    drawing.save(_pruning(results["pruning"]), folder / "pruning.png")


def _training(training: Any, at: list[int]) -> Any:
    figure, axes = drawing.panels(2, 2, (5, 3.6))
    panels = [(kind, loss) for kind in GAUSSIANS for loss in LOSSES]
    for axis, (kind, loss) in zip(axes, panels, strict=True):
        for number, method in enumerate(RATES):
            found = training[loss][method][kind]["random"]
            label = f"{method}, rate {found['rate']:g}"
            middle, low, high = found["training_loss"]
            drawing.band(axis, at, middle, low, high, label, number)
        top = max(1, training[loss]["Adam"][kind]["random"]["training_loss"][0][0])
        axis.set(title=f"{loss} loss, Gaussians {kind}", xlabel="iterations", ylim=(0, 1.3 * top))
        axis.set_ylabel(f"training loss ({loss})")
        axis.legend(fontsize="small")
    return figure


def _initialisation(training: Any) -> Any:
    figure, axes = drawing.panels(1, 2, (5, 3.6))
    for axis, kind in zip(axes, GAUSSIANS, strict=True):
        for number, method in enumerate(RATES):
            cases = [training[method][kind][first] for first in INITIALISATIONS]
            low, middle, high = np.quantile(
                [case["last"]["accuracy"] for case in cases], (0, 0.5, 1), axis=1, method="nearest"
            )
            place = np.arange(len(cases)) + 0.15 * (number - 1.5)
            style = drawing.style(number, linestyle="", markersize=6)
            ranges = [middle - low, high - middle]
            axis.errorbar(place, middle, ranges, label=method, capsize=3, **style)
        axis.set_xticks(range(len(INITIALISATIONS)), INITIALISATIONS)
        axis.set(title=f"Gaussians {kind}", ylabel="test accuracy", xlabel="first weights")
    axes[1].legend(fontsize="small", loc="upper left")
    return figure


def _l2(decays: Any, at: list[int]) -> Any:
    figure, axes = drawing.panels(1, 2, (5, 3.6))
    for axis, (name, curves) in zip(axes, decays["curves"].items(), strict=True):
        for number, (decay, curve) in enumerate(zip(decays["decays"], curves, strict=True)):
            style = drawing.style(number, markevery=max(1, len(at) // 8))
            axis.plot(at, curve, label=f"{decay:g}", **style)
        axis.set(xlabel="iterations", ylabel=name.replace("accuracy", "test accuracy"))
    axes[1].set(yscale="symlog", ylabel="squared norm of all parameters")
    axes[0].legend(title="coefficient of L2", fontsize="small")
    return figure


def _pruning(results: Any) -> Any:
    figure, axes = drawing.panels(1, 2, (5, 3.6))
    removed = np.array(results["Adam"]["removed"]) / WEIGHTS
    once = np.median(results["Adam"]["at_once"], axis=0).T
    words = ("not retrained", "1 iteration", "2 iterations", "all iterations")
    lines = dict(zip((f"at once, {word}" for word in words), once, strict=True))
    lines["by and by"] = np.median(results["Adam"]["by_and_by"], axis=0)
    for number, (label, line) in enumerate(lines.items()):
        axes[0].plot(removed, line, label=label, **drawing.style(number))
    for number, (method, result) in enumerate(results.items()):
        low, middle, high = np.quantile(result["by_and_by"], (0, 0.5, 1), axis=0)
        drawing.band(axes[1], removed, middle, low, high, method, number)
    axes[0].set(title="retrained by Adam, medians", ylabel="test accuracy")
    axes[1].set(title="by and by, medians and ranges", ylabel="test accuracy")
    for axis in axes:
        axis.axhline(median(results["Adam"]["whole"]), color="0.4", linewidth=0.8)
        axis.set(xlabel="part of the weights removed", xlim=(0, 1), ylim=(0.45, 1))
        axis.legend(fontsize="small")
    return figure
