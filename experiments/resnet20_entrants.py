"""Three forms of each optimizer, and what each form learns: the contest of `resnet20`."""

from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import optax

import cqjax
from experiments.classification import accuracy, cross_entropy, initialise
from experiments.contest import Entrant, Parts, Task, held_out
from experiments.data import Dataset, Split
from experiments.models import ResNet
from experiments.training import capturing_step, gradient_step

NAMES = {"sgd": "SGD", "nesterov": "Nesterov", "adam": "Adam"}
Variant = Literal[
    "damping-low",
    "damping-high",
    "last-layer",
    "inputs",
    "no-momentum",
    "momentum-first",
    "small-branches",
]
VARIANTS: dict[Variant, tuple[str, dict[str, Any]]] = {
    "damping-low": ("damping 0.003", {"damping": 0.003}),
    "damping-high": ("damping 0.3", {"damping": 0.3}),
    "last-layer": ("last layer's rate × 1", {"last_layer": 1.0}),
    "inputs": ("inputs in ±1", {"our_inputs": 1.0}),
    "no-momentum": ("no momentum", {"momentum": 0.0}),
    "momentum-first": ("momentum before the C-update", {"momentum_first": True}),
    "small-branches": ("blocks' last kernels / 3 at first", {"branches": 1 / 3}),
}
LAST = "fc"


def contest(settings: Any, dataset: Dataset) -> tuple[Task, list[Entrant]]:
    """What SGD, Nesterov and Adam learn, and everyone who takes part.

    Args:
      settings: Those of `resnet20`, with the preset filled in.
      dataset: The data set, with pixels in [0, 1].

    Returns:
      The task of the plain optimizers without batch normalisation; and of each optimizer its plain
      form, its plain form with batch normalisation and its C- form, then C-SGD's variants.
    """
    dataset = dataset.pictures(1).shrunk(settings.shrink)

    @cache
    def scaled(bound: float) -> Parts:
        train, test = (
            Split(np.float32(bound) * (2 * images - 1), labels)
            for images, labels in (dataset.train, dataset.test)
        )
        parts = held_out(replace(dataset, train=train, test=test))
        few = [Split(*(a[: settings.evaluated] for a in part)) for part in parts[1:]]
        return parts._replace(validation=few[0], test=few[1])

    @cache
    def task(bound: float, batch_norm: bool, branches: float) -> Task:
        parts = scaled(bound)
        model = ResNet(settings.depth, settings.width, dataset.classes, batch_norm)
        measured = (array[: settings.measured] for array in parts.train)
        return Task(
            parts,
            model,
            lambda seed: _start(model, seed, parts.train.images, branches),
            watched={"train_accuracy": accuracy(model, *measured)},
        )

    def plain(name: str, batch_norm: bool) -> Entrant:
        its = task(settings.inputs, batch_norm, settings.branches)
        loss_fn = cross_entropy(its.model, train=True)

        def at(rate: float) -> Any:
            optimizer = rule(name, rate, settings.momentum)
            return optimizer, gradient_step(loss_fn, optimizer)

        rates = getattr(settings, f"{name}{'_bn' * batch_norm}_rates")[: settings.tries]
        return Entrant(NAMES[name] + "-BN" * batch_norm, at, rates, task=its)

    def ours(name: str, changed: Any, label: str, role: Any) -> Entrant:
        its = task(changed.our_inputs, False, changed.branches)
        loss_fn = cross_entropy(its.model, train=True)

        def at(rate: float) -> Any:
            optimizer = consequential(name, rate, changed)
            return optimizer, capturing_step(loss_fn, optimizer)

        slower = (1 - changed.momentum) / (1 - settings.momentum)
        rates = [slower * rate for rate in getattr(settings, f"c{name}_rates")[: settings.tries]]
        return Entrant(label, at, rates, role, its)

    entrants = [
        entrant
        for name in settings.optimizers
        for entrant in (
            plain(name, False),
            plain(name, True),
            ours(name, settings, f"C-{NAMES[name]}", "ours"),
        )
    ]
    for variant in settings.variants:
        words, change = VARIANTS[variant]
        changed = replace(settings, **change)
        entrants.append(ours("sgd", changed, f"C-SGD, {words}", "variant"))
    return task(settings.inputs, False, settings.branches), entrants


def rule(name: str, rate: float, momentum: float) -> optax.GradientTransformation:
    """An optimizer of the source, as it is without consequentialism."""
    if name == "adam":
        return optax.adam(rate)
    return optax.sgd(rate, momentum, nesterov=name == "nesterov")


def consequential(name: str, rate: float, settings: Any) -> optax.GradientTransformationExtraArgs:
    """Its C- form: the last layer has a rate of its own."""
    update = cqjax.scale_by_consequentialism(settings.damping)
    members = [update, rule(name, rate, settings.momentum)]
    if settings.momentum_first:
        members.reverse()

    def last(params: Any) -> dict[str, bool]:
        return {layer: layer == LAST for layer in params}

    return optax.chain(*members, optax.masked(optax.scale(settings.last_layer), last))


def _start(model: Any, seed: int, images: np.ndarray, branches: float) -> tuple[Any, Any]:
    """The first parameters, with the last kernel of each block multiplied, and network state."""
    params, state = initialise(model, seed, images)
    return {
        layer: {"kernel": branches * kernel["kernel"]} if layer.endswith("conv2") else kernel
        for layer, kernel in params.items()
    }, state
