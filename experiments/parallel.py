"""Several processes that share the work of one experiment, each with its part of the cores."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

from experiments.checkpoints import ResumeError


def run(work: Callable[[Any, int], None], settings: Any, processes: int) -> None:
    """Let several processes work at the same time, and wait for all.

    Args:
      work: Takes the settings, and the number of the process.
      settings: What it works on.
      processes: The number of processes.

    Raises:
      ResumeError: If one of them failed. The others are stopped: they would wait for its runs.
    """
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not have
    several = [(work, settings, number, processes) for number in range(processes)]
    workers = [context.Process(target=_pinned, args=each) for each in several]
    try:
        for worker in workers:
            worker.start()
        waiting = {worker.sentinel: worker for worker in workers}
        while waiting:
            for sentinel in multiprocessing.connection.wait(list(waiting)):
                worker = waiting.pop(int(sentinel))  # pyright: ignore[reportArgumentType]
                worker.join()
                if worker.exitcode:
                    raise ResumeError(
                        f"one of {processes} processes ended with status {worker.exitcode}. What "
                        "is finished is kept: go on with --resume"
                    )
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def at_once(work: Callable[[Any, int], Any], settings: Any, processes: int) -> list[Any]:
    """What a function returns in each of several processes that work at the same time.

    Args:
      work: Takes the settings, and the number of the process.
      settings: What it works on.
      processes: The number of processes.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        futures = []
        for number in range(processes):
            pool = ProcessPoolExecutor(1, context, _begin, (number, processes))
            futures.append(stack.enter_context(pool).submit(work, settings, number))
        return [future.result() for future in futures]


def _end_with(parent: Any) -> None:
    """Ends this process when the one that started it has ended, however that was."""
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _pinned(work: Callable[[Any, int], None], settings: Any, number: int, processes: int) -> None:
    _begin(number, processes)
    work(settings, number)


def _begin(number: int, processes: int) -> None:
    """Leave this process its part of the cores, and let it end with the one that started it."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # JAX makes as many threads as there are cores that it may use, when it is first used.
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::processes] or cores)
