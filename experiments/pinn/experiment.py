"""Optimizers train where a loss uses weights forwards and backwards.

The page is `experiments.pages.pinn`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import options
from experiments.contest import Effort, Entrant, Task
from experiments.data import Dataset, Split
from experiments.everyday.entrants import ADAM, OURS
from experiments.experiment import Contests
from experiments.pinn import entrants
from experiments.pinn.work import ALL, POSED, Size, pace
from experiments.training import State, shuffled_batches, train

KINDS = ("poisson", "burgers", "gan", "tied")
SIDE = 31  # rows and columns of the fields that are drawn


@dataclass(frozen=True)
class Pinn(Contests):
    """Train networks whose losses use weights forwards and backwards, by Adam, L-BFGS and ours.

    Two networks solve differential equations, whose derivatives are in the loss: Poisson's on a
    square, and Burgers'. A GAN has a penalty on its critic's gradients. A language model has one
    table for its first and last layer. All optimizers but L-BFGS have the same schedule: the rate
    rises for a twentieth of the steps, and then falls to zero as a cosine. Its peak is tuned by the
    validation loss of whole runs, in half decades, further for as long as the best rate is at the
    edge of those tried. Then, at each of several seeds, all start from the same weights and see the
    same batches. The results are README.md, three figures and results.json. During the run, the
    metrics go to metrics.jsonl.
    """

    name = "pinn"
    presets = options.presets(
        tries=(2, 3, 3),
        extensions=(0, 3, 5),
        seeds=(1, 3, 5),
        length=(0.01, 1.0, 10.0),
        narrower=(8, 1, 1),
        characters=(20_000, 1_500_000, 10_000_000),
        side=(11, 51, 101),
        evaluated=(64, 512, 1024),
    )
    kinds: tuple[Literal["poisson", "burgers", "gan", "tied"], ...] = KINDS
    """The kinds of work."""
    mode: Literal["reverse", "forward"] = "reverse"
    """How the losses differentiate networks: by jax.grad, which uses weights backwards, too; or by
    jax.jvp, which uses them forwards alone. The values are the same."""
    extensions: int | None = None
    """While the best rate is at the edge of those tried, try one more beyond it, up to so many."""
    length: float | None = None
    """Multiply the numbers of steps by it. 1 takes some minutes for each kind."""
    narrower: Literal[1, 2, 4, 8] | None = None
    """Divide the widths of the networks by it."""
    characters: int | None = None
    """Length of the text."""
    side: int | None = None
    """Rows and columns of the grid on which a solution is tested."""
    evaluated: int | None = None
    """Compare so many points of the GAN. Texts: a sixteenth."""
    dampings: tuple[float, ...] = ()
    """Let C-Adam take part once more with each of these relative dampings."""
    adam_rates: tuple[float, ...] = (3e-3, 1e-3, 1e-2)
    """Learning rates to try for Adam at first."""
    csgd_rates: tuple[float, ...] = (0.1, 0.03, 0.3)
    """Learning rates to try for C-SGD at first."""
    cadam_rates: tuple[float, ...] = (0.01, 0.003, 0.03)
    """Learning rates to try for C-Adam at first."""
    lbfgs_memories: tuple[float, ...] = (10, 30, 100)
    """How many updates L-BFGS remembers, to try at first."""
    output: Path = Path("results/pinn")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        super().__post_init__()
        options.require(self, options.AT_LEAST_ONE, "evaluated", "characters", "side")
        options.require(self, options.AT_LEAST_ONE, "lbfgs_memories")
        options.require(self, options.LENGTH, "length")
        options.require(self, options.COUNT, "extensions")
        options.require(self, options.POSITIVE, "dampings")
        options.require_distinct(self, "kinds")
        self.require_rates("adam", "csgd", "cadam")
        tries = self.tries or self.presets[self.preset]["tries"]
        options.require_rates(self, tries, "lbfgs_memories")

    def load(self, console: Console) -> Dataset:
        """What the first kind of work learns from: all of it is made here, from fixed seeds."""
        parts = _contest(self, self.kinds[0])[0].parts
        return Dataset(", ".join(self.kinds), "made by the program", parts.train, parts.test)

    def contests(self, dataset: Dataset) -> dict[str, tuple[Task, list[Entrant]]]:
        """A contest for each kind of work.

        Args:
          dataset: Not used: each kind makes its own.

        Returns:
          By kind, what is learnt, and who takes part.
        """
        return {kind: _contest(self, kind) for kind in self.kinds}

    def effort(self, title: str, train: Split) -> Effort:
        """How much is done for each entrant of a contest. A tuning run is a whole run."""
        assert self.seeds and self.evaluated and self.length and self.extensions is not None
        its, texts = pace(title, self.length), max(1, self.evaluated // 16)
        measured = texts if title == "tied" else self.evaluated
        whole = its.steps, its.steps
        return Effort(*whole, self.seeds, self.seed, its.batch_size, measured, self.extensions)

    def hold(self, console: Console, dataset: Dataset, shared: bool = False) -> dict[str, Any]:
        """Hold all contests, and add the fields that Adam and C-Adam end with at the first seed.

        Args:
          console: Where to draw the progress.
          dataset: What `load` returned.
          shared: As in `Session`.

        Returns:
          What `Contests.hold` returns, and by equation the true field and theirs, row by row.
        """
        results = super().hold(console, dataset, shared)
        if shared:
            return results
        posed = [kind for kind in results["contests"] if kind in POSED]
        return results | {"fields": {kind: self._fields(kind, results) for kind in posed}}

    def _fields(self, kind: str, results: dict[str, Any]) -> dict[str, list[float]]:
        """Repeats two runs, for the sake of their last parameters."""
        equation, contest = POSED[kind].equation, results["contests"][kind]
        places = equation.grid(SIDE)
        fields = {"true": equation.solution(places).tolist()}
        task, who = _contest(self, kind)
        takes_part = {entrant.name: entrant for entrant in who}
        places_inside, targets = task.parts.train
        examples = jnp.asarray(places_inside), jnp.asarray(targets)
        seed, steps = self.seed + 1, contest["effort"]["steps"]
        batches = shuffled_batches(seed, len(examples[1]), len(examples[1]), steps)
        for name in (ADAM, OURS):
            rates = [contest["entrants"][each]["rate"] for each in (name, *takes_part[name].given)]
            optimizer, step = takes_part[name].at(*rates)
            params, model_state = task.start(seed)
            state = State(params, model_state, optimizer.init(params))
            state, _ = train(step, state, examples, batches, {}, lambda *_: None)
            values = task.model.apply({"params": state.params}, places)
            fields[name] = np.asarray(values, float).tolist()
        return fields


@cache
def _contest(settings: Pinn, kind: str) -> tuple[Task, list[Entrant]]:
    """What is learnt, and who takes part, always with the same steps: they are compiled once."""
    work = ALL[kind](Size(**{field: getattr(settings, field) for field in Size._fields}))
    grids = {name: settings.rates(name) for name in ("adam", "cadam")}
    if kind in POSED:
        memories = settings.lbfgs_memories[: settings.tries]
        grids |= {"csgd": settings.rates("csgd"), "lbfgs": memories}
    everyone = entrants.everyone(work, grids, settings.dampings)
    return work.task, [one.with_cached_steps() for one in everyone]
