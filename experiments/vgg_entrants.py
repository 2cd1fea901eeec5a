"""Four optimizers for a VGG network, and what they learn: the contests of `vgg`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import optax

import cqjax
from experiments.augmentation import augmenter
from experiments.classification import LossFn, cross_entropy, initialise
from experiments.contest import Entrant, Task, held_out
from experiments.data import Dataset, Split
from experiments.models import VGG
from experiments.training import gradient_step

DROP, PHASES = 0.2, 5  # the rate falls to a fifth after each 60 of the paper's 300 epochs
FIGURE3 = {"rate": 0.1, "decay": 5e-3}  # of SGD and of back-matching
SGD, OURS = "SGD", "back-matching"


def prepared(settings: Any, dataset: Dataset) -> Dataset:
    """The first training images, with channels, smaller if so, standardised."""
    images, labels = dataset.train
    first = Split(images[: settings.train_images], labels[: settings.train_images])
    return replace(dataset, train=first).pictures(1).shrunk(settings.shrink).standardised()


def contests(settings: Any, dataset: Dataset) -> dict[str, tuple[Task, list[Entrant]]]:
    """What is learnt and who takes part, by title.

    Args:
      settings: Those of `vgg`, with the preset filled in.
      dataset: The data set, `prepared`.

    Returns:
      A contest of all four optimizers for each network; and for the first network that of Fig. 3.
    """
    parts = held_out(dataset)
    few = [Split(*(array[: settings.evaluated] for array in part)) for part in parts[1:]]
    parts = parts._replace(validation=few[0], test=few[1])
    augment = augmenter(settings.seed, flip=settings.flip, degrees=settings.degrees)
    rates, decays = grids(settings), (settings.weight_decay, settings.our_weight_decay)

    @cache
    def network(depth: Any) -> tuple[Task, LossFn, Any]:
        model = VGG(depth, dataset.classes, settings.width)
        task = Task(
            parts,
            model,
            lambda seed: initialise(model, seed, parts.train.images),
            lambda seed: augment,
        )
        loss_fn = cross_entropy(model, train=True)
        batch = (array[: settings.batch_size] for array in parts.train)
        plan = cqjax.plan(loss_fn, batch_size=settings.batch_size)(*task.start(0), *batch)
        return task, loss_fn, plan

    def contest(
        depth: int, rates: Mapping[str, Sequence[float]], decays: tuple[float, float]
    ) -> tuple[Task, list[Entrant]]:
        task, loss_fn, plan = network(depth)
        by_name = optimizers(settings, len(parts.train.labels), plan, *decays)
        return task, [_entrant(name, loss_fn, by_name[name], rates[name]) for name in rates]

    first = settings.depths[0]
    alike = {name: [FIGURE3["rate"]] for name in (SGD, OURS)}
    return {
        **{f"VGG-{depth}": contest(depth, rates, decays) for depth in settings.depths},
        f"VGG-{first} as in Fig. 3": contest(first, alike, (FIGURE3["decay"], FIGURE3["decay"])),
    }


def grids(settings: Any) -> dict[str, list[float]]:
    """The learning rates that are tried, by optimizer.

    Back-matching multiplies the rate of all layers but the last by the features that this one
    reads, and the paper chose its rates for 512.
    """
    by_name = {
        SGD: settings.sgd_rates,
        "LARS": settings.lars_rates,
        "LSALR": settings.lsalr_rates,
        OURS: [64 / settings.width * rate for rate in settings.back_matching_rates],
    }
    return {name: list(rates[: settings.tries]) for name, rates in by_name.items()}


def optimizers(
    settings: Any, images: int, plan: Any, decay: float, our_decay: float
) -> Mapping[str, optax.GradientTransformation]:
    """The optimizers by name, at a learning rate of 1 that falls by and by.

    Args:
      settings: Those of `vgg`, with the preset filled in.
      images: How many there are to train on.
      plan: Of the loss.
      decay: The baselines' weight decay.
      our_decay: Back-matching's.

    Returns:
      Optax's SGD and LARS, our LSALR and back-matching.
    """
    phase = settings.epochs * (images // settings.batch_size) / PHASES
    drops = {round(phase * number): DROP for number in range(1, PHASES)}
    rate, momentum = optax.piecewise_constant_schedule(1.0, drops), (settings.momentum, True)
    sgd = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, *momentum))
    trust = settings.trust_coefficient
    return {
        SGD: sgd,
        "LARS": optax.lars(
            rate, decay, trust_coefficient=trust, momentum=settings.momentum, nesterov=True
        ),
        "LSALR": cqjax.lsalr(rate, *momentum, decay),
        OURS: cqjax.back_matching_sgd(rate, *momentum, our_decay, plan=plan),
    }


def _entrant(
    name: str, loss_fn: LossFn, optimizer: optax.GradientTransformation, rates: Sequence[float]
) -> Entrant:
    """Its learning rate is a part of its state, so that one program serves all its runs."""

    def at(rate: float) -> optax.GradientTransformation:
        return optax.chain(optimizer, optax.inject_hyperparams(optax.scale)(step_size=rate))

    step = gradient_step(loss_fn, at(1.0))
    return Entrant(
        name, lambda rate: (at(rate), step), rates, "ours" if name == OURS else "baseline"
    )
