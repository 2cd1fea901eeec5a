"""SGD and back-matching train LeNet on CIFAR-10 (seed 004, section 3.3 and Figure 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optax
from rich.console import Console

import cqjax
from experiments import data, models, options
from experiments.classification import cross_entropy, initialise
from experiments.contest import Entrant, Task, held_out
from experiments.experiment import Contest
from experiments.page import publish
from experiments.pages import lenet as pages
from experiments.training import gradient_step

DECAYS = {"no decay": 0.0, "decay 5e-4": 5e-4}
MOMENTUM = 0.9
SIDE = 16  # smaller images have nothing left after the second pooling
PRESETS: dict[options.Preset, dict[str, Any]] = {
    "smoke": {
        **{"dataset": "digits", "measured": 500},
        **{"epochs": 2.0, "tuning_epochs": 0.5, "tries": 2, "seeds": 1},
    },
    "cpu": {
        **{"dataset": "cifar10", "measured": 5000},
        **{"epochs": 6.0, "tuning_epochs": 1.0, "tries": 5, "seeds": 3},
    },
    "paper": {
        **{"dataset": "cifar10", "measured": 45_000},
        **{"epochs": 200.0, "tuning_epochs": 10.0, "tries": 5, "seeds": 3},
    },
}


@dataclass(frozen=True)
class LeNet(Contest):
    """Train LeNet by SGD and by SGD with back-matching rates, with and without weight decay.

    Both have momentum 0.9. Each is tuned at the paper's five candidate rates, by validation loss;
    then both start from the same weights and see the same batches, at each of several seeds,
    without augmentation. Each channel of the images has the training set's mean and standard
    deviation taken out. The losses are without the weight decay's term, and measured with batch
    normalisation's running averages. Results are README.md, losses.png and results.json; while it
    runs, the metrics go to metrics.jsonl. `--tries 1` is the paper's choice of rates alone.
    """

    batch_size: int = 128
    """Images of a batch."""
    channels: tuple[int, int] = (6, 16)
    """Output channels of the two convolutions; the paper does not tell them."""
    hidden: tuple[int, int] = (120, 84)
    """Neurons of the two hidden fully-connected layers; the paper does not tell them."""
    sgd_rates: tuple[float, ...] = (0.1, 0.05, 0.2, 0.02, 0.5)
    """Learning rates to try for SGD; the paper chose the first."""
    back_matching_rates: tuple[float, ...] = (0.02, 0.01, 0.05, 0.005, 0.1)
    """Learning rates to try for back-matching; the paper chose the first."""
    output: Path = Path("results/lenet")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "channels", "hidden")
        tries = self.tries or PRESETS[self.preset]["tries"]
        options.require_rates(self, tries, "sgd_rates", "back_matching_rates")

    def run(self) -> None:
        """Tune, train, draw, and judge the source's claims.

        Raises:
          DataError: If there is no such data set, or its files are bad.
          ResumeError: If it cannot go on from what there is.
        """
        console, settings = Console(), options.filled(self, PRESETS)
        assert settings.dataset
        dataset = data.load(settings.dataset, self.data_dir, self.download)
        console.print(f"Data: {dataset}", highlight=False, soft_wrap=True)
        dataset = dataset.pictures(SIDE).standardised()
        model = models.LeNet(settings.channels, settings.hidden, dataset.classes)
        images = dataset.train.images
        task = Task(
            held_out(dataset),
            model,
            lambda seed: initialise(model, seed, images),
            watched={"weights": lambda params, _: float(optax.tree.norm(params))},
        )
        contests = {
            title: (task, _entrants(settings, task, decay)) for title, decay in DECAYS.items()
        }
        publish("lenet", self, settings, pages, settings.hold(console, dataset, contests), console)


def _entrants(settings: LeNet, task: Task, decay: float) -> Sequence[Entrant]:
    loss_fn = cross_entropy(task.model, train=True)
    images, labels = (array[: settings.batch_size] for array in task.parts.train)
    plan = cqjax.plan(loss_fn, batch_size=len(labels))(*task.start(settings.seed), images, labels)

    def sgd(rate: float) -> Any:
        optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, MOMENTUM))
        return optimizer, gradient_step(loss_fn, optimizer)

    def ours(rate: float) -> Any:
        optimizer = cqjax.back_matching_sgd(rate, MOMENTUM, False, decay, plan=plan)
        return optimizer, gradient_step(loss_fn, optimizer)

    return [
        Entrant("SGD", sgd, settings.sgd_rates[: settings.tries]),
        Entrant("back-matching", ours, settings.back_matching_rates[: settings.tries], "ours"),
    ]
