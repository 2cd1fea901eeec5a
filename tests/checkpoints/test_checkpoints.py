"""Training goes on from Orbax's checkpoints as if it had not stopped, on any number of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from checkpointed_training import OPTIMIZERS, STOP, problem, restore, save, train, training

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
DEVICES = 8
SHARDED = ("all periods", "back-matching", "multi_steps")


def assert_close(got, want):
    """To float32's precision, relative to each array's largest entry."""

    def check(got, want):
        scale = np.abs(want).max(initial=0)
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * scale)

    jax.tree.map(check, got, want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumed_within_all_periods_is_training_uninterrupted(name, tmp_path):
    params, batches = problem()
    tx, step = training(name)
    halfway = train(step, (params, tx.init(params)), batches[:STOP])
    want = train(step, halfway, batches[STOP:])

    save(tmp_path, STOP, halfway)
    at, restored = restore(tmp_path, tx)
    assert at == STOP
    assert jax.tree.structure(restored) == jax.tree.structure(halfway)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, halfway)
    chex.assert_trees_all_equal(train(step, restored, batches[at:]), want)

    # What was kept matters: with a new optimizer state training goes elsewhere.
    forgetful = train(step, (restored[0], tx.init(params)), batches[at:])
    assert not np.array_equal(forgetful[0]["w1"], want[0]["w1"])


def test_onto_eight_devices_and_back(tmp_path):
    """Another process with eight devices goes on for two steps, with sharded states; then we do."""
    params, batches = problem()
    middle, wanted = STOP + 2, {}
    for name in SHARDED:
        tx, step = training(name)
        halfway = train(step, (params, tx.init(params)), batches[:STOP])
        wanted[name] = halfway, tx, step
        save(tmp_path / name, STOP, halfway)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES}"
    done = subprocess.run(
        [sys.executable, SUPPORT / "eight_devices.py", tmp_path, str(middle), *SHARDED],
        env={**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sharded = json.loads(done.stdout.splitlines()[-1])

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name, (halfway, tx, step) in wanted.items():
        assert sharded[name] == {"devices": DEVICES, "w1": [1, 16], "step": STOP}
        at, back = restore(tmp_path / name, tx, lambda shape: one)
        assert at == middle
        assert {leaf.sharding for leaf in jax.tree.leaves(back)} == {one}
        want = train(step, halfway, batches[STOP:middle])
        assert_close(back, want)
        resumed, uninterrupted = (train(step, state, batches[middle:]) for state in (back, want))
        assert_close(resumed, uninterrupted)
