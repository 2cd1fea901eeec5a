"""The example script, on eight simulated devices and in two processes that train together."""

import functools
import importlib.util
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "multi_device.py"
WAYS = ["one device", "data parallel, jit", "FSDP, jit", "shard_map, inversions shared out"]


def run_together(*commands, seconds=300):
    """What the commands print, run side by side; all are ended when one fails or lasts too long."""
    env = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = [subprocess.Popen([sys.executable, *map(str, c)], **pipes) for c in commands]
    try:
        printed = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(running, printed, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in printed]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(text):
    """The script's heading, and for each way the difference from one device and the loss."""
    heading, *lines = [line for line in text.splitlines() if "devices (" in line or line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return heading, {way: (apart, loss, collectives) for way, apart, loss, collectives in cells}


@functools.cache
def losses_of_one_device(steps=5):
    """The example's loss after each step, here."""
    spec = importlib.util.spec_from_file_location("multi_device", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    params, tx = example.init(jax.random.key(0)), example.optimizer()
    state = tx.init(params)
    step = jax.jit(functools.partial(example.train_step, example.loss_fn, tx))
    losses = []
    for number in range(steps):
        params, state, loss = step(params, state, *example.batch(number))
        losses.append(float(loss))
    return losses


def check(text, heading, steps):
    got, rows = table(text)
    assert got == heading
    assert list(rows) == WAYS
    alone = losses_of_one_device()[steps - 1]
    assert float(rows.pop(WAYS[0])[1]) == pytest.approx(alone, rel=1e-4)
    for apart, loss, collectives in rows.values():
        assert 0 < float(apart) < 1e-3
        assert float(loss) == pytest.approx(alone, rel=1e-4)
        assert re.search(r"\d all-reduce", collectives)


def test_example_on_one_host():
    (text,) = run_together([SCRIPT])
    check(text, "8 devices (cpu), 1 processes", 5)


def test_two_processes():
    """Data-parallel, fully sharded and mapped training over loopback, by two processes."""
    address = f"127.0.0.1:{free_port()}"
    command = [SCRIPT, "--coordinator", address, "--processes", 2, "--cpu-devices", 2, "--steps", 3]
    first, second = run_together(*([*command, "--process-id", i] for i in range(2)))
    check(first, "4 devices (cpu), 2 processes", 3)
    assert "devices (" not in second
