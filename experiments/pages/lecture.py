"""What a lecture (seed 002) says, and what doing its homework showed."""

from typing import Any

from experiments.homework import GAUSSIANS, INITIALISATIONS, LOSSES, RATES
from experiments.page import Page, count, spread
from experiments.pages import regularisation
from experiments.pages.first_weights import accuracy, first_weights, losses, steps_to_sgd
from experiments.pages.lecture_figures import draw as draw

SOURCE = "C. V. Jawahar, *More on Backpropagation*, CSE 475: Statistical Methods in AI, 2019"


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    training = results["training"]
    steps = {
        (loss, kind): steps_to_sgd(training[loss], kind, results["at"])
        for loss in LOSSES
        for kind in GAUSSIANS
    }
    behind = [
        f"{loss.capitalize()} loss, Gaussians {kind}, weights {first}: C-SGD's test accuracy is "
        f"{accuracy(training, loss, 'C-SGD', kind, first):.1%} in the median, {best}'s "
        f"{accuracy(training, loss, best, kind, first):.1%}."
        for loss in LOSSES
        for kind in GAUSSIANS
        for first in INITIALISATIONS
        for best in [max(RATES, key=lambda m: accuracy(training, loss, m, kind, first))]
        if accuracy(training, loss, best, kind, first)
        > 0.01 + accuracy(training, loss, "C-SGD", kind, first)
    ]
    behind += [
        f"{loss.capitalize()} loss, Gaussians {kind}: {method} is at SGD's last training loss "
        f"after {count(found[method])} steps, C-SGD after {count(found['C-SGD'])}."
        for (loss, kind), found in steps.items()
        for method in found
        if found[method] < found["C-SGD"]
    ]
    seconds = {m: sum(training[loss][m]["seconds"] for loss in LOSSES) for m in RATES}
    behind += regularisation.pruning_behind(results["pruning"])
    compiling = {m: sum(training[loss][m]["compile_seconds"] for loss in LOSSES) for m in RATES}
    behind.append(
        f"A step of C-SGD takes {seconds['C-SGD'] / seconds['SGD']:.1f} times as long as SGD's, "
        "in networks as small as this."
    )
    return Page(
        "A lecture's homework: first weights, losses, L2, pruning",
        f"{SOURCE}, sections 19.123 and 19.124 and homework 1 to 3",
        "A network of 2-3-5-3-1 neurons, sigmoids in the hidden layers, divides two Gaussians in "
        "the plane: *apart*, where a straight line does nearly as well as any curve, and "
        "*around*, where one lies around the other and no line does. It has 200 points to train "
        "with, 200 to choose the rate by, 1,000 to test. Each optimizer had six rates for every "
        "case, and has the one with the least validation loss; data, first weights and batches "
        f"are the same for all. Medians of {settings.seeds} seeds, and ranges in brackets.",
        behind,
        [
            *first_weights(training),
            *losses(training, steps),
            regularisation.l2(results["decays"]),
            *regularisation.pruning(results["pruning"]),
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
            "L2": regularisation.l2_rows(results["decays"]),
            "Pruning: test accuracy": regularisation.pruning_rows(results["pruning"]),
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
