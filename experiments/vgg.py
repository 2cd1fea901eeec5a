"""SGD, LARS, LSALR and back-matching train VGG networks.

Zhang, Chen and Liu, section 4.
The page is `experiments.pages.vgg`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import optax

import cqjax
from experiments import options
from experiments.augmentation import augmenter
from experiments.classification import LossFn, cross_entropy, initialise
from experiments.contest import Entrant, Parts, Task, held_out
from experiments.data import Dataset, Split
from experiments.models import VGG
from experiments.on_images import Contest
from experiments.training import gradient_step

OF_DATA = {  # the paper's rate first, and its weight decay
    "cifar100": {"back_matching_rates": (0.1, 0.05, 0.2, 0.02), "our_weight_decay": 5e-3},
    "cifar10": {"back_matching_rates": (2e-3, 1e-3, 5e-3, 1e-2), "our_weight_decay": 1e-4},
}
DROP, PHASES = 0.2, 5  # the rate falls to a fifth after each 60 of the paper's 300 epochs
AS_FIGURE3 = "as in Fig. 3"
FIGURE3 = {"rate": 0.1, "decay": 5e-3}  # of SGD and of back-matching
SGD, OURS = "SGD", "back-matching"
OPTIMIZERS = {SGD: "sgd", "LARS": "lars", "LSALR": "lsalr", OURS: "back_matching"}


@dataclass(frozen=True)
class Vgg(Contest):
    """Train VGG networks by SGD, LARS, LSALR and back-matching, and judge what the paper says.

    All four have Nesterov's momentum, and their rates fall to a fifth after each fifth of a run.
    Each is tuned at the same number of rates, by validation loss. Then, at each of several seeds,
    all start from the same weights and see the same batches, with the same flips and rotations. One
    more contest has the settings of the paper's Figure 3: SGD and back-matching have the same rate
    and weight decay. The preset cpu has narrow networks, small images and few of them. The results
    are README.md, two figures and results.json. During the run, the metrics go to metrics.jsonl.
    """

    name = "vgg"
    presets = options.presets(
        dataset=("digits", "cifar10", "cifar10"),
        train_images=(600, 5700, None, None),
        measured=(200, 1000, 10_000),
        evaluated=(100, 1000, 10_000, 10_000),
        epochs=(2.5, 5.0, 300.0, 30.0),
        tuning_epochs=(1.25, 2.5, 150.0, 0.5),
        tries=(2, 3, 4, 1),
        seeds=(1, 3, 5, 1),
        depths=((11,), (11, 13, 16, 19), (11, 13, 16, 19), (11,)),
        width=(2, 8, 64, 16),
        shrink=(1, 2, 1, 1),
        lars_rates=((2.0, 1.0), (10.0, 5.0, 20.0), (2.0, 1.0, 5.0, 10.0)),
    )
    batch_size: int = 128
    """Images of a batch."""
    depths: tuple[Literal[11, 13, 16, 19], ...] | None = None
    """The networks; the first is that of Figure 3."""
    width: int | None = None
    """Channels of the first stage; the paper's networks have 64."""
    shrink: Literal[1, 2, 4] | None = None
    """Average blocks of so many by so many pixels. 1 leaves the images as they are."""
    train_images: int | None = None
    """Train and validate on the first so many training images. If neither this nor the preset
    gives a number, on all."""
    evaluated: int | None = None
    """Validate and test on so many images."""
    flip: bool = True
    """Mirror half of the images of a batch."""
    degrees: float = 15.0
    """Rotate each image of a batch by up to so many degrees, to either side."""
    momentum: float = 0.9
    """Nesterov's momentum, of all four."""
    weight_decay: float = 5e-4
    """The weight decay of SGD, LARS and LSALR."""
    our_weight_decay: float | None = None
    """The weight decay of back-matching. By default the paper's: 5e-3 for CIFAR-100, else 1e-4."""
    trust_coefficient: float = 1e-3
    """LARS multiplies its rates by it. The paper's formula has none: there it is 1."""
    sgd_rates: tuple[float, ...] = (0.1, 0.05, 0.02, 0.2)
    """Learning rates to try for SGD."""
    lars_rates: tuple[float, ...] | None = None
    """Learning rates to try for LARS. The paper tried 1, 2, 5 and 10."""
    lsalr_rates: tuple[float, ...] = (0.1, 0.05, 0.006, 0.2, 1.0)
    """Learning rates to try for LSALR."""
    back_matching_rates: tuple[float, ...] | None = None
    """Learning rates to try for back-matching, times 64 / --width. The default depends on the data
    set."""
    output: Path = Path("results/vgg")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "width", "evaluated")
        if self.train_images is not None and self.train_images < 2:
            raise ValueError(f"--train-images must be at least 2, got {self.train_images}")
        options.require(self, options.NOT_NEGATIVE, "degrees", "weight_decay", "our_weight_decay")
        options.require(self, options.POSITIVE, "trust_coefficient")
        options.require(self, options.FRACTION, "momentum")
        options.require_distinct(self, "depths")
        self.require_rates(*OPTIMIZERS.values())

    def filled(self) -> Self:
        """The settings. Options that were not given have the values of preset and data set."""
        settings = super().filled()
        of_data = OF_DATA.get(settings.dataset or "", OF_DATA["cifar10"])
        return options.filled(settings, {self.preset: of_data})

    def rates(self, optimizer: str) -> tuple[float, ...]:
        """The learning rates that are tried for an optimizer.

        Back-matching multiplies the rate of each layer but the last by the number of features that
        the last layer reads. The paper chose its rates for 512 of them.
        """
        wider = 64 / (self.width or 64) if optimizer == "back_matching" else 1
        return tuple(wider * rate for rate in super().rates(optimizer))

    def prepared(self, dataset: Dataset) -> Dataset:
        """The first training images, with channels, shrunk and standardised."""
        assert self.shrink
        first = Split(*(array[: self.train_images] for array in dataset.train))
        return replace(dataset, train=first).pictures(1).shrunk(self.shrink).standardised()

    def contests(self, dataset: Dataset) -> dict[str, tuple[Task, list[Entrant]]]:
        """The contests by title: what is learnt, and who takes part.

        Args:
          dataset: The data set, `prepared`.

        Returns:
          For the first network, the contest of Fig. 3; then, for each network, one of all four
          optimizers.
        """
        assert self.width and self.depths
        parts = held_out(dataset).evaluated(self.evaluated)
        augment = augmenter(self.seed, flip=self.flip, degrees=self.degrees)

        @cache
        def network(depth: Any) -> tuple[Task, LossFn, Any]:
            model = VGG(depth, dataset.classes, self.width or 64)
            images = parts.train.images
            task = Task(parts, model, lambda seed: initialise(model, seed, images), augment)
            loss_fn = cross_entropy(model, train=True)
            batch = (array[: self.batch_size] for array in parts.train)
            plan = cqjax.plan(loss_fn, batch_size=self.batch_size)(*task.start(0), *batch)
            return task, loss_fn, plan

        def contest(
            depth: int, rates: Mapping[str, Sequence[float]], *decays: float | None
        ) -> tuple[Task, list[Entrant]]:
            task, loss_fn, plan = network(depth)
            by_name = self._optimizers(parts, plan, *decays)
            return task, [_entrant(name, loss_fn, by_name[name], rates[name]) for name in rates]

        grids = {name: self.rates(option) for name, option in OPTIMIZERS.items()}
        first, alike = self.depths[0], {name: [FIGURE3["rate"]] for name in (SGD, OURS)}
        decays, same_decays = (self.weight_decay, self.our_weight_decay), 2 * [FIGURE3["decay"]]
        return {
            f"VGG-{first} {AS_FIGURE3}": contest(first, alike, *same_decays),
            **{f"VGG-{depth}": contest(depth, grids, *decays) for depth in self.depths},
        }

    def _optimizers(
        self, parts: Parts, plan: Any, decay: Any, our_decay: Any
    ) -> Mapping[str, optax.GradientTransformation]:
        """The optimizers by name, with these weight decays. Their learning rate falls from 1."""
        assert self.epochs
        phase = self.epochs * (len(parts.train.labels) // self.batch_size) / PHASES
        drops = {round(phase * number): DROP for number in range(1, PHASES)}
        rate, momentum = optax.piecewise_constant_schedule(1.0, drops), (self.momentum, True)
        trust = {"trust_coefficient": self.trust_coefficient}
        return {
            SGD: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, *momentum)),
            "LARS": optax.lars(rate, decay, momentum=self.momentum, nesterov=True, **trust),
            "LSALR": cqjax.lsalr(rate, *momentum, decay),
            OURS: cqjax.back_matching_sgd(rate, *momentum, our_decay, plan=plan),
        }


def _entrant(
    name: str, loss_fn: LossFn, optimizer: optax.GradientTransformation, rates: Sequence[float]
) -> Entrant:
    """An entrant whose learning rate is in its state, so that one program serves all its runs."""

    def at(rate: float) -> optax.GradientTransformation:
        return optax.chain(optimizer, optax.inject_hyperparams(optax.scale)(step_size=rate))

    step = gradient_step(loss_fn, at(1.0))
    role = "ours" if name == OURS else "baseline"
    return Entrant(name, lambda rate: (at(rate), step), rates, role)
