"""What is learnt here: two equations' solutions, a ring of points, and a text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.classification import (
    LossFn,
    Metric,
    cross_entropies,
    initialise,
    mean_over_batch,
)
from experiments.contest import Parts, Task
from experiments.data import Split
from experiments.everyday import networks, sources
from experiments.everyday.work import LENGTH, Pace, Work
from experiments.pinn import equations
from experiments.pinn.equations import Equation, Mode, Network
from experiments.pinn.gan import Gan, ring

ERROR = "test_error"
POINTS = 8192  # of the ring, to train on


class Size(NamedTuple):
    """How large the work is."""

    mode: Mode
    """How the losses differentiate networks."""
    length: float = 1.0
    """The usual numbers of steps are multiplied by it."""
    narrower: int = 1
    """Widths are divided by it."""
    characters: int = 1_500_000
    """Length of the text."""
    side: int = 51
    """Rows and columns of the grid on which a solution is tested."""
    evaluated: int = 512
    """Compare so many points of the ring, and evaluate a sixteenth as many pieces of text."""


class Posed(NamedTuple):
    """An equation, and how a network is to solve it."""

    equation: Equation
    inside: int
    """Places inside, of which a fourth as many are on the border."""
    weight: float
    """How much the border counts."""


POSED = {
    "poisson": Posed(equations.POISSON, 256, 100.0),
    "burgers": Posed(equations.BURGERS, 512, 1.0),
}
PACES = {
    "poisson": Pace(POSED["poisson"].inside, 1500),
    "burgers": Pace(POSED["burgers"].inside, 1500),
    "gan": Pace(128, 1500),
    "tied": Pace(16, 300, LENGTH),
}


def pace(kind: str, length: float) -> Pace:
    """The pace of a kind of work, with so many times the usual steps."""
    usual = PACES[kind]
    return usual._replace(steps=max(2, round(length * usual.steps)))


def relative_error(model: Any, places: np.ndarray, values: np.ndarray) -> Metric:
    """The metric that is the distance of a network's values from some, by the norm of these."""
    field = jax.jit(lambda params: model.apply({"params": params}, places))

    def metric(params: Any, model_state: Any) -> float:
        errors = np.asarray(field(params), np.float64) - values
        return float(np.linalg.norm(errors) / np.linalg.norm(values))

    return metric


def poisson(size: Size) -> Work:
    """Poisson's equation on a square."""
    return _solving(size, "poisson")


def burgers(size: Size) -> Work:
    """Burgers' equation, where a wave steepens."""
    return _solving(size, "burgers")


def _solving(size: Size, kind: str) -> Work:
    equation, number, weight = POSED[kind]
    model, rng = Network(64 // size.narrower), np.random.default_rng(0)

    def collocation() -> tuple[Split, LossFn]:
        """Places, what their residuals should be, and a loss with places on the border."""
        inside = Split(
            equation.inside(rng, number).astype(np.float32), np.zeros(number, np.float32)
        )
        border = equation.border(rng, number // 4).astype(np.float32)
        return inside, equations.loss(model, equation, size.mode, border, weight)

    (train, train_loss), (validation, validation_loss) = collocation(), collocation()
    grid = equation.grid(size.side).astype(np.float32)
    test = Split(grid, equation.solution(grid))
    task = Task(
        Parts(train, validation, test),
        model,
        lambda seed: initialise(model, seed, train.images),
        watched={
            "train_loss": _value(train_loss, train),
            "validation_loss": _value(validation_loss, validation),
            ERROR: relative_error(model, *test),
        },
        score=ERROR,
        goal=ERROR,
    )
    return Work(task, train_loss, pace(kind, size.length))


def _value(loss_fn: LossFn, part: Split) -> Metric:
    """The metric that is a loss."""
    compiled, examples = jax.jit(loss_fn), tuple(map(jnp.asarray, part))
    return lambda params, model_state: float(compiled(params, model_state, *examples)[0])


def gan(size: Size) -> Work:
    """A generator and a critic, of points around eight places of a circle."""
    rng, model = np.random.default_rng(0), Gan.of(64 // size.narrower)
    parts = Parts(*(ring(rng, number) for number in (POINTS, size.evaluated, size.evaluated)))
    seen = (array[: size.evaluated] for array in parts.train)
    task = Task(
        parts,
        model,
        model.start,
        watched={
            "train_loss": model.distance(*seen),
            "validation_loss": model.distance(*parts.validation),
            ERROR: model.distance(*parts.test),
        },
        score=ERROR,
        goal=ERROR,
    )
    # 0.5 is what GANs are trained with since Radford, Metz and Chintala (2016).
    return Work(task, model.loss(size.mode), pace("gan", size.length), {"b1": 0.5})


def tied(size: Size) -> Work:
    """A language model with one table for its first and its last layer."""
    parts = sources.sequences(size.characters, LENGTH)
    width, blocks = max(8, 64 // size.narrower), 2 if size.narrower == 1 else 1
    model = networks.Language(sources.SYMBOLS, width, blocks, tied=True)
    task = Task(
        parts.evaluated(max(1, size.evaluated // 16)),
        model,
        lambda seed: initialise(model, seed, parts.train.images),
        score=ERROR,
        scores=cross_entropies,
        goal=ERROR,
    )
    return Work(task, mean_over_batch(model, cross_entropies), pace("tied", size.length))


ALL: dict[str, Callable[[Size], Work]] = {
    make.__name__: make for make in (poisson, burgers, gan, tied)
}
