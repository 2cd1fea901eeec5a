"""Which learning rate an optimizer takes, and what happens where its runs diverge."""

import numpy as np
import pytest
from known_contests import EFFORT, NAN, PARTS, Runs, entrant, trained, tuned

from experiments import report, stored
from experiments.checkpoints import ResumeError
from experiments.contest import Task, hold
from experiments.models import MLP
from experiments.tuning import beyond, winner


def test_half_a_decade_beyond_an_edge():
    assert beyond([(0.003, tuned(2.0)), (0.01, tuned(1.0))]) == [0.03]
    assert beyond([(0.03, tuned(NAN)), (0.3, tuned(NAN))]) == [0.01]
    assert beyond([(0.1, tuned(1.0)), (1.0, tuned(0.5))]) == [3.0]
    assert beyond([(1.0, tuned(3.0)), (0.3, tuned(0.5)), (0.1, tuned(0.6))]) == []
    assert beyond([(1.0, tuned(3.0))]) == []  # of one rate there is no edge


def test_who_diverges_loses():
    assert winner([(0.1, tuned(NAN)), (0.2, tuned(5.0)), (0.3, tuned(4.0))]) == 0.3
    assert winner([(0.1, tuned(NAN)), (0.2, tuned(NAN))]) == 0.1


def repeated(missing=()):
    """A's best rate diverges at the seed 9, its next best at 10; B's only lower rate does, too."""
    entrants = [entrant("A", rates=(0.1, 0.2, 0.3)), entrant("B", "ours", rates=(0.1, 0.2, 0.3))]
    tuning = {("A", 0.1): 3.0, ("A", 0.2): 2.0, ("A", 0.3): 1.0}
    tuning |= {("B", 0.1): 3.0, ("B", 0.2): 1.0, ("B", 0.3): 2.0}
    well, badly, nowhere = trained(3, 2, 1.0), trained(3, 1, 4.0), trained(3, 1, NAN)
    final = {"A": [well, nowhere, well, well, well, badly, well, well, well]}
    final["B"] = [badly, badly, badly, nowhere, well, well]
    runs = Runs(tuning, {name: iter(its) for name, its in final.items()}, missing)
    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({"seed": seed}, {}))
    return hold(runs, "", task, entrants, EFFORT), runs


def test_what_diverges_runs_again_at_the_best_of_the_lower_rates():
    held, runs = repeated()
    a, b = held["entrants"].values()
    final = [(*call.at, call.start[0]["seed"]) for call in runs.calls if not call.at_end]
    rates = {"A": [0.3, 0.2, 0.1], "B": [0.2, 0.1]}
    made = [
        (n, its[i], s) for i in range(3) for s in (8, 9, 10) for n, its in rates.items() if its[i:]
    ]
    assert final == made
    assert a["rate"] == 0.1 and [run["train_loss"] for run in a["runs"]] == [1.0] * 3
    assert [(at["rate"], at["runs"][1]["seed"]) for at in a["diverged"]] == [(0.3, 9), (0.2, 9)]
    assert b["rate"] == 0.1 and np.isnan(b["runs"][0]["train_loss"])  # no rate is lower
    assert [(at["rate"], len(at["runs"])) for at in b["diverged"]] == [(0.2, 3)]
    assert runs.more == 9 and held["unfinished"] == []


def test_a_repetition_that_is_missing_is_said_and_the_page_shows_what_diverged():
    held, _ = repeated([("A", 0.2, seed) for seed in (8, 9, 10)])
    a = held["entrants"]["A"]
    assert a["rate"] == 0.3 and a["diverged"] == [] and len(a["runs"]) == 3
    assert held["unfinished"] == ["A at 0.2"]


def test_runs_that_diverged_are_found_in_the_page(tmp_path):
    held, _ = repeated()
    settings = {"seed": 0}
    content = {"settings": settings, "environment": report.environment()}
    content["results"] = {"dataset": {"digest": "d"}, "contests": {"title": held}}
    times = {"title": {"seconds_per_step": {"A": 2.0, "B": 3.0, "timed": 1.0}}}
    content["results"]["contests"]["title"] |= times["title"]
    report.write_json(tmp_path / "results.json", content)
    runs = stored.runs(tmp_path, "d", settings, {"title": "first: "}, times)
    assert {f"first: A {r}, seed {s}" for r in (0.1, 0.2, 0.3) for s in (8, 9, 10)} <= set(runs)
    assert runs["first: A 0.2, seed 10"].metrics["train_loss"].value == [3, 1, 4]
    assert np.isnan(runs["first: A 0.3, seed 9"].last("train_loss"))


@pytest.mark.parametrize(("here", "words"), [(0.7, None), (0.5, "2 times"), (1.6, "0.62 times")])
def test_runs_of_a_faster_or_slower_machine_are_refused(tmp_path, here, words):
    """Of three entrants' steps the second counts; one that is new does not."""
    there = {"seconds_per_step": {"A": 9.0, "B": 1.0, "C": 0.1}}
    times = {"title": {"seconds_per_step": {"A": 1.0, "B": here, "C": 9.0, "new": 1.0}}}
    content = {"settings": {}, "environment": report.environment()}
    contest = {**there, "entrants": {}, "variants": {}}
    content["results"] = {"dataset": {"digest": "d"}, "contests": {"title": contest}}
    report.write_json(tmp_path / "results.json", content)
    if words is None:
        assert stored.runs(tmp_path, "d", {}, {"title": ""}, times) == {}
        return
    with pytest.raises(ResumeError, match=f"a step takes {words} as long.*times.json and try"):
        stored.runs(tmp_path, "d", {}, {"title": ""}, times)


def test_settings_from_before_there_were_extensions_are_those_without():
    before, after = ({"seed": 1}, {"seed": 1, "extensions": 0})
    assert stored.identity(before, "d", {}) == stored.identity(after, "d", {})
    assert stored.identity(before, "d", {}) != stored.identity(
        {"seed": 1, "extensions": 1}, "d", {}
    )
