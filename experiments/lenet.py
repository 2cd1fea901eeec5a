"""SGD and back-matching train LeNet on CIFAR-10.

Zhang, Chen and Liu, section 3.3, Fig. 2.
The page is `experiments.pages.lenet`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optax

import cqjax
from experiments import models, options
from experiments.classification import cross_entropy, initialise
from experiments.contest import Entrant, Task, held_out
from experiments.data import Dataset
from experiments.on_images import Contest
from experiments.training import gradient_step

DECAYS = {"no decay": 0.0, "decay 5e-4": 5e-4}
MOMENTUM = 0.9
SIDE = 16  # smaller images have nothing left after the second pooling


@dataclass(frozen=True)
class LeNet(Contest):
    """Train LeNet by SGD and by SGD with back-matching rates, with and without weight decay.

    Both have momentum 0.9. Each is tuned at the paper's five candidate rates, by validation loss.
    Then, at each of several seeds, both start from the same weights and see the same batches. There
    is no augmentation, and the images are standardised. The losses do not include the weight
    decay's term, and are measured with batch normalisation's running averages. With `--tries 1`
    only the paper's rates are used. The results are README.md, losses.png and results.json. During
    the run, the metrics go to metrics.jsonl.
    """

    name = "lenet"
    presets = options.presets(
        dataset=("digits", "cifar10", "cifar10"),
        measured=(500, 5000, 45_000),
        epochs=(2.0, 6.0, 200.0, 150.0),
        tuning_epochs=(0.5, 1.0, 10.0, 0.1),
        tries=(2, 5, 5, 1),
        seeds=(1, 3, 3, 1),
    )
    batch_size: int = 128
    """Images of a batch."""
    channels: tuple[int, int] = (6, 16)
    """Output channels of the two convolutions. The paper does not give them."""
    hidden: tuple[int, int] = (120, 84)
    """Neurons of the two hidden fully-connected layers. The paper does not give them."""
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
        self.require_rates("sgd", "back_matching")

    def prepared(self, dataset: Dataset) -> Dataset:
        """The data set with images that are large enough, standardised."""
        return dataset.pictures(SIDE).standardised()

    def contests(self, dataset: Dataset) -> dict[str, tuple[Task, list[Entrant]]]:
        """A contest for each weight decay: what is learnt, and who takes part.

        Args:
          dataset: The data set, `prepared`.

        Returns:
          The same task in both. SGD and back-matching take part, without weight decay and with it.
        """
        model = models.LeNet(self.channels, self.hidden, dataset.classes)
        task = Task(
            held_out(dataset),
            model,
            lambda seed: initialise(model, seed, dataset.train.images),
            watched={"weights": lambda params, _: float(optax.tree.norm(params))},
        )
        return {title: (task, self._entrants(task, decay)) for title, decay in DECAYS.items()}

    def _entrants(self, task: Task, decay: float) -> list[Entrant]:
        loss_fn = cross_entropy(task.model, train=True)
        images, labels = (array[: self.batch_size] for array in task.parts.train)
        plan = cqjax.plan(loss_fn, batch_size=len(labels))(*task.start(self.seed), images, labels)

        def sgd(rate: float) -> Any:
            optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, MOMENTUM))
            return optimizer, gradient_step(loss_fn, optimizer)

        def ours(rate: float) -> Any:
            optimizer = cqjax.back_matching_sgd(rate, MOMENTUM, False, decay, plan=plan)
            return optimizer, gradient_step(loss_fn, optimizer)

        return [
            Entrant("SGD", sgd, self.rates("sgd")),
            Entrant("back-matching", ours, self.rates("back_matching"), "ours"),
        ]
