"""What Paeedeh and Ghiasi-Shirazi say of Fig. 3, and what was measured."""

from typing import Any

import numpy as np

from experiments import drawing
from experiments.page import Claim, Page, before, count, judge, median
from experiments.pages import sources


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    high, low = settings.rates
    ours, sgd, momentum = (result["rates"] for result in results.values())
    lengths = [at["length"] for at in ours]
    flat, steep = sgd[1]["weights_steps"]
    travel = [_travel(at) for at in (sgd[0], momentum[0])]
    crossings = [[at["crossings"][1] for at in method[:2]] for method in (sgd, momentum)]
    swinging = [i for i, at in enumerate(sgd) if i > 1 and at["rate"] * settings.inputs[1] ** 2 > 1]
    calmer = [i for i in swinging if _travel(momentum[i]) < _travel(sgd[i])]
    steps = {method: [at["steps"] for at in result["rates"]] for method, result in results.items()}
    claims = [
        Claim(
            "section 5.1, Fig. 3",
            "C-SGD moves the weights directly towards the optimum, whatever the rate",
            f"its longest path, at {len(ours)} rates from 0.01 to 1, is {max(lengths):.4f} times "
            f"the straight line; SGD's {sgd[0]['length']:.2f} at {high} and "
            f"{sgd[1]['length']:.2f} at {low}, with momentum {momentum[0]['length']:.2f} and "
            f"{momentum[1]['length']:.2f}",
            judge(max(lengths) < 1.01),
        ),
        Claim(
            "section 5.1",
            "one weight of SGD converges fast, the other slowly",
            f"at {low} within 1 % after {steep} and {flat} steps",
            judge(before(steep, flat)),
        ),
        Claim(
            "section 5.1",
            "at a high rate momentum reduces SGD's oscillations in the steep direction",
            f"at {high} that weight travels {count(travel[1], '.1f')} times its distance, by SGD "
            f"{count(travel[0], '.1f')}; of the {len(swinging)} rates tried at which SGD's "
            "oscillates, from "
            f"{min((sgd[i]['rate'] for i in swinging), default=1):.2f} on, momentum reduces it at "
            f"{len(calmer)}, from {min((sgd[i]['rate'] for i in calmer), default=1):.2f} on",
            judge(travel[1] < travel[0], len(calmer) == len(swinging)),
        ),
        Claim(
            "section 5.1",
            "but makes the other weight pass its optimum",
            f"by {momentum[0]['overshoot'][0]:.0%} of its distance at {high}",
            judge(momentum[0]["overshoot"][0] > 0.01),
        ),
        Claim(
            "section 5.1",
            "a small rate ends SGD's oscillations, and reduces those with momentum",
            f"crossings of the steep optimum on the way to 1 %: SGD {crossings[0][0]} at {high}, "
            f"{crossings[0][1]} at {low}; with momentum {crossings[1][0]} and {crossings[1][1]}",
            judge(crossings[0][1] == 0 < crossings[0][0], crossings[1][1] < crossings[1][0]),
        ),
        Claim(
            "section 5.1",
            "at the cost of more steps",
            "; ".join(f"{name} {n[0]} at {high}, {n[1]} at {low}" for name, n in steps.items()),
            judge(*(before(*n[:2]) for name, n in steps.items() if name != "C-SGD")),
        ),
    ]
    behind = [
        f"At the rate {rate} {method} is within 1 % of the optimum after {steps[method][i]} steps, "
        f"C-SGD after {steps['C-SGD'][i]}."
        for i, rate in enumerate(settings.rates)
        for method in steps
        if before(steps[method][i], steps["C-SGD"][i])
    ]
    rows = [
        {
            "method": method,
            "rate": f"{rate:g}",
            "steps to 1 %": str(at["steps"]),
            "path / straight line": f"{at['length']:.3f}",
            "steep weight's travel": count(_travel(at), ".2f"),
            "flat weight's overshoot": f"{at['overshoot'][0]:.0%}",
        }
        for i, rate in enumerate(settings.rates)
        for method, at in ((method, result["rates"][i]) for method, result in results.items())
    ]
    best = [
        {
            "method": method,
            "fewest steps to 1 %, at any rate": str(min(filter(None, n), default=None)),
            f"seconds for {len(n)} paths": f"{results[method]['seconds']:.3f}",
            "compilation": f"{results[method]['compile_seconds']:.2f}",
        }
        for method, n in steps.items()
    ]
    return Page(
        "Two weights on the loss surface",
        f"{sources.CONSEQUENTIALISM}, section 5.1, Figs. 2 and 3",
        "Two layers of one weight each, z = wx, with half the squared error: the contours are "
        "ellipses, steep along one weight, flat along the other. All methods start from the same "
        "weights and take the same rate: a high one, just under where SGD diverges, a low one, and "
        "many between 0.01 and 1. Nothing is random.",
        behind,
        claims,
        [
            "The source gives no numbers. Inputs, targets, first weights and both rates are ours; "
            "the high rate is 0.98 of SGD's limit, 2 / max x².",
            "Momentum is 0.9, C-SGD's λ 1e-3: it is what bends C-SGD's path at all.",
            "Steps count until the distance to the optimum is, and stays, at most 1 % of the "
            "first; *travel* is the distance walked along one weight, in first distances.",
        ],
        {"The paths": rows, "The best of all rates": best},
        {
            "paths.png": "The first 120 steps over contours of the loss (values in grey); how long "
            "paths are."
        },
    )


def _travel(at: dict[str, Any]) -> float:
    """How far the steep weight walks, in first distances. It is infinite if it diverges."""
    return median([at["travel"][1]])


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw paths.png: the paths at both rates, and the lengths at all rates."""
    x = np.array(settings.inputs)
    optimum = settings.targets / x
    figure, axes = drawing.panels(1, 3, (4.6, 4.4))
    w = np.stack(np.meshgrid(np.linspace(-2, 5, 81), np.linspace(-1, 3, 81)), axis=-1)
    loss = 0.5 * np.sum(((w - optimum) * x) ** 2, axis=-1)
    for i, (word, rate) in enumerate(zip(("High", "Low"), settings.rates, strict=True)):
        levels = [0.05, 0.2, 0.5, 1, 2, 4, 8]
        lines = axes[i].contour(*np.moveaxis(w, -1, 0), loss, levels, colors="0.7", linewidths=0.8)
        axes[i].clabel(lines, fontsize=7)
        for number, (method, result) in enumerate(results.items()):
            style = drawing.style(number, markersize=3, zorder=5 - number)
            axes[i].plot(*np.transpose(result["paths"][i]), label=method, **style)
        axes[i].plot(*settings.start, "k*", markersize=13, label="start", zorder=6)
        axes[i].plot(*optimum, "kX", markersize=10, label="optimum", zorder=6)
        axes[i].set(title=f"{word} rate, {rate:g}", xlabel="weight $w_1$", ylabel="weight $w_2$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    for number, result in enumerate(results.values()):
        arriving = [(at["rate"], at["length"]) for at in result["rates"][2:] if at["steps"]]
        if arriving:
            axes[2].loglog(*zip(*arriving, strict=True), markevery=6, **drawing.style(number))
    axes[2].set(title="All rates at which it arrives", xlabel="learning rate")
    axes[2].set_ylabel("path / straight line")
    drawing.save(figure, settings.output / "paths.png")
