"""Optimizers do six kinds of everyday work.

The page is `experiments.pages.everyday`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import options
from experiments.contest import Effort, Entrant, Task
from experiments.data import Dataset, Split
from experiments.everyday import entrants
from experiments.everyday.work import ALL, Size, examples, pace
from experiments.on_images import OnImages

KINDS = ("language", "autoencoder", "cnn", "coordinates", "tabular", "mlp")
TUNED = ("adam", "nesterov", "muon", "csgd", "cnesterov", "cmuon", "cadam")


@dataclass(frozen=True)
class Everyday(OnImages):
    """Train six everyday networks by Adam, Nesterov, Muon and this library's optimizers.

    A language model, an autoencoder, a convolutional network, a coordinate network, a table and a
    fully-connected network. All optimizers have the same schedule: the rate rises for a twentieth
    of the steps, and then falls to zero as a cosine. Its peak is tuned by the validation loss of
    whole runs, in half decades, further for as long as the best rate is at the edge of those tried.
    Then, at each of several seeds, all start from the same weights and see the same batches. The
    results are README.md, two figures and results.json. During the run, the metrics go to
    metrics.jsonl.
    """

    name = "everyday"
    presets = options.presets(
        dataset=("digits", "fashion_mnist", "fashion_mnist"),
        measured=(100, 1000, 10_000),
        evaluated=(100, 1000, 10_000),
        tries=(2, 3, 3),
        extensions=(1, 3, 5),
        seeds=(1, 3, 5),
        length=(0.03, 1.0, 10.0),
        narrower=(8, 1, 1),
        characters=(20_000, 1_500_000, 10_000_000),
        side=(32, 128, 256),
        rows=(400, 4000, 4000),
    )
    kinds: tuple[
        Literal["language", "autoencoder", "cnn", "coordinates", "tabular", "mlp"], ...
    ] = KINDS
    """The kinds of work."""
    optimizers: tuple[
        Literal["adam", "nesterov", "muon", "csgd", "cnesterov", "cmuon", "cadam"], ...
    ] = TUNED
    """Who takes part: Adam, C-Adam and others."""
    dampings: tuple[float, ...] = ()
    """Let C-Adam take part once more with each of these relative dampings."""
    blocks: tuple[int, ...] = ()
    """Let C-Adam take part once more with features in blocks of at most each of these sizes."""
    extensions: int | None = None
    """While the best rate is at the edge of those tried, try one more beyond it, up to so many."""
    length: float | None = None
    """Multiply the numbers of steps by it. 1 takes some minutes for each kind."""
    narrower: Literal[1, 2, 4, 8] | None = None
    """Divide the widths of the networks by it."""
    characters: int | None = None
    """Length of the text."""
    side: int | None = None
    """Rows and columns of the picture."""
    rows: int | None = None
    """Rows of the table."""
    evaluated: int | None = None
    """Validate and test on so many examples. Texts: a sixteenth, as for --measured."""
    adam_rates: tuple[float, ...] = (3e-3, 1e-3, 1e-2)
    """Learning rates to try for Adam at first."""
    nesterov_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for SGD with Nesterov's momentum at first."""
    muon_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for Muon at first."""
    csgd_rates: tuple[float, ...] = (0.1, 0.03, 0.3)
    """Learning rates to try for C-SGD at first."""
    cnesterov_rates: tuple[float, ...] = (0.01, 0.003, 0.03)
    """Learning rates to try for C-Nesterov at first."""
    cmuon_rates: tuple[float, ...] = (0.03, 0.01, 0.1)
    """Learning rates to try for Muon after consequentialism at first."""
    cadam_rates: tuple[float, ...] = (0.01, 0.003, 0.03)
    """Learning rates to try for C-Adam at first."""
    output: Path = Path("results/everyday")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "evaluated", "characters", "side", "rows")
        options.require(self, options.LENGTH, "length")
        options.require(self, options.COUNT, "extensions")
        options.require(self, options.POSITIVE, "dampings", "blocks")
        options.require_distinct(self, "kinds")
        options.require_distinct(self, "optimizers", "adam", "cadam")
        self.require_rates(*self.optimizers)

    def contests(self, dataset: Dataset) -> dict[str, tuple[Task, list[Entrant]]]:
        """A contest for each kind of work.

        Args:
          dataset: The images of those kinds that learn from images.

        Returns:
          By kind, what is learnt, and who takes part.
        """
        grids = {name: self.rates(name) for name in self.optimizers}
        works = {kind: ALL[kind](self._size(), dataset) for kind in self.kinds}
        return {
            kind: (work.task, entrants.everyone(work, grids, self.dampings, self.blocks))
            for kind, work in works.items()
        }

    def effort(self, title: str, train: Split) -> Effort:
        """How much is done for each entrant of a contest. A tuning run is a whole run."""
        assert self.seeds and self.measured and self.length and self.extensions is not None
        its = pace(title, self.length)
        measured = examples(title, self.measured)
        whole = its.steps, its.steps
        return Effort(*whole, self.seeds, self.seed, its.batch_size, measured, self.extensions)

    def _size(self) -> Size:
        return Size(**{field: getattr(self, field) for field in Size._fields})
