"""ResNet-20 with and without batch normalisation.

Paeedeh and Ghiasi-Shirazi, section 5.4, Figs. 6 and 7.
The page is `experiments.pages.resnet20`.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax

import cqjax
from experiments import options
from experiments.classification import accuracy, cross_entropy, initialise
from experiments.contest import Entrant, Parts, Task, held_out
from experiments.data import Dataset, Split
from experiments.models import ResNet
from experiments.on_images import Contest
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
    "relative-damping",
]
VARIANTS: dict[Variant, tuple[str, dict[str, Any]]] = {  # description, changed settings
    "damping-low": ("damping 0.003", {"damping": 0.003}),
    "damping-high": ("damping 0.3", {"damping": 0.3}),
    "last-layer": ("last layer's rate × 1", {"last_layer": 1.0}),
    "inputs": ("inputs in ±1", {"our_inputs": 1.0}),
    "no-momentum": ("no momentum", {"momentum": 0.0}),
    "momentum-first": ("momentum before the C-update", {"momentum_first": True}),
    "small-branches": ("blocks' last kernels / 3 at first", {"branches": 1 / 3}),
    "relative-damping": (
        "relative damping 0.1 instead",
        {"damping": 0.0, "relative_damping": 0.1},
    ),
}
LAST = "fc"  # the last layer


@dataclass(frozen=True)
class Resnet20(Contest):
    """Does consequentialism do for ResNet-20 what batch normalisation does?

    SGD with momentum, Nesterov's method and Adam train it with batch normalisation and without.
    Their C- forms train it without. Each is tuned at the same number of rates, by validation loss.
    Then, at each of several seeds, all start from the same kernels and see the same batches. C-SGD
    is also tuned with single settings changed. The results are README.md, three figures and
    results.json. During the run, the metrics go to metrics.jsonl.
    """

    name = "resnet20"
    presets = options.presets(
        dataset=("digits", "cifar10", "cifar10"),
        measured=(200, 1000, 10_000),
        evaluated=(100, 1000, 10_000),
        depth=(8, 20, 20),
        width=(2, 8, 16, 16),
        shrink=(1, 2, 1, 1),
        epochs=(2.0, 1.0, 80.0, 11.396),
        tuning_epochs=(0.5, 0.2, 5.0, 1.14),
        tries=(2, 3, 3),
        seeds=(1, 3, 3, 1),
        optimizers=(("sgd",), tuple(NAMES), tuple(NAMES)),
        variants=(
            ("inputs", "momentum-first"),
            tuple(VARIANTS),
            tuple(VARIANTS),
            ("relative-damping",),
        ),
    )
    batch_size: int = 128
    """Images of a batch."""
    optimizers: tuple[Literal["sgd", "nesterov", "adam"], ...] | None = None
    """The optimizers that take part, each in its three forms."""
    variants: tuple[Variant, ...] | None = None
    """Settings of C-SGD that are changed, one at a time."""
    depth: int | None = None
    """Number of layers, 6n + 2."""
    width: int | None = None
    """Channels of the first stage; the paper's network has 16."""
    shrink: Literal[1, 2, 4] | None = None
    """Average blocks of so many by so many pixels. 1 leaves the images as they are."""
    evaluated: int | None = None
    """Validate and test on so many images."""
    damping: float = 0.03
    """The C- forms' damping."""
    relative_damping: float = 0.0
    """The C- forms' damping as a multiple of the mean eigenvalue, added to --damping."""
    momentum: float = 0.95
    """The momentum of SGD and Nesterov, in all forms."""
    momentum_first: bool = False
    """C-SGD accumulates gradients, not updates."""
    inputs: float = 1.0
    """The pixels' largest magnitude, for the plain forms."""
    our_inputs: float = 0.5
    """The pixels' largest magnitude, for the C- forms."""
    last_layer: float = 0.1
    """For the C- forms: the last layer's rate is that of the other layers times this."""
    branches: float = 1.0
    """At first, the last kernel of each block is multiplied by this, for all forms."""
    sgd_rates: tuple[float, ...] = (0.0001, 0.001, 0.00001)
    """Learning rates to try for SGD without batch normalisation."""
    sgd_bn_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for SGD with batch normalisation."""
    csgd_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for C-SGD."""
    nesterov_rates: tuple[float, ...] = (0.0001, 0.001, 0.00001)
    """Learning rates to try for Nesterov without batch normalisation."""
    nesterov_bn_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for Nesterov with batch normalisation."""
    cnesterov_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for C-Nesterov."""
    adam_rates: tuple[float, ...] = (0.001, 0.0003, 0.003)
    """Learning rates to try for Adam without batch normalisation."""
    adam_bn_rates: tuple[float, ...] = (0.003, 0.001, 0.01)
    """Learning rates to try for Adam with batch normalisation."""
    cadam_rates: tuple[float, ...] = (0.001, 0.0003, 0.003)
    """Learning rates to try for C-Adam."""
    output: Path = Path("results/resnet20")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "width", "evaluated")
        options.require(self, options.NOT_NEGATIVE, "damping", "relative_damping")
        if not (self.damping or self.relative_damping):
            raise ValueError("--damping must be positive, or --relative-damping, both are 0")
        options.require(self, options.POSITIVE, "inputs", "our_inputs", "last_layer", "branches")
        options.require(self, options.FRACTION, "momentum")
        if self.depth is not None and (self.depth < 8 or self.depth % 6 != 2):
            raise ValueError(f"--depth must be 6n + 2, 8 or more, got {self.depth}")
        options.require_distinct(self, "optimizers", "sgd")
        names = tuple(NAMES) if self.optimizers is None else self.optimizers
        self.require_rates(*(form for name in names for form in (name, f"{name}_bn", f"c{name}")))

    def contests(self, dataset: Dataset) -> dict[str, tuple[Task, list[Entrant]]]:
        """The one contest: what is learnt, and who takes part.

        Args:
          dataset: The data set, with pixels in [0, 1].

        Returns:
          The task of the plain optimizers without batch normalisation. The entrants: each optimizer
          in its plain form, in its plain form with batch normalisation, and in its C- form; then
          C-SGD's variants.
        """
        assert self.shrink and self.depth and self.optimizers and self.variants is not None
        dataset = dataset.pictures(1).shrunk(self.shrink)

        @cache
        def scaled(bound: float) -> Parts:
            train, test = (
                Split(np.float32(bound) * (2 * images - 1), labels)
                for images, labels in (dataset.train, dataset.test)
            )
            return held_out(replace(dataset, train=train, test=test)).evaluated(self.evaluated)

        @cache
        def task(bound: float, batch_norm: bool, branches: float) -> Task:
            parts = scaled(bound)
            model = ResNet(self.depth or 20, self.width or 16, dataset.classes, batch_norm)
            measured = (array[: self.measured] for array in parts.train)
            return Task(
                parts,
                model,
                lambda seed: _start(model, seed, parts.train.images, branches),
                watched={"train_accuracy": accuracy(model, *measured)},
            )

        def plain(name: str, batch_norm: bool) -> Entrant:
            its = task(self.inputs, batch_norm, self.branches)
            loss_fn = cross_entropy(its.model, train=True)

            def at(rate: float) -> Any:
                optimizer = rule(name, rate, self.momentum)
                return optimizer, gradient_step(loss_fn, optimizer)

            label, option = NAMES[name] + "-BN" * batch_norm, name + "_bn" * batch_norm
            return Entrant(label, at, self.rates(option), task=its, group=name)

        def ours(name: str, changed: Resnet20, label: str, role: Any, group: str) -> Entrant:
            its = task(changed.our_inputs, False, changed.branches)
            loss_fn = cross_entropy(its.model, train=True)

            def at(rate: float) -> Any:
                optimizer = consequential(name, rate, changed)
                return optimizer, capturing_step(loss_fn, optimizer)

            slower = (1 - changed.momentum) / (1 - self.momentum)
            rates = [slower * rate for rate in self.rates(f"c{name}")]
            return Entrant(label, at, rates, role, its, group=group)

        entrants = []
        for name in self.optimizers:
            entrants += [plain(name, False), plain(name, True)]
            entrants.append(ours(name, self, f"C-{NAMES[name]}", "ours", name))
        for variant in self.variants:
            words, change = VARIANTS[variant]
            changed = replace(self, **change)
            entrants.append(ours("sgd", changed, f"C-SGD, {words}", "variant", "variants"))
        return {f"ResNet-{self.depth}": (task(self.inputs, False, self.branches), entrants)}


def rule(name: str, rate: float, momentum: float) -> optax.GradientTransformation:
    """An optimizer of the source, in its plain form."""
    if name == "adam":
        return optax.adam(rate)
    return optax.sgd(rate, momentum, nesterov=name == "nesterov")


def consequential(
    name: str, rate: float, settings: Resnet20
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of the source, in its C- form. The last layer has its own rate."""
    update = cqjax.scale_by_consequentialism(
        damping=settings.damping, relative_damping=settings.relative_damping
    )
    members = [update, rule(name, rate, settings.momentum)]
    if settings.momentum_first:
        members.reverse()

    def last(params: Any) -> dict[str, bool]:
        return {layer: layer == LAST for layer in params}

    return optax.chain(*members, optax.masked(optax.scale(settings.last_layer), last))


def _start(model: Any, seed: int, images: np.ndarray, branches: float) -> tuple[Any, Any]:
    """The first network state and parameters, with the last kernel of each block multiplied."""
    params, state = initialise(model, seed, images)
    return {
        layer: {"kernel": branches * kernel["kernel"]} if layer.endswith("conv2") else kernel
        for layer, kernel in params.items()
    }, state
