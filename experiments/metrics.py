"""Where evaluations are written while an experiment runs."""

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import report
from experiments.training import Evaluation

Write = Callable[[str, Evaluation], None]
"""Takes a training run's label and what was measured of it."""


@contextmanager
def json_lines(path: Path) -> Iterator[Write]:
    """A new file with a line for each evaluation, written as soon as it is made."""
    with path.open("w", encoding="utf-8") as file:

        def write(run: str, evaluation: Evaluation) -> None:
            step, seconds, values = evaluation
            line = {"run": run, "step": step, "seconds": seconds, **values}
            print(json.dumps(report.plain(line), allow_nan=False), file=file, flush=True)

        yield write


@contextmanager
def tensorboard(folder: Path) -> Iterator[Write]:
    """A new folder for TensorBoard, with one in it for each training run."""
    if folder.exists():
        shutil.rmtree(folder)
    writers: dict[str, Any] = {}

    def write(run: str, evaluation: Evaluation) -> None:
        if run not in writers:
            module = importlib.import_module("tensorboardX")
            writers[run] = module.SummaryWriter(str(folder / run))
        for metric, value in evaluation.values.items():
            writers[run].add_scalar(metric, value, evaluation.step)
        writers[run].flush()

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


def check_tensorboard() -> None:
    """Refuse to write for TensorBoard where its writer is missing.

    Raises:
      ValueError: If it is.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("--tensorboard needs tensorboardX, which is missing: install it with pip")
