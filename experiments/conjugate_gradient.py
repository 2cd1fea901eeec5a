"""Conjugate gradients, steepest descent and Adam on three functions.

The NeuronLearning notes, section 3. The page is `experiments.pages.conjugate_gradient`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console

import cqjax
from experiments import options
from experiments.page import publish
from experiments.scans import compiled, stages

SIZE, CONDITION = 10, 100.0  # of the valley
SAMPLES, HIDDEN = 100, 8  # of the network

Objective = Callable[[Any], jax.Array]


def valley(key: jax.Array) -> tuple[Objective, Any]:
    """A quadratic that is turned at random, and a random start."""
    turn, start = jax.random.split(key)
    q = jnp.linalg.qr(jax.random.normal(turn, (SIZE, SIZE)))[0]
    matrix = q @ (jnp.geomspace(1.0, CONDITION, SIZE)[:, None] * q.T)
    return lambda x: 0.5 * x @ matrix @ x, jax.random.normal(start, (SIZE,))


def rosenbrock(key: jax.Array) -> tuple[Objective, Any]:
    """Rosenbrock's function of two variables, and a random start."""
    start = jax.random.uniform(key, (2,), minval=-2.0, maxval=2.0)
    return lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, start


def network(key: jax.Array) -> tuple[Objective, Any]:
    """The squared error of a network of one hidden layer, and random weights."""
    x = jax.random.uniform(jax.random.key(0), (SAMPLES, 2), minval=-1.0)
    y = jnp.sin(3 * x[:, 0]) * x[:, 1]
    first, last = jax.random.split(key)
    w1, w2 = jax.random.normal(first, (2, HIDDEN)), jax.random.normal(last, (HIDDEN,)) / HIDDEN

    def loss_fn(params: Any) -> jax.Array:
        w1, b1, w2, b2 = params
        return 0.5 * jnp.mean((jnp.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2)

    return loss_fn, (w1, jnp.zeros(HIDDEN), w2, jnp.zeros(()))


Problem = Literal["quadratic valley", "Rosenbrock", "network", "network, further"]
PROBLEMS: dict[str, tuple[Any, float]] = {  # with the part of the first value to reach
    "quadratic valley": (valley, 1e-8),
    "Rosenbrock": (rosenbrock, 1e-8),
    "network": (network, 1e-2),
    "network, further": (network, 1e-3),
}
BETAS = ("fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan")
TOLERANCES = (1e-6, 1e-3, 0.1, 0.3, 0.6, 0.9)  # of the slope after a line search
RATES = {
    "Adam": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3),
    "Dai-Yuan, fixed rate": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1),
}
PRESETS = options.presets(
    starts=(2, 10, 10),
    searches=(25, 2000, 2000),
    budget=(300, 20_000, 20_000),
    problems=(tuple(PROBLEMS)[:2], tuple(PROBLEMS), tuple(PROBLEMS)),
)


@dataclass(frozen=True)
class ConjugateGradient:
    """Minimise a valley, Rosenbrock's function and a network's loss by conjugate gradients.

    The four beta and steepest descent use a line search, with a tolerance. The source's own rule
    and Adam use a rate. The best of six tolerances or rates is found from some starts; the results
    are from other starts. All is in float64.
    """

    preset: options.Preset = "cpu"
    """smoke for tests, or cpu. The source has no settings: paper is the same as cpu."""
    starts: int | None = None
    """How many starts to tune on, and how many others to measure. By default the preset's."""
    searches: int | None = None
    """Line searches of a run. By default the preset's."""
    budget: int | None = None
    """The target must be reached within so many evaluations. By default the preset's."""
    problems: tuple[Problem, ...] | None = None
    """What to minimise. By default the preset's."""
    output: Path = Path("results/conjugate_gradient")
    """Folder for README.md, progress.png and results.json."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.AT_LEAST_ONE, "starts", "searches", "budget")

    def run(self) -> None:
        """Minimise, draw how it went, and judge the source's claims."""
        settings, console = options.filled(self, PRESETS), Console()
        assert settings.problems
        results: dict[str, Any] = {
            name: {"target": PROBLEMS[name][1], "methods": {}} for name in settings.problems
        }
        methods = (*BETAS, "steepest descent", *RATES)
        with jax.enable_x64(True):
            for problem, method in stages(console, list(product(results, methods))):
                found = _tuned(settings, *PROBLEMS[problem], method)
                results[problem]["methods"][method] = found
        publish("conjugate_gradient", self, settings, results, console)


def minimise(
    settings: ConjugateGradient, problem: Any, method: str, setting: jax.Array, key: jax.Array
) -> tuple[Any, Any]:
    """The value before each step, and the number of evaluations until then."""
    f, x = problem(key)
    if searching := method not in RATES:
        ours = cqjax.scale_by_conjugate_gradient(method) if method in BETAS else optax.identity()
        search = optax.scale_by_zoom_linesearch(30, curv_rtol=setting)
        optimizer = optax.chain(ours, optax.scale(-1.0), search)
    elif method == "Adam":
        optimizer = optax.adam(setting)
    else:
        rule = cqjax.scale_by_conjugate_gradient("dai_yuan", on_ascent="reverse")
        optimizer = optax.chain(rule, optax.scale_by_learning_rate(setting))
    optimizer: Any = optax.with_extra_args_support(optimizer)
    known = optax.value_and_grad_from_state(f)  # the last line search has computed them

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        x, state, evaluations = carry
        value, grad = known(x, state=state) if searching else jax.value_and_grad(f)(x)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=f)
        trials = state[-1].info.num_linesearch_steps if searching else 1
        return (optax.apply_updates(x, updates), state, evaluations + trials), (value, evaluations)

    carry = x, optimizer.init(x), jnp.ones((), jnp.int64)
    steps = settings.searches if searching else settings.budget
    return lax.scan(step, carry, None, steps)[1]


def _tuned(settings: ConjugateGradient, problem: Any, target: float, method: str) -> dict[str, Any]:
    """Find the best of six settings from some starts, and measure it from others."""
    assert settings.starts
    tuning, others = jax.random.split(jax.random.key(1), (2, settings.starts))
    choices = RATES.get(method, TOLERANCES)

    def run(setting: jax.Array, keys: jax.Array) -> Any:
        return lax.map(lambda key: minimise(settings, problem, method, setting, key), keys)

    program, compile_seconds = compiled(run, np.float64(0), tuning)

    def measured(choice: float, keys: jax.Array) -> dict[str, Any]:
        started = time.perf_counter()
        values, evaluations = map(np.asarray, program(np.float64(choice), keys))
        seconds = (time.perf_counter() - started) / evaluations[:, -1].sum()
        there = (values <= target * values[:, :1]) & (evaluations <= settings.budget)
        steps = [int(at.argmax()) if at.any() else None for at in there]
        found = [None if i is None else int(e[i]) for i, e in zip(steps, evaluations, strict=True)]
        shown = np.unique([*range(10), *np.geomspace(10, values.shape[1], 50, dtype=int) - 1])
        return {
            "setting": choice,
            "steps": steps,
            "evaluations": found,
            "seconds": [None if count is None else count * seconds for count in found],
            "final": (values[:, -1] / values[:, 0]).tolist(),
            "curve": [evaluations[0, shown].tolist(), (values[0, shown] / values[0, 0]).tolist()],
        }

    def order(found: dict[str, Any]) -> tuple[float, float]:
        counts = [count or np.inf for count in found["evaluations"]]
        return float(np.median(counts)), float(np.median(found["final"]))

    trials = [order(measured(choice, tuning)) for choice in choices]
    best = choices[min(range(len(choices)), key=trials.__getitem__)]
    return {
        "settings": choices,
        "tuning_evaluations": [evaluations for evaluations, _ in trials],
        "compile_seconds": compile_seconds,
        **measured(best, others),
        "first_setting": measured(choices[0], others),
    }
