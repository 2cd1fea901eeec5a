"""What Zhang, Chen and Liu say of Fig. 2, and what was measured."""

from typing import Any

from experiments.page import Claim, Page, count, judge, median, spread
from experiments.pages import contests, protocol, sources
from experiments.pages.contests import Contest, curves, last

SGD, OURS = "SGD", "back-matching"
PAPER = {SGD: 0.1, OURS: 0.02}  # the rates that it chose
PLAIN, DECAY = "no decay", "decay 5e-4"
FIGURE2 = "section 3.3, Fig. 2"
LOWER = "with weight decay, neither training loss goes to zero, and back-matching's is much lower"
IMPROVED = (
    "weight decay improves the final test accuracy, and does not improve back-matching's lowest "
    "test error during the training"
)
ZERO = 0.05  # a training loss that counts as zero
FACTOR, MARGIN, FEW = 1.1, 0.01, 15  # for losses and weights; for accuracies; epochs


def page(settings: Any, results: dict[str, Any]) -> Page:
    """The source's claims, judged by the results."""
    held = results["contests"]
    return Page(
        f"LeNet with batch normalisation on {results['dataset']['name']}",
        f"{sources.BACK_MATCHING}, section 3.3, Fig. 2",
        "Momentum 0.9, without augmentation, rates constant: all as in the source, which trains "
        "for 200 epochs. " + protocol.words(settings, results),
        contests.behind(held),
        _claims(held, settings.epochs >= FEW),
        [
            f"Claims about long training are open in runs of less than {FEW} epochs.",
            "The source chose its rates by the test accuracy; here it is the validation loss, and "
            "after the tuning steps. With `--tries 1`, both have the source's choice.",
            "The source does not tell the layers' widths: here the convolutions have "
            f"{' and '.join(map(str, settings.channels))} channels and the hidden layers "
            f"{' and '.join(map(str, settings.hidden))} neurons, by default as LeNet-5. There is "
            "no bias, and batch normalisation has no parameters.",
            "Losses are without the weight decay's term, as the source's, and measured with batch "
            "normalisation's running averages. The decay is added to the gradient, for "
            "back-matching before the layers' rates are put to it.",
            f"What the source does not put in numbers: zero is a training loss below {ZERO}, much "
            f"lower or rather large are {FACTOR - 1:.0%} away from SGD's, considerable and worse "
            f"are {MARGIN:.0%} of test accuracy.",
            f"The 15 evaluations of a run are {settings.epochs / 15:.2g} epochs apart: when an "
            "accuracy is highest is known no better.",
            *contests.measuring(results),
        ],
        contests.all_tables(held),
        {"losses.png": contests.CAPTION},
    )


def _claims(held: dict[str, Contest], long: bool) -> list[Claim]:
    names = (SGD, OURS)
    loss, final = (
        {title: {n: last(contest, n, metric) for n in names} for title, contest in held.items()}
        for metric in ("train_loss", "test_accuracy")
    )
    weights = {name: last(held[PLAIN], name, "weights") for name in names}
    at_best = {t: {n: _best(contest, n) for n in names} for t, contest in held.items()}
    end = {t: {n: median(final[t][n]) for n in names} for t in held}
    top = {t: {n: median(at_best[t][n][1]) for n in names} for t in held}
    ends = {t: {n: median(loss[t][n]) for n in names} for t in held}
    falls = {n: top[PLAIN][n] - end[PLAIN][n] for n in names}
    epochs = median(at_best[PLAIN][SGD][0])

    def each(values: dict[str, Any], form: str) -> str:
        return ", ".join(f"{name} {spread(values[name], form)}" for name in names)

    def accuracies(title: str) -> str:
        return "; ".join(
            f"{n} has at most {spread(at_best[title][n][1], '.2%')}, after "
            f"{spread(at_best[title][n][0], '.1f')} epochs, and in the end "
            f"{spread(final[title][n], '.2%')}"
            for n in names
        )

    def course(claim: str, measured: str, *checks: bool) -> Claim:
        """A claim about long training."""
        return Claim(FIGURE2, claim, measured, judge(*checks) if long else "open")

    decayed = [Claim(FIGURE2, words, "not run", "open") for words in (LOWER, IMPROVED)]
    if DECAY in held:
        decayed = [
            course(
                LOWER,
                each(loss[DECAY], ".4f"),
                min(ends[DECAY].values()) >= ZERO,
                FACTOR * ends[DECAY][OURS] < ends[DECAY][SGD],
            ),
            course(
                IMPROVED,
                f"with weight decay, {accuracies(DECAY)}; without it, {accuracies(PLAIN)}",
                *(end[DECAY][name] > end[PLAIN][name] for name in names),
                top[DECAY][OURS] <= top[PLAIN][OURS],
            ),
        ]
    return [
        course(
            "without weight decay, both drive the training loss to zero",
            each(loss[PLAIN], ".4f"),
            *(ends[PLAIN][name] < ZERO for name in names),
        ),
        course(
            f"without weight decay, SGD's test accuracy turns worse after very few epochs ({FEW}), "
            "and back-matching's less so",
            accuracies(PLAIN),
            falls[SGD] > MARGIN and epochs <= FEW,
            falls[OURS] < falls[SGD],
        ),
        course(
            "without weight decay, back-matching has a much lower test error, with a considerable "
            "margin even in the overfitting phase",
            f"the highest test accuracies differ by {top[PLAIN][OURS] - top[PLAIN][SGD]:+.2%}, the "
            f"last by {end[PLAIN][OURS] - end[PLAIN][SGD]:+.2%} (back-matching's less SGD's)",
            *(of[PLAIN][OURS] - of[PLAIN][SGD] > MARGIN for of in (top, end)),
        ),
        *decayed,
        Claim(
            "section 3.3",
            "without weight decay, back-matching's weights have a rather large magnitude",
            f"norm of all weights in the end: {each(weights, '.1f')}",
            judge(median(weights[OURS]) > FACTOR * median(weights[SGD])),
        ),
        *([_best_rates(held)] if _tuned(held) else []),
    ]


def _tuned(held: dict[str, Contest]) -> bool:
    """Whether each had several rates to choose from."""
    return all(len(c["entrants"][name]["tuning"]) > 1 for c in held.values() for name in PAPER)


def _best_rates(held: dict[str, Contest]) -> Claim:
    return Claim(
        "section 3.3",
        f"the best rates are {PAPER[SGD]:g} for SGD and {PAPER[OURS]:g} for back-matching",
        "; ".join(_rates(title, contest) for title, contest in held.items()),
        judge(*(c["entrants"][n]["rate"] == PAPER[n] for c in held.values() for n in PAPER)),
    )


def _best(contest: Contest, name: str) -> tuple[list[float], list[float]]:
    """At each seed: the epochs until the test accuracy was highest, and this accuracy."""
    steps, _, accuracy = curves(contest, name, "test_accuracy")
    per_epoch = contest["images"]["train"] // contest["effort"]["batch_size"]
    return [steps[at] / per_epoch for at in accuracy.argmax(1)], accuracy.max(1).tolist()


def _rates(title: str, contest: Contest) -> str:
    """The rates that were chosen, and by how much the paper's were worse."""
    words = []
    for name, rate in PAPER.items():
        entrant = contest["entrants"][name]
        tried = {at["rate"]: at["validation_loss"] for at in entrant["tuning"]}
        chosen = entrant["rate"]
        losses = [f"{tried[chosen]:.4f}"]
        if rate in tried and rate != chosen:
            losses.append(f"{count(median([tried[rate]]), '.4f')} at {rate:g}")
        words.append(f"{name} {chosen:g} (validation loss {', '.join(losses)})")
    return f"{title}: {', '.join(words)}"


def draw(settings: Any, results: dict[str, Any]) -> None:
    """Draw losses.png, with a row of panels for each contest."""
    contests.draw_all(settings.output / "losses.png", results["contests"])
