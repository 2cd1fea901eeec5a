"""Experiments that are killed go on from their last checkpoint, and end as if nothing happened."""

import json
import os
import random
import sys
import time

from killed_experiment import (
    kill,
    kill_while_saving,
    partial_checkpoints,
    saved_steps,
    start,
    wait_for,
)

OPTIMIZERS, STEPS, KILLS = ("adam", "csgd"), 30, 20
SMALL = (
    "quickstart --dataset=digits --width=8 --depth=1 --batch-size=8 --adam-learning-rate=0.01 "
    f"--optimizers {' '.join(OPTIMIZERS)} --steps={STEPS} --checkpoint-seconds"
).split()


def without_seconds(value):
    """The same without anything that was timed, and without the options that say how to run."""
    match value:
        case dict():
            return {
                key: without_seconds(item)
                for key, item in value.items()
                if "seconds" not in key and key not in ("output", "resume", "environment")
            }
        case list():
            return [without_seconds(item) for item in value]
    return value


def results(output):
    """What is in results.json and in metrics.jsonl."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads((output / "results.json").read_text()), list(map(json.loads, lines))]


def test_killed_at_random_steps_it_ends_with_the_same_result(tmp_path, monkeypatch):
    """Twenty times, every third of them in the middle of writing a checkpoint."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start([*SMALL, "1000", f"--output={whole}"], tmp_path)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()

    rng, checkpoints = random.Random(0), killed / "checkpoints"
    stops = sorted(rng.sample(range(1, len(OPTIMIZERS) * STEPS - 5), KILLS))
    for number, stop in enumerate(stops):
        process = start([*SMALL, "0", f"--output={killed}", "--resume"], tmp_path)
        wait_for(lambda stop=stop: saved_steps(checkpoints) >= stop, process)
        if number % 3 == 0:
            kill_while_saving(process, checkpoints)
            assert partial_checkpoints(checkpoints)
        else:
            time.sleep(rng.uniform(0, 0.02))
            kill(process)
        assert not (killed / "results.json").exists()
        assert saved_steps(checkpoints) >= stop
    process = start([*SMALL, "0", f"--output={killed}", "--resume"], tmp_path)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()

    expected, got = results(whole), results(killed)
    assert without_seconds(got) == without_seconds(expected)
    assert [(line["run"], line["step"]) for line in got[1]] == [
        (label, step) for label in ("Adam", "C-SGD") for step in range(0, STEPS + 1, 5)
    ]
    assert (tmp_path / "log").read_text().count("resumed after") > KILLS / 2
    for run in checkpoints.glob("*/"):
        assert [path.name for path in run.iterdir()] == [str(STEPS)]
