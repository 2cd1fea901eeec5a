"""Several processes share the runs of an experiment: the numbers are those of one."""

import functools
import json
import os
import time

import numpy as np
import pytest
from rich.console import Console

from experiments import checkpoints, parallel
from experiments.__main__ import main
from experiments.checkpoints import ResumeError
from experiments.runs import Runs

COMMAND = ["lenet", "--preset=smoke", "--epochs=0.2", "--tuning-epochs=0.05", "--tries=1"]


def test_two_processes_make_the_runs_of_one(tmp_path):
    results = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        main([*COMMAND, f"--processes={processes}", f"--output={output}"])
        contests = json.loads((output / "results.json").read_text())["results"]["contests"]
        cores = {contest["cores"] for contest in contests.values()}
        assert cores == {-(-len(os.sched_getaffinity(0)) // processes)}
        table = f"## Time per step on {cores.pop()} core"
        assert table in (output / "README.md").read_text()
        results.append(
            [
                (title, name, each["rate"], each["tuning"][0]["rate"], run["seed"], loss)
                for title, contest in contests.items()
                for name, each in contest["entrants"].items()
                for run in each["runs"]
                for loss in run["history"]["batch_loss"]["value"]
            ]
        )
    assert len(results[0]) > 4
    one, two = (np.array([line[-1] for line in lines]) for lines in results)
    assert [line[:-1] for line in results[0]] == [line[:-1] for line in results[1]]
    np.testing.assert_allclose(two, one, rtol=1e-3)
    metrics = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("1", "2")]
    assert len(metrics[0]) == len(metrics[1]) > 0


class Session:
    """The runs 1 and 3 are another's."""

    shared = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def claims(self, number):
        return number not in (1, 3)


def test_each_makes_what_nobody_else_has_begun_the_longest_first():
    """So they work at the same time, and not in turns; then they wait."""
    made = []
    with Runs(Console(quiet=True), Session(), [1.0, 3.0, 2.0, 5.0, 4.0]) as runs:

        def run(i):
            made.append((i, runs._number))
            return f"history {i}"

        first = runs.several([functools.partial(run, i) for i in range(3)])
        assert made == [(2, 2), (0, 0), (1, 1)] and first == [f"history {i}" for i in range(3)]
        runs.several([functools.partial(run, i) for i in range(2)])
        assert made[3:] == [(1, 4), (0, 3)]


def test_a_run_is_made_by_the_first_that_claims_it(tmp_path):
    def session(**how):
        options = {"resume": True, "seconds": 1.0, "tensorboard": False}
        return checkpoints.Session(tmp_path, {}, **options, **how)

    with session():
        pass
    one, other = session(shared=True), session(shared=True)
    assert one.claims(0) and not other.claims(0) and one.claims(0)
    assert other.claims(1) and not one.claims(1)
    with session() as alone:  # those that claimed were stopped
        assert alone.claims(0)
    assert session(shared=True).claims(1)


def second_fails(settings, number):
    (settings / f"{number}").write_text(f"{len(os.sched_getaffinity(0))}")
    if number:
        raise ValueError("no")
    while True:  # waits for the other's runs
        pass


def test_when_one_fails_all_end(tmp_path):
    with pytest.raises(ResumeError, match=r"one of 2 processes ended with status 1.*--resume"):
        parallel.run(second_fails, tmp_path, 2)
    every = len(os.sched_getaffinity(0))
    assert (tmp_path / "1").read_text() == f"{max(1, every // 2)}"


def cores_of(settings, number):
    if settings is None:
        raise ResumeError("the page cannot be read")
    (settings / f"{number}").touch()
    while len(list(settings.iterdir())) < 3:  # until all of them work
        time.sleep(0.01)
    return number, sorted(os.sched_getaffinity(0))


def test_several_processes_at_once_have_their_part_of_the_cores(tmp_path):
    every = os.sched_getaffinity(0)
    found = parallel.at_once(cores_of, tmp_path, 3)
    assert [number for number, _ in found] == [0, 1, 2]
    parts = [sorted(every)[number::3] or sorted(every) for number in range(3)]
    assert [cores for _, cores in found] == parts and os.sched_getaffinity(0) == every
    with pytest.raises(ResumeError, match="cannot be read"):
        parallel.at_once(cores_of, None, 2)
