"""What this library says of everyday work, and what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import drawing
from experiments.everyday.entrants import ADAM, AT_DEFAULT_RATE, DEFAULTS, OURS, WARM_UP
from experiments.everyday.experiment import KINDS
from experiments.page import Claim, Page, count, judge, spread
from experiments.pages import contests, kinds
from experiments.pages.contests import Contest, curves, last
from experiments.pages.kinds import Held, diverged, share

STEPS_BAR = 0.6  # of Adam's
DOCUMENT = "this library's own words"
JUDGED = "validation_loss"
LOSSES = {"validation_loss": "validation loss", "train_loss": "training loss"}


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The library's claims, judged by the results."""
    held: Held = results["contests"]
    claims = _claims(held)
    if set(held) != set(KINDS) or settings.length < 1 or settings.tries < 3:  # nobody is tuned
        claims = [claim._replace(holds="open") for claim in claims]
    return Page(
        "Six kinds of everyday work",
        DOCUMENT,
        _summary(settings, results),
        kinds.behind(held, LOSSES, JUDGED),
        claims,
        [
            f"All rates rise for the first {WARM_UP:.0%} of the steps and then fall to zero as a "
            "cosine. The rate of an optimizer is the peak.",
            f"Muon is for hidden weights as matrices; {OURS} is for all that its plan covers. The "
            f"parameters left over are {ADAM}'s, at the rate that was best for it alone.",
            f"{AT_DEFAULT_RATE} has a peak of 0.01, for all parameters, and had no tuning runs. "
            f"{DEFAULTS}, is `cqjax.cadam` as it comes: constant at 0.01.",
            "A step or second counts when the next evaluation, 15 in a run, finds the target "
            "reached. Seconds are of training; evaluation is off the clock. Compilation is counted "
            "once for each optimizer, where it says so.",
            *kinds.at_edges(held),
            *_overfitting(held),
        ],
        _tables(held),
        {
            "steps.png": f"Training loss by steps. {contests.CAPTION}",
            "seconds.png": f"Training loss by seconds, without compiling. {contests.CAPTION}",
        },
    )


def _summary(settings: Any, results: Mapping[str, Any]) -> str:
    """What was done."""
    effort = next(iter(results["contests"].values()))["effort"]
    lengths = ", ".join(
        f"{title} {c['effort']['steps']:,} of {c['effort']['batch_size']}"
        for title, c in results["contests"].items()
    )
    return (
        "A character language model on Python's standard library; a deep autoencoder, a "
        "convolutional network with batch normalisation and a fully-connected network on the "
        f"images of {results['dataset']['name']}; a coordinate network on a photograph; a "
        "regression on a synthetic table with heavy tails. Steps and batch sizes: "
        f"{lengths}. Each optimizer had {settings.tries} tuning runs of full length at rates half "
        f"a decade apart, and up to {settings.extensions} more, one at a time, while the best rate "
        "was at the edge of those tried. The rate with the lowest validation loss in the end then "
        f"ran at {effort['seeds']} other seed{'s' * (effort['seeds'] > 1)}. At each seed all "
        "optimizers share first weights and batches (medians, and ranges in brackets). The target "
        f"is the training loss that {ADAM} has in the end, in the median."
    )


def _claims(held: Held) -> list[Claim]:
    """What the library says, and the verdicts."""
    ahead = {title: kinds.ahead(contest, OURS, JUDGED) for title, contest in held.items()}
    parts = {title: share(contest, OURS, "step") for title, contest in held.items()}
    soon = sum(part <= STEPS_BAR for part in parts.values())
    untuned = {title: kinds.ahead(c, AT_DEFAULT_RATE, JUDGED) for title, c in held.items()}
    lost = sum(diverged(contest, AT_DEFAULT_RATE, list(LOSSES)) for contest in held.values())
    return [
        Claim(
            DOCUMENT,
            f"{OURS} ends with a lower validation loss than tuned {ADAM} on at least five of six "
            "kinds of work",
            f"on {sum(ahead.values())} of {len(held)}: {kinds.ends(held, OURS, JUDGED)}",
            judge(sum(ahead.values()) >= 5),
        ),
        Claim(
            DOCUMENT,
            f"{OURS} reaches {ADAM}'s last training loss in at most {STEPS_BAR:g} of its steps on "
            "at least four",
            f"on {soon} of {len(held)}: "
            + ", ".join(f"{title} {count(part, '.2f')}" for title, part in parts.items()),
            judge(soon >= 4),
        ),
        Claim(
            DOCUMENT,
            f"untuned, with a peak of 0.01, it is ahead of tuned {ADAM} on at least three, and "
            "finite on all",
            f"on {sum(untuned.values())} of {len(held)}, with {lost:g} diverged runs: "
            + kinds.ends(held, AT_DEFAULT_RATE, JUDGED),
            judge(sum(untuned.values()) >= 3, lost == 0),
        ),
    ]


def _overfitting(held: Held) -> list[str]:
    """Who learns the table by heart, and what to do then."""
    if "tabular" not in held:
        return []
    found = []
    for name in (ADAM, OURS):
        steps, _, values = curves(held["tabular"], name, "validation_loss")
        middle = contests.middle(values)[0]
        best = int(middle.argmin())
        found.append(
            f"{name}'s validation loss is lowest after {steps[best]:,} steps, "
            f"{count(middle[best], '.4f')}, and {count(middle[-1], '.4f')} in the end"
        )
    return [
        "The table has few rows for a network that large, and a quarter of its targets' variance "
        f"is noise: {'; '.join(found)}. Where a network learns its examples by heart, a faster "
        "optimizer does so sooner: take `relative_damping=1`, weight decay, or fewer steps."
    ]


def _tables(held: Held) -> dict[str, list[dict[str, str]]]:
    """A table for each quantity: kinds of work by optimizers."""

    def score(contest: Contest, name: str) -> str:
        right = "test_accuracy" in contest["entrants"][name]["runs"][0]
        if right:
            return spread(last(contest, name, "test_accuracy"), ".2%")
        return spread(last(contest, name, "test_error"), ".4g")

    return {
        "Validation loss in the end": kinds.last_values(held, "validation_loss"),
        "Training loss in the end": kinds.last_values(held, "train_loss"),
        "Test accuracy or error in the end": kinds.table(held, score),
        **kinds.costs(held, f"{ADAM}'s last training loss", list(LOSSES)),
    }


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw steps.png and seconds.png, with a panel for each kind of work, and front.png."""
    held = results["contests"]
    kinds.draw(settings, held, "train_loss", "training loss", highest=8)
    _draw_front(held, settings.output / "front.png")


def _draw_front(held: Held, path: Path) -> None:
    """Draw few optimizers for many readers: each kind of work by steps, and by seconds beside."""
    figure, axes = drawing.panels(-(-len(held) // 2), 4, (2.6, 2.1))
    names = [OURS, *sorted(["Adam", "Muon", "Nesterov"])]
    for number, (title, contest) in enumerate(held.items()):
        for panel, by in zip(axes[2 * number : 2 * number + 2], ("steps", "seconds"), strict=True):
            kinds.curves_of(panel, contest, names, by, "train_loss", highest=8)
            panel.set(title=title, xlabel=by, xlim=(0, None))
            drawing.few_ticks(panel)
            panel.set_xlim(0, min(panel.get_xlim()[1], 2.5 * panel.lines[0].get_xdata()[-1]))
    for empty in axes[2 * len(held) :]:
        empty.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    drawing.save(figure, path)
