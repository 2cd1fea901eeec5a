"""What Paeedeh and Ghiasi-Shirazi say of Figs. 6 and 7, and what was measured."""

from pathlib import Path
from typing import Any, Literal

from matplotlib.ticker import LogLocator, NullFormatter

from experiments import drawing
from experiments.contest import reached
from experiments.history import History
from experiments.page import Page, count, median, spread
from experiments.pages import contests, protocol, resnet20_claims, sources
from experiments.pages.contests import FORMS, MEASURES, NEEDED, Contest, last

TIME = "seconds_with_compilation"
WORDS = MEASURES | {"train_accuracy": "training accuracy"}
NUMBERS = {"C-SGD": 0, "C-Nesterov": 3, "C-Adam": 5, "SGD": 1, "Nesterov": 2, "Adam": 4}
HIGHEST = 5  # loss in the figures
OUTSIDE = f"Losses above {HIGHEST} are outside."
BY = {"steps": "steps", "seconds": "seconds of training, compilation counted"}


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    ((title, contest),) = results["contests"].items()
    tuned, images = contest["effort"]["tuning_steps"], contest["images"]
    best = whole(contest)
    changed = f"C-SGD with single settings changed: validation loss after {tuned:,} steps"
    side = f"means of {settings.shrink} x {settings.shrink} pixels" * (settings.shrink > 1)
    return Page(
        f"{title} with and without batch normalisation on {results['dataset']['name']}",
        f"{sources.CONSEQUENTIALISM}, section 5.4, Figs. 6, 7",
        f"{title} of width {settings.width} learns {side or 'the images'}, without augmentation. "
        "The C- forms have no batch normalisation (BN); the others are there with it and without. "
        f"Damping is {_damping(settings)}, momentum {settings.momentum:g} for SGD and Nesterov in "
        f"all forms; inputs are in ±{settings.inputs:g}, and ±{settings.our_inputs:g} for the C- "
        f"forms, whose last layer's rate is multiplied by {settings.last_layer:g}. "
        + protocol.words(settings, results),
        contests.behind(results["contests"], WORDS | contests.VALIDATION),
        resnet20_claims.claims(contest),
        [
            *resnet20_claims.unchecked(contest),
            "Momentum accumulates the C-updates, as it does where they take the gradient's place "
            "in a solver; the variant has it the other way round.",
            "The source tells neither rates nor first weights. Kernels start from He's normal "
            "distribution (those of blocks' last convolutions times "
            f"{settings.branches:g}), the same for all forms; there are no biases, and batch "
            "normalisation has no parameters (the source's has some). Where a block changes the "
            "shape, its shortcut appends zero channels. Rates are constant.",
            "The source draws the loss and accuracy of the last batch of each 100. Here the loss "
            "is the mean over the batches since the last of 75 points, by which the figures go; "
            f"tables and claims go by the {images['training_loss']:,} images, evaluated with batch "
            "normalisation's running averages.",
            f"For validation and testing, the first {images['validation']:,} and "
            f"{images['test']:,} of the images are taken.",
            *contests.measuring(results),
        ],
        {
            "C- forms against plain ones": pairs(contest),
            **contests.all_tables(results["contests"]),
            **({changed: variants(contest)} if contest["variants"] else {}),
            **(
                {f"The best of them, after {contest['effort']['steps']:,} steps": best}
                if best
                else {}
            ),
        },
        {
            "steps.png": "By steps, as in Fig. 6: medians over the seeds, and their ranges. "
            f"{OUTSIDE}",
            "seconds.png": f"The same by seconds, as in Fig. 7; compilation counted. {OUTSIDE}",
            **(
                {
                    "variants.png": f"What single settings do to C-SGD in {tuned:,} steps, the "
                    "grey line being the best that SGD-BN has then; and the best of them in whole "
                    f"runs. {OUTSIDE}"
                }
                if contest["variants"]
                else {}
            ),
        },
    )


def _damping(settings: Any) -> str:
    """The C- forms' damping in words."""
    relative = getattr(settings, "relative_damping", 0)  # pages from before it have none
    return f"{settings.damping:g}" + f" and {relative:g} of the mean eigenvalue" * bool(relative)


def pairs(contest: Contest) -> list[dict[str, str]]:
    """When each C- form has the final training loss of its plain forms, without BN and with it."""
    rows = []
    for ours in (n for n, entrant in contest["entrants"].items() if entrant["role"] == "ours"):
        for plain in (ours.removeprefix("C-"), f"{ours.removeprefix('C-')}-BN"):
            goal = median(last(contest, plain, "train_loss"))
            there = [
                reached(History.of(run["history"]), {"train_loss": goal})
                for run in contest["entrants"][ours]["runs"]
            ]
            taken = {key: [at[key] if at else None for at in there] for key in NEEDED}
            row = {"C- form": ours, "plain form": plain, "its training loss": count(goal, ".4f")}
            for key, whole in {"step": "steps", TIME: TIME}.items():
                words, form = NEEDED[key]
                row[f"{words}, to that loss"] = spread(taken[key], form)
                row[f"of the plain form's {whole.split('_')[0]}"] = count(
                    median(taken[key]) / median(last(contest, plain, whole)), ".2f"
                )
            rows.append(row)
    return rows


def variants(contest: Contest) -> list[dict[str, str]]:
    """The tuning runs of C-SGD, of its variants, and of SGD with BN."""
    entrants = contest["entrants"]
    known = {"C-SGD": entrants["C-SGD"], **contest["variants"], "SGD-BN": entrants["SGD-BN"]}
    return contests.tuning(known)


def whole(contest: Contest) -> list[dict[str, str]]:
    """The runs of the best variant, beside those of C-SGD and of SGD with BN."""
    everyone = _with_best(contest)
    if everyone is contest:
        return []
    return [
        {
            "optimizer": name,
            "rate": f"{everyone['entrants'][name]['rate']:g}",
            **{
                words: spread(last(everyone, name, metric), FORMS[metric])
                for metric, words in WORDS.items()
            },
            "seconds, compilation counted": spread(last(everyone, name, TIME), ",.1f"),
        }
        for name in (*list(everyone["entrants"])[-1:], "C-SGD", "SGD-BN")
    ]


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw steps.png, seconds.png and variants.png."""
    ((_, contest),) = results["contests"].items()
    _curves(settings.output / "steps.png", contest, "steps")
    _curves(settings.output / "seconds.png", contest, "seconds")
    if contest["variants"]:
        _draw_variants(settings.output / "variants.png", contest)


def _curves(path: Path, contest: Contest, by: Literal["steps", "seconds"]) -> None:
    """Draw loss and accuracy of all C- forms: left beside plain forms without BN, right with it."""
    figure, axes = drawing.panels(2, 2, (5.2, 3.4))
    for column, (title, suffix) in enumerate({"without BN": "", "with BN": "-BN"}.items()):
        loss, accuracy = axes[column], axes[2 + column]
        for name in NUMBERS:
            name += "" if name.startswith("C-") else suffix
            if name in contest["entrants"]:
                number = NUMBERS[name.removesuffix("-BN")]
                _line(loss, contest, name, number, "batch_loss", by, 1)
                _line(accuracy, contest, name, number, "train_accuracy", by, 100)
        drawing.logarithmic(loss, HIGHEST)
        loss.set(title=f"C- forms, and plain ones {title}", xlim=(0, None))
        loss.set_ylabel("loss of the batches (log scale)")
        loss.legend(fontsize="small")
        accuracy.set(xlabel=BY[by], ylabel="training accuracy, %", xlim=(0, None))
    for row in (axes[:2], axes[2:]):
        limits = [limit for each in row for limit in each.get_ylim()]
        for each in row:
            each.set_ylim(min(limits), max(limits))
    drawing.save(figure, path)


def _line(
    axes: Any, contest: Contest, name: str, number: int, metric: str, by: str, unit: float
) -> None:
    steps, seconds, values = contests.curves(contest, name, metric)
    x = steps if by == "steps" else contests.middle(seconds)[0]
    label = f"{name}, rate {contest['entrants'][name]['rate']:g}"
    drawing.band(axes, x, *contests.middle(unit * values), label, number)


def _with_best(contest: Contest) -> Contest:
    """The contest with the best variant, if there is one, as its last entrant."""
    best = {name: variant for name, variant in contest["variants"].items() if "runs" in variant}
    return {**contest, "entrants": contest["entrants"] | best} if best else contest


def _draw_variants(path: Path, contest: Contest) -> None:
    """Draw the tuning runs by learning rate, and the runs of the best variant."""
    entrants, everyone = contest["entrants"], _with_best(contest)
    figure, (axes, whole) = drawing.panels(1, 2, (6, 4))
    known = {"as in the source": entrants["C-SGD"], **contest["variants"]}
    source = {"color": "black", "marker": "*", "markersize": 11, "linewidth": 2.2}
    for number, (name, entrant) in enumerate(known.items()):
        tried = sorted((at["rate"], median([at["validation_loss"]])) for at in entrant["tuning"])
        label = name.removeprefix("C-SGD, ")
        look = drawing.style(number - 1, markersize=6) if number else source
        axes.plot(*zip(*tried, strict=True), label=label, **look)
    best = min(median([at["validation_loss"]]) for at in entrants["SGD-BN"]["tuning"])
    axes.axhline(best, color="0.4", linewidth=0.8)
    drawing.logarithmic(axes, HIGHEST)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (log scale)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", title="C-SGD")
    for number, name in enumerate((list(everyone["entrants"])[-1], "C-SGD", "SGD-BN")):
        _line(whole, everyone, name, number, "train_loss", "steps", 1)
    drawing.logarithmic(whole, HIGHEST)
    whole.set(xlabel="steps", ylabel="training loss (log scale)", xlim=(0, None))
    whole.legend(fontsize="small")
    drawing.save(figure, path)
