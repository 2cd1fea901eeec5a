"""C-Adam beside Adam on a GPU or TPU, at three sizes: times, launches, and where the time goes."""

import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
from jax.profiler import ProfileData
from rich.progress import track

from experiments.benchmarks import against_adam, timing
from experiments.benchmarks.against_adam import Row
from experiments.benchmarks.bars import Result, Table, number, spread
from experiments.models import MLP, ResNet, TransformerBlock

ROWS = {
    "MLP 784–8×800–10, batch 512": Row(lambda: against_adam.images(MLP(800, 8, 10), 512, 784)),
    "ResNet-20, batch 128": Row(
        lambda: against_adam.images(ResNet(20), 128, 32, 32, 3, train=True)
    ),
    "transformer block, d = 256, 4,096 tokens": Row(
        lambda: against_adam.distances(TransformerBlock(4), 16, 256, 256)
    ),
    "MLP 784–8×1600–10, batch 1,024": Row(lambda: against_adam.images(MLP(1600, 8, 10), 1024, 784)),
    "ResNet-20, batch 512": Row(
        lambda: against_adam.images(ResNet(20), 512, 32, 32, 3, train=True)
    ),
    "transformer block, d = 512, 8,192 tokens": Row(
        lambda: against_adam.distances(TransformerBlock(8), 16, 512, 512)
    ),
    "MLP 784–8×4096–10, batch 4,096": Row(lambda: against_adam.images(MLP(4096, 8, 10), 4096, 784)),
    "ResNet-20, batch 2,048": Row(
        lambda: against_adam.images(ResNet(20), 2048, 32, 32, 3, train=True)
    ),
    "transformer block, d = 1,024, 16,384 tokens": Row(
        lambda: against_adam.distances(TransformerBlock(16), 16, 1024, 1024)
    ),
}
"""From small to large: what time does not suffice for, is left out at the end."""

LONGEST = 420.0
"""After so many seconds no further row is begun: the command shall end within nine minutes."""

PROFILED = 5
"""Steps that are profiled."""

KERNELS = ("Stream", "XLA Ops", "tf_XLA")
"""How the names begin of a profile's lines that have kernels: of a GPU, a TPU, a CPU."""

SHOWN = 12
"""Operations of a profile that are printed."""


def measure(name: str, effort: timing.Effort) -> Result:
    """Time the rows as long as there is time; profile C-Adam's step of each."""
    started = time.perf_counter()
    numbers: dict[str, Any] = {}
    rows, profiles = [], []
    for title, row in track(ROWS.items(), description=name):
        if rows and time.perf_counter() - started > LONGEST:
            numbers[title] = None
            rows.append(dict.fromkeys(rows[0], "–") | {"work": f"{title}: no time was left"})
            continue
        adam, ours = steppers = against_adam.steppers(row.make(), effort)
        found = against_adam.timed(steppers, effort)
        programs = [cast(jax.stages.Compiled, each.program.call) for each in steppers]
        launched = [launches(program.as_text() or "") for program in programs]
        profile = profiled(ours)
        numbers[title] = found | {"launches": launched, "profile": profile}
        milliseconds = [1e3 * found["seconds"][each]["median"] for each in ("Adam", "C-Adam")]
        rows.append(
            {
                "work": title,
                "step": spread(found["step"]),
                "Adam, ms": number(milliseconds[0]),
                "C-Adam, ms": number(milliseconds[1]),
                "launches": " / ".join(f"{each:,}" for each in launched),
                "compiling, s": " / ".join(
                    number(each.program.compile_seconds, 1) for each in (adam, ours)
                ),
            }
        )
        profiles += [_table(title, profile)] * bool(profile)
    title = f"C-Adam to Adam on {jax.devices()[0].device_kind}"
    return Result(numbers, [Table(title, rows), *profiles], [])


def launches(hlo: str) -> int:
    """Count the instructions that a run of a compiled module launches.

    Those of a loop count as often as it runs, or once, where XLA does not know how often. Of a
    condition's branches the longest counts. What is in a command buffer counts one by one, though
    it is launched at once.
    """
    bodies = re.findall(r"^(ENTRY )?%?([\w.-]+) .*\{\n((?:  .*\n)*)\}", hlo, re.MULTILINE)
    computations = {name: body for _, name, body in bodies}

    def called(line: str, attributes: str) -> Iterator[int]:
        for several, one in re.findall(rf"(?:{attributes})=(?:\{{([^}}]*)\}}|%?([\w.-]+))", line):
            for name in (several or one).split(","):
                yield count(computations.get(name.strip(" %"), ""))

    def count(body: str) -> int:
        total = 0
        for line in body.splitlines():
            found = re.search(r" = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", line)
            if not found or found[1] in timing.NOT_LAUNCHED or found[1].endswith("-done"):
                continue
            if found[1] == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                total += int(trips[1] if trips else 1) * sum(called(line, "body|condition"))
            elif found[1] == "conditional":
                branches = "branch_computations|true_computation|false_computation"
                total += max(called(line, branches), default=0)
            elif "to_apply=%command_buffer" in line or found[1] == "call":
                total += sum(called(line, "to_apply"))
            else:
                total += 1
        return total

    return sum(count(body) for entry, _, body in bodies if entry)


def profiled(stepper: timing.Training) -> dict[str, float]:
    """The milliseconds of a step that each kind of operation takes, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                stepper()
            jax.block_until_ready(stepper.state)
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = ProfileData.from_file(str(path))
        planes = list(profile.planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:")]
        spent: Counter[str] = Counter()
        for line in (line for plane in devices or planes for line in plane.lines):
            for event in line.events if line.name.startswith(KERNELS) else ():
                # On a CPU the same threads also record what they do between operations.
                if devices or re.fullmatch(r"[\w.-]+", event.name):
                    spent[operation(event.name)] += event.duration_ns / 1e6 / PROFILED
    return dict(spent.most_common(SHOWN))


def operation(kernel: str) -> str:
    """A kernel's name without its number, and without the types of a template."""
    plain = re.split(r"[<(]", kernel.removeprefix("void "))[0]
    return re.sub(r"[\d._]+$", "", plain)


def _table(title: str, profile: dict[str, float]) -> Table:
    rows = [{"operation": kind, "ms": number(value, 3)} for kind, value in profile.items()]
    return Table(f"C-Adam's step, by operation: {title}", rows)
