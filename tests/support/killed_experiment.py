"""An experiment in a process of its own, to be killed."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import jax

from experiments.__main__ import main

# A server imports everything once; each process is a fork of it, in which JAX has yet to start.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def start(arguments: list[str], folder: Path) -> multiprocessing.Process:
    """Begin the experiment; what it prints is added to `log` in the folder."""
    process = PROCESSES.Process(target=_run, args=(arguments, folder), daemon=True)
    process.start()
    return process


def _run(arguments, folder):
    sys.stdout = sys.stderr = (folder / "log").open("a")
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(arguments)


def kill(process: multiprocessing.Process) -> None:
    """As the system does when memory is short: nothing can be tidied up."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def saved_steps(checkpoints: Path) -> int:
    """How many steps' results are safe, of all training runs together."""
    return sum(
        max((int(path.name) for path in run.iterdir() if path.name.isdigit()), default=0)
        for run in checkpoints.glob("*/")
    )


def partial_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list(checkpoints.glob("*/*.orbax-checkpoint-tmp*"))


def wait_for(condition, process: multiprocessing.Process) -> None:
    """Until the process has come so far."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive(), f"it ended by itself, with exit code {process.exitcode}"
        assert time.monotonic() < deadline, "it makes no progress"
        time.sleep(0.001)


def kill_while_saving(process: multiprocessing.Process, checkpoints: Path) -> None:
    """Kill it when a checkpoint is half written."""
    while True:
        wait_for(lambda: partial_checkpoints(checkpoints), process)
        os.kill(process.pid, signal.SIGSTOP)
        if partial_checkpoints(checkpoints):
            return kill(process)
        os.kill(process.pid, signal.SIGCONT)
