"""The benchmarks' command: runs the parts, prints their tables, writes every number."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from rich.console import Console

from experiments import options, report
from experiments.benchmarks import accelerator, against_adam, choice, kfac, patch_gram, steps
from experiments.benchmarks.bars import Result, Table
from experiments.benchmarks.timing import PERIOD, Effort
from experiments.benchmarks.workloads import WORKLOADS

Part = Literal[
    "mlp-32",
    "mlp-128",
    "mlp-512",
    "mlp-1600",
    "resnet20",
    "transformer",
    "against-adam",
    "scale",
    "patch-gram",
    "choice",
    "accelerator",
]

USUAL = tuple(part for part in get_args(Part) if part != "accelerator")
"""What is measured if nothing else is asked for: on a CPU the sizes of an accelerator take long."""

PARTS: dict[str, Callable[[Effort], Result]] = {
    **{name: partial(steps.measure, name, workload) for name, workload in WORKLOADS.items()},
    "against-adam": partial(against_adam.measure, "against-adam"),
    "scale": partial(against_adam.scale, "scale"),
    "patch-gram": partial(patch_gram.measure, "patch-gram"),
    "choice": partial(choice.measure, "choice"),
    "accelerator": partial(accelerator.measure, "accelerator"),
}

METHOD = f"""\
All that is compared runs in one process and takes turns, in random order. A sample is {PERIOD}
steps in a row, waited for at the end, or one where {PERIOD} take too long; a ratio is the median
over the turns of the ratios within a turn. SGD's step is `jax.value_and_grad` and `optax.sgd`;
every step is jitted, with donated buffers. Compiling is tracing, lowering and compiling with empty
caches; memory is the compiled program's temporary memory. Inputs are random, and the rate is so
small that the batch is never fitted."""


@dataclass(frozen=True)
class Bench:
    """Time cqjax beside other optimizers and other routes to the same, and judge it by its bars.

    The parts are training steps of several networks, C-Adam's step and compilation beside Adam's,
    the latter also for transformers of several depths, the Gram matrix of a convolution's patches,
    and the automatic choice between the primal and the dual. "accelerator" is for GPUs and TPUs:
    C-Adam beside Adam at three sizes, with launches and profiles. The results are tables, also in
    bench.md, and every number in bench.json. Both files are written again after each part.
    K-FAC-JAX is timed too where it is installed (pip install 'cqjax[bench]') and works.
    """

    parts: tuple[Part, ...] = USUAL
    """What to measure."""
    repeats: int = 30
    """The greatest number of samples of each thing."""
    budget: float = 30.0
    """A thing that has taken so many seconds gets no more samples, if it has three."""
    compiles: int = 3
    """How often each network's step is compiled; the median counts."""
    output: Path = Path("results/bench")
    """Folder for bench.json and bench.md."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.AT_LEAST_ONE, "repeats", "compiles")
        options.require(self, options.POSITIVE, "budget")
        options.require_distinct(self, "parts")

    def run(self) -> None:
        """Measure, print tables and write the results."""
        console, results = Console(), {}
        self.output.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_enable_compilation_cache", False)
        environment = report.environment()
        if kfac.installed():
            environment["versions"]["kfac-jax"] = version("kfac-jax")
        for name in self.parts:
            results[name] = PARTS[name](Effort(self.repeats, self.budget, self.compiles))
            for table in results[name].tables:
                report.print_table(console, table.title, table.rows)
            self._write(results, environment)
        for table in _bars(list(results.values())):
            report.print_table(console, table.title, table.rows)
        written = f"Written: {self.output}/bench.md and {self.output}/bench.json"
        console.print(written, highlight=False, soft_wrap=True)

    def _write(self, results: dict[str, Result], environment: dict[str, Any]) -> None:
        every = list(results.values())
        content = {
            "experiment": "bench",
            "settings": asdict(self),
            "environment": environment,
            "bars": [bar.numbers() for result in every for bar in result.bars],
            "parts": {name: result.numbers for name, result in results.items()},
        }
        report.write_json(self.output / "bench.json", content)
        tables = [*_bars(every), *(table for result in every for table in result.tables)]
        sections = (f"## {table.title}\n\n{report.markdown_table(table.rows)}" for table in tables)
        text = "\n\n".join(("# Benchmarks", report.machine(environment), METHOD, *sections))
        (self.output / "bench.md").write_text(text + "\n", encoding="utf-8")


def _bars(results: Sequence[Result]) -> list[Table]:
    """All bars in a table, if there are any."""
    rows = [bar.row() for result in results for bar in result.bars]
    return [Table("bars", rows)] if rows else []
