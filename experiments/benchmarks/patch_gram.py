"""The Gram matrix of a convolution's patches: by cqjax, and with the patches written out."""

from typing import Any

import jax
import numpy as np
from rich.progress import track

from cqjax.linalg import conv_gram, gram, windows
from experiments.benchmarks import timing
from experiments.benchmarks.bars import Bar, Result, Table, number, spread

BATCH = 128
SHAPES = {(32, 32, 16): 6.0, (16, 16, 32): 4.0, (8, 8, 64): 2.0}
"""By the shape of the inputs: how many times as fast as with patches cqjax must be."""
WINDOW = windows.Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))  # 3 × 3, SAME


def measure(name: str, effort: timing.Effort) -> Result:
    """Time both ways, each alone in a loop and one after the other."""
    numbers, rows, bars = {}, [], []
    for shape, limit in track(SHAPES.items(), description=name):
        words = "×".join(map(str, shape))
        found = _compare((BATCH, *shape), effort)
        numbers[words] = found
        rows.append(_row(words, found))
        work = f"patch Gram, 3×3 SAME, batch {BATCH}, {words}: times faster than patches"
        for how in ("alone", "interleaved"):
            bars.append(Bar(f"{work}, {how}", found[how]["ratio"]["median"], limit, at_least=True))
    return Result(
        numbers, [Table(f"Gram of 3×3 patches, SAME, batch {BATCH}: patches / cqjax", rows)], bars
    )


def _compare(shape: tuple[int, ...], effort: timing.Effort) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(0), shape)

    def ours(x: jax.Array) -> jax.Array:
        return conv_gram.inner(x, WINDOW)

    def theirs(x: jax.Array) -> jax.Array:
        return gram.inner(windows.patches(x, WINDOW))

    programs = {"cqjax": timing.compiled(ours, x), "patches": timing.compiled(theirs, x)}
    alone = {way: _loop(program, x, effort) for way, program in programs.items()}
    turns = {
        way: timing.Sample(lambda program=program: program.call(x), 1, effort.repeats)
        for way, program in programs.items()
    }
    memory = {way: program.temporary_bytes for way, program in programs.items()}
    return {
        "alone": _times(alone),
        "interleaved": _times(timing.interleaved(turns)),
        "temporary_bytes": memory,
    }


def _loop(program: timing.Program, x: jax.Array, effort: timing.Effort) -> np.ndarray:
    """Seconds of calls of one program, after a warm-up."""
    timing.seconds_of(lambda: program.call(x), times=3)
    return np.array([timing.seconds_of(lambda: program.call(x)) for _ in range(effort.repeats)])


def _times(seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "ratio": timing.summary(seconds["patches"] / seconds["cqjax"]),
        "seconds": {way: timing.summary(values) for way, values in seconds.items()},
    }


def _row(shape: str, found: dict[str, Any]) -> dict[str, str]:
    row = {"input": shape}
    for how in ("alone", "interleaved"):
        seconds = found[how]["seconds"]
        ms = (number(1e3 * seconds[way]["median"]) for way in ("patches", "cqjax"))
        row |= {f"faster, {how}": spread(found[how]["ratio"]), f"ms, {how}": " / ".join(ms)}
    memory = (found["temporary_bytes"][way] for way in ("patches", "cqjax"))
    sizes = (number(size and size / 1e6, 1) for size in memory)
    return row | {"temporary MB": " / ".join(sizes)}
