"""What a step of each optimizer costs, in steps of SGD."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from rich.progress import track

from experiments.benchmarks.bars import Bar, Result, Table, number, spread
from experiments.benchmarks.kfac import NotInstalledError
from experiments.benchmarks.peers import COMMON, PEERS, Stepper
from experiments.benchmarks.timing import Effort, interleaved, planned, reason, summary
from experiments.benchmarks.workloads import CSGD, EVERY_10, KFAC, SGD, Workload, task

COMPILE_BAR = 2.0
PERIODIC = (EVERY_10, KFAC)  # their steps differ from one to the next


def measure(name: str, workload: Workload, effort: Effort) -> Result:
    """Time the steps of a workload's optimizers, interleaved.

    An optimizer that fails is reported with the reason. SGD must not fail.
    """
    made, labels = task(workload), list(dict.fromkeys((*COMMON, *workload.peers)))
    steppers: dict[str, Stepper] = {}
    samples, failed = {}, {}
    for label in track(labels, description=f"{name}: compiling"):
        try:
            stepper = PEERS[label](made, effort.compiles)
            samples[label] = planned(stepper, effort, whole=label in PERIODIC)
            steppers[label] = stepper
        except Exception as error:
            if label == SGD:
                raise
            failed[label] = str(error) if isinstance(error, NotInstalledError) else reason(error)
    most = max(sample.number for sample in samples.values())
    samples[SGD] = samples[SGD]._replace(number=most)
    seconds = interleaved(samples, f"{name}: timing")
    numbers = {
        label: {"failed": failed[label]}
        if label in failed
        else _numbers(steppers[label], seconds[label], steppers[SGD], seconds[SGD])
        | {"steps_per_sample": samples[label].times}
        for label in labels
    }
    rows = [_row(label, numbers[label]) for label in labels]
    return Result(
        {"title": workload.title, "optimizers": numbers},
        [Table(workload.title, rows)],
        _bars(workload, numbers),
    )


def _numbers(
    stepper: Stepper, seconds: np.ndarray, reference: Stepper, reference_seconds: np.ndarray
) -> dict[str, Any]:
    """Everything about an optimizer. Ratios are to the reference optimizer."""
    program, other, loss = stepper.program, reference.program, float(stepper.loss)
    if not math.isfinite(loss):
        return {"failed": "its loss is no longer finite"}
    memory = program.temporary_bytes
    numbers = {
        "ratio": summary(seconds / reference_seconds[: len(seconds)]),
        "seconds": summary(seconds),
        "compile_seconds": program.compile_seconds,
        "compile_ratio": program.compile_seconds / other.compile_seconds,
        "temporary_bytes": memory,
        "temporary_ratio": memory and other.temporary_bytes and memory / other.temporary_bytes,
        "entry_instructions": program.entry_instructions,
        "loss": loss,
    }
    fallbacks = optax.tree.get_all_with_path(stepper.state, "fallbacks")
    return numbers | {"fallbacks": sum(int(counts.sum()) for _, counts in fallbacks)}


def _row(label: str, numbers: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table. If the optimizer failed, the reason stands in place of its ratio."""
    dash = number(None)
    row = {"optimizer": label, "step / SGD's": numbers.get("failed", "")} | dict.fromkeys(
        ("ms per step", "compile / SGD's", "memory / SGD's"), dash
    )
    memory, instructions = (numbers.get(k) for k in ("temporary_bytes", "entry_instructions"))
    if "failed" not in numbers:
        row["step / SGD's"] = spread(numbers["ratio"])
        row["ms per step"] = number(1e3 * numbers["seconds"]["median"])
        seconds = number(numbers["compile_seconds"], 1)
        row["compile / SGD's"] = f"{number(numbers['compile_ratio'])} ({seconds} s)"
    if memory is not None:
        row["memory / SGD's"] = f"{number(numbers['temporary_ratio'])} ({memory / 1e6:,.1f} MB)"
    if jax.default_backend() != "cpu":
        row["top-level instructions"] = number(instructions, 0)
    return row


def _bars(workload: Workload, numbers: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    bars = []

    def add(label: str, key: str, limit: float, words: str) -> None:
        value = numbers[label].get(key)
        value = value["median"] if isinstance(value, Mapping) else value
        why = numbers[label].get("failed", "not known")
        bars.append(Bar(f"{workload.title}: {label}{words}", value, limit, reason=why))

    on_gpu = jax.default_backend() == "gpu"
    for label, limit in {**workload.bars, **(workload.gpu_bars if on_gpu else {})}.items():
        add(label, "ratio", limit, "")
    for label, limit in workload.memory_bars.items():
        add(label, "temporary_ratio", limit, ", temporary memory")
    for label in (CSGD, EVERY_10):
        if label in numbers:
            add(label, "compile_ratio", COMPILE_BAR, ", trace and compile time")
    return bars
