"""What the automatic choice between the primal and the dual loses against the better of the two."""

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import cqjax
from experiments.benchmarks import timing
from experiments.benchmarks.bars import Bar, Result, Table
from experiments.training import capturing_step

ROWS = (8, 32, 128, 512, 1024, 4096)
FEATURES = (64, 256, 784, 1024, 4096)
SLOW = 20.0  # a combination whose step takes more seconds is left out
LIMIT = 1.1  # times the better solver's step: what a step of the chosen one may take

Solver = Literal["dual", "primal"]
SOLVERS: tuple[Solver, ...] = ("dual", "primal")


def measure(name: str, effort: timing.Effort) -> Result:
    """Time C-SGD's step for a layer of d outputs by each solver, over rows n and features d."""
    numbers = [
        {"rows": n, "features": d} | _compare(n, d, effort)
        for n, d in track(list(itertools.product(ROWS, FEATURES)), description=name)
    ]
    cells = {(found["rows"], found["features"]): _cell(found) for found in numbers}
    rows = [{"n": f"{n:,}"} | {f"d = {d:,}": cells[n, d] for d in FEATURES} for n in ROWS]
    losses = {
        f"n = {found['rows']}, d = {found['features']}": found["loss"]
        for found in numbers
        if "loss" in found
    }
    worst = max(losses, key=losses.__getitem__, default=None)
    where = "nothing was measured" if worst is None else f"worst at {worst}"
    work = f"automatic primal/dual choice against the better of the two, {where}"
    title = "the automatic choice, and what a step by it takes more than by the better of the two"
    bar = Bar(work, None if worst is None else losses[worst], LIMIT)
    return Result({"combinations": numbers}, [Table(title, rows)], [bar])


def _compare(n: int, d: int, effort: timing.Effort) -> dict[str, Any]:
    """Time both solvers, interleaved, and see by how much the chosen one is the slower."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(key, (n, d)) for key in keys[:2])
    params = {"w": jax.random.normal(keys[2], (d, d)) / d**0.5}
    (block,) = cqjax.plan(_loss, batch_size=n)(params, None, x, y).blocks
    tx, samples = cqjax.csgd(timing.RATE, max_change=None), {}
    for solver in SOLVERS:
        step = capturing_step(_loss, tx, solver=solver)
        training = timing.Training(step, tx.init, (params, None), (x, y))
        seconds = timing.seconds_of(training)
        if seconds > SLOW:
            return {"choice": block.solver, "left_out": f"{solver} takes {seconds:.1f} s"}
        samples[solver] = timing.planned(training, effort)
    number = min(sample.number for sample in samples.values())
    samples = {solver: timing.Sample(s.call, s.times, number) for solver, s in samples.items()}
    seconds = timing.interleaved(samples)
    ratios = seconds[block.solver] / seconds["primal" if block.solver == "dual" else "dual"]
    return {
        "choice": block.solver,
        "loss": max(1.0, float(np.median(ratios))),
        "chosen_to_other": timing.summary(ratios),
        "seconds": {solver: timing.summary(values) for solver, values in seconds.items()},
    }


def _loss(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1)), state


def _cell(found: dict[str, Any]) -> str:
    if "left_out" in found:
        return f"{found['choice']}, not timed: {found['left_out']}"
    return f"{found['choice']} +{found['loss'] - 1:.0%}"
