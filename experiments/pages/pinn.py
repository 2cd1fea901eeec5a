"""What this library says of weights that are used forwards and backwards, and what was measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import drawing
from experiments.everyday.entrants import ADAM, AT_DEFAULT_RATE, DEFAULTS, OURS, WARM_UP
from experiments.page import Claim, Page, count, judge, median
from experiments.pages import contests, kinds
from experiments.pages.contests import last
from experiments.pages.kinds import Held, ahead, share
from experiments.pinn.entrants import LBFGS
from experiments.pinn.experiment import KINDS, SIDE
from experiments.pinn.gan import MODES, PENALTY
from experiments.pinn.work import ERROR, POSED

ERROR_BAR = 0.5  # of Adam's
DOCUMENT = "this library's own words"


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The library's claims, judged by the results."""
    held: Held = results["contests"]
    claims = _claims(held, settings.dampings)
    if set(held) != set(KINDS) or settings.length < 1 or settings.tries < 3:  # nobody is tuned
        claims = [claim._replace(holds="open") for claim in claims]
    return Page(
        "Weights used forwards and backwards",
        DOCUMENT,
        _summary(settings, results),
        kinds.behind(held, {ERROR: "error"}, ERROR),
        claims,
        [
            f"All rates rise for the first {WARM_UP:.0%} of the steps and then fall to zero as a "
            "cosine. The rate of an optimizer is the peak.",
            f"{LBFGS} is Optax's with its line search. What stands for its rate is how many "
            "updates it remembers; that grid is not extended. One of its steps evaluates loss and "
            "gradient several times.",
            f"A number after the name {OURS} is its relative damping, instead of 0.1.",
            f"{AT_DEFAULT_RATE} has a peak of 0.01, for all parameters, and had no tuning runs. "
            f"{DEFAULTS}, is `cqjax.cadam` as it comes: constant at 0.01.",
            "The border's weight in the loss, "
            + ", ".join(f"{posed.weight:g} for {kind}" for kind, posed in POSED.items())
            + f", is the best of 1, 10 and 100 for {ADAM}.",
            "Rates are picked by the loss at other places, as one does who has no solution. The "
            "GAN's are picked by its error at other points, since its loss says nothing. In the "
            f"GAN, all optimizers have b1 = 0.5, the penalty's weight is {PENALTY:g}, and both "
            "networks take their steps at once.",
            "A step or second counts when the next evaluation, 15 in a run, finds the target "
            "reached. Seconds are of training; evaluation is off the clock. Compilation is counted "
            "once for each optimizer, where it says so.",
            *kinds.at_edges(held),
        ],
        {
            "Error in the end": kinds.last_values(held, ERROR),
            "Validation loss in the end": kinds.last_values(held, "validation_loss"),
            "Training loss in the end": kinds.last_values(held, "train_loss"),
            **kinds.costs(held, f"{ADAM}'s last error", [ERROR]),
        },
        _figures(results),
    )


def _figures(results: dict[str, Any]) -> dict[str, str]:
    """The captions."""
    figures = {
        "steps.png": f"Error by steps. {contests.CAPTION}",
        "seconds.png": f"Error by seconds, without compiling. {contests.CAPTION}",
    }
    if results["fields"]:
        figures["fields.png"] = (
            f"The solutions, and the errors of {ADAM} and {OURS} in the end, at the first seed."
        )
    return figures


def _summary(settings: Any, results: dict[str, Any]) -> str:
    """What was done."""
    effort = next(iter(results["contests"].values()))["effort"]
    lengths = ", ".join(
        f"{title} {c['effort']['steps']:,} of {c['effort']['batch_size']}"
        for title, c in results["contests"].items()
    )
    written = {
        "reverse": "`jax.grad`: each of their weights is used forwards and backwards",
        "forward": "`jax.jvp`: each of their weights is used forwards alone, except for "
        "the text's table",
    }[settings.mode]
    return (
        "poisson: -Δu = 2π² sin(πx) sin(πy) on the unit square, by three layers of 64 tanh. "
        "burgers: u_t + u u_x = 0.03 u_xx from u = -sin(πx), by the same network. Loss: mean "
        "squared residual at all places inside, plus a multiple of the mean squared error at a "
        "fourth as many places on the border. Error: the distance from the true field on a grid "
        f"of {settings.side} by {settings.side} places, by the norm of this field. gan: "
        f"a generator and a critic with a gradient penalty, of {MODES} clusters on a circle. "
        f"Error: the 1-Wasserstein distance between {settings.evaluated} generated and as many "
        "true points. tied: a character language model on Python's standard library, whose table "
        "of embeddings is its last layer, too. Error: the cross-entropy of texts it has not seen. "
        f"Steps and batch sizes: {lengths}. The networks are differentiated by {written}. "
        f"Each optimizer had {settings.tries} tuning runs of full length at rates half "
        f"a decade apart, and up to {settings.extensions} more, one at a time, while the best rate "
        "was at the edge of those tried. The rate with the lowest validation loss in the end then "
        f"ran at {effort['seeds']} other seed{'s' * (effort['seeds'] > 1)}. At each seed all "
        "optimizers share first weights and batches (medians, and ranges in brackets). The target "
        f"is the error that {ADAM} has in the end, in the median."
    )


def _claims(held: Held, dampings: Sequence[float]) -> list[Claim]:
    """What the library says, and the verdicts."""
    posed = {title: contest for title, contest in held.items() if title in POSED}
    others = {title: contest for title, contest in held.items() if title not in POSED}
    untuned = {title: ahead(contest, AT_DEFAULT_RATE, ERROR) for title, contest in held.items()}
    names = {OURS: OURS} | {
        f"{OURS}, {damping:g}": f"{OURS} with a relative damping of {damping:g}"
        for damping in dampings
    }
    claims = {}
    for name, words in names.items():
        parts = {
            title: median(last(contest, name, ERROR)) / median(last(contest, ADAM, ERROR))
            for title, contest in posed.items()
        }
        sooner = {title: share(contest, name, "seconds") for title, contest in posed.items()}
        claims |= {
            f"on differential equations, {words} ends with at most {ERROR_BAR:g} of tuned {ADAM}'s "
            "error after as many steps": (
                f"{_shares(parts)}: {kinds.ends(posed, name, ERROR)}",
                [part <= ERROR_BAR for part in parts.values()],
            ),
            f"there, {words} needs fewer seconds to {ADAM}'s last error": (
                _shares(sooner),
                [part < 1 for part in sooner.values()],
            ),
        }
    claims |= {
        f"{OURS} ends with a lower error than tuned {ADAM} where a GAN has a gradient penalty, and "
        "where a language model has one table for two layers": (
            kinds.ends(others, OURS, ERROR),
            [ahead(contest, OURS, ERROR) for contest in others.values()],
        ),
        f"untuned, with a peak of 0.01, {OURS} is ahead of tuned {ADAM} on all": (
            f"on {sum(untuned.values())} of {len(held)}: "
            + kinds.ends(held, AT_DEFAULT_RATE, ERROR),
            list(untuned.values()),
        ),
    }
    return [
        Claim(DOCUMENT, claim, measured, judge(*checks) if checks else "open")
        for claim, (measured, checks) in claims.items()
    ]


def _shares(parts: dict[str, float]) -> str:
    return ", ".join(f"{title} {count(part, '.2f')}" for title, part in parts.items())


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw steps.png and seconds.png, with a panel for each kind of work, and fields.png."""
    kinds.draw(settings, results["contests"], ERROR, "error", highest=30)
    if not results["fields"]:
        return
    figure, axes = drawing.panels(len(results["fields"]), 3, (3.8, 3.2))
    for row, (kind, fields) in zip(axes.reshape(-1, 3), results["fields"].items(), strict=True):
        equation = POSED[kind].equation
        (left, bottom), (right, top) = equation.low, equation.high
        true = np.array(fields["true"])
        errors = {name: np.array(fields[name]) - true for name in (ADAM, OURS)}
        most = max(np.nanmax(np.abs(error)) for error in errors.values())
        shown = {f"{kind}: the solution": (true, np.abs(true).max(), "viridis")} | {
            f"error of {name}": (error, most, "RdBu_r") for name, error in errors.items()
        }
        for panel, (title, (field, most_, colours)) in zip(row, shown.items(), strict=True):
            panel.grid(False)
            picture = panel.imshow(
                field.reshape(SIDE, SIDE).T,
                origin="lower",
                extent=(left, right, bottom, top),
                aspect="auto",
                vmin=-most_,
                vmax=most_,
                cmap=colours,
            )
            panel.set(title=title, xlabel="x", ylabel="t" if kind == "burgers" else "y")
            figure.colorbar(picture, ax=panel)
    drawing.save(figure, settings.output / "fields.png")
