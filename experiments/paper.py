"""The source papers' settings, in the order of what they settle, for as long as there is time."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from experiments import options, report

Name = Literal["vgg", "resnet20", "lenet", "mlp"]

GRACE = 120.0
"""Seconds that an experiment has for its last checkpoint once it is interrupted."""


@dataclass(frozen=True)
class Paper:
    """Run the experiments at their paper presets, one after another, within a time: for a GPU.

    VGG and ResNet-20 come first: the sources' claims about them are those that two CPU cores cannot
    answer. When the time is over, the experiment at work is interrupted, and the table says what is
    left. The same command goes on from there. Each experiment has its results in a folder of its
    name.
    """

    budget_minutes: float = 25.0
    """Begin nothing after so many minutes, and interrupt what is at work then."""
    experiments: tuple[Name, ...] = ("vgg", "resnet20", "lenet", "mlp")
    """What to run, in this order."""
    preset: options.Preset = "paper"
    """smoke for tests, paper for a GPU."""
    data_dir: Path | None = None
    """Folder of the data set's official files."""
    download: bool = False
    """Fetch the data set if it is not found, into --data-dir or the cache."""
    output: Path = Path("results/paper")
    """Folder for the results."""

    def __post_init__(self):
        """Refuse values that cannot be meant.

        Raises:
          ValueError: If there is one; the message names the option.
        """
        options.require(self, options.POSITIVE, "budget_minutes")
        options.require_distinct(self, "experiments")

    def run(self) -> None:
        """Run them, and print what became of each.

        Raises:
          SystemExit: With status 1, if one failed.
        """
        until = time.monotonic() + 60 * self.budget_minutes
        states = {name: self._run(name, until) for name in self.experiments}
        rows = [{"experiment": name, "state": state} for name, state in states.items()]
        report.print_table(Console(), "the papers' settings", rows)
        if any(state.startswith("failed") for state in states.values()):
            raise SystemExit(1)

    def _run(self, name: Name, until: float) -> str:
        """Run one experiment, and say what became of it."""
        left = until - time.monotonic()
        if left <= 0:
            return "no time was left"
        command = [sys.executable, "-m", "experiments", name, f"--preset={self.preset}", "--resume"]
        command += [f"--output={self.output / name}"]
        command += [f"--data-dir={self.data_dir}"] * (self.data_dir is not None)
        command += ["--download"] * self.download
        process = subprocess.Popen(command)
        try:
            status = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "interrupted: the same command goes on"
        return f"failed with status {status}" if status else "finished"
