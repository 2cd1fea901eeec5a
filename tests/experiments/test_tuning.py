"""Which learning rate an optimizer takes, and what happens where its runs diverge."""

from dataclasses import asdict

import numpy as np
import pytest
from known_contests import EFFORT, NAN, PARTS, Runs, entrant, trained, tuned

from experiments import report, stored
from experiments.contest import Task, hold
from experiments.history import Curve, History
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
    times = {"title": {"seconds_per_step": {"A": 0.3, "B": 0.3, "timed": 1.0}}}  # as in the runs
    report.write_json(tmp_path / "results.json", content)
    runs, converted = stored.runs(tmp_path, "d", settings, {"title": "first: "}, times)
    assert converted == {"title": {}}
    assert {f"first: A {r}, seed {s}" for r in (0.1, 0.2, 0.3) for s in (8, 9, 10)} <= set(runs)
    assert runs["first: A 0.2, seed 10"].metrics["train_loss"].value == [3, 1, 4]
    assert np.isnan(runs["first: A 0.3, seed 9"].last("train_loss"))


@pytest.mark.parametrize("before", [{}, {"A 0.3, seed 8": 2.0}])
def test_seconds_of_a_machine_of_another_speed_are_converted(tmp_path, before):
    """A's 20 steps took 6 seconds, as did B's; tuned were 5 in 2. The changed A is not timed."""

    def ran(*rates):
        tuning = [{"rate": r, "seconds": 2.0, "compile_seconds": 1.0} for r in rates]
        run = {"seed": 8, "history": asdict(trained(3, 2, 1.0))}
        made = {"rate": rates[0], "runs": [run]} if rates[0] < 1 else {}
        return {"tuning": [one | {"validation_loss": 1.0} for one in tuning], **made}

    entrants = {"A": ran(0.3, 0.1), "B": ran(0.5, 0.2)}
    held = {"entrants": entrants, "variants": {"A, changed": ran(2.0)}, "converted": before}
    held["effort"] = {"tuning_steps": 5}
    content = {"settings": {}, "environment": report.environment()}
    content["results"] = {"dataset": {"digest": "d"}, "contests": {"title": held}}
    report.write_json(tmp_path / "results.json", content)

    def found(a, b):
        times = {"title": {"seconds_per_step": {"A": a, "B": b, "new": 9.0}}}
        return stored.runs(tmp_path, "d", {}, {"title": ""}, times)

    # Of A's three runs two took .4 s a step, and one .3. So did B's.
    runs, converted = found(0.8, 1.2)
    assert runs["A 0.3, seed 8"].train_seconds == 12 and runs["B 0.5, seed 8"].train_seconds == 18
    assert runs["A 0.3, seed 8"].compile_seconds == 3
    assert runs["A 0.3, seed 8"].metrics["train_loss"].seconds == [0, 6, 12]
    assert runs["A 0.3, seed 8"].metrics["train_loss"].value == [3, 2, 1]
    assert runs["A 0.3, seed 8"].batch_loss.seconds == [12]
    assert runs["A 0.1, tuning"].metrics["validation_loss"].seconds == [4]
    assert converted["title"]["A 0.3, seed 8"] == 2 * before.get("A 0.3, seed 8", 1)
    assert converted["title"]["B 0.2, tuning"] == 3
    assert converted["title"]["A, changed 2, tuning"] in (2, 3)
    runs, converted = found(0.42, 0.35)  # as fast as it was
    assert runs["A 0.3, seed 8"].train_seconds == 6 and converted == {"title": before}


def test_a_lost_run_tells_a_steps_time_by_the_steps_that_it_took(tmp_path):
    """10 of 20 steps took 4 seconds; the other 10 were not taken."""
    values = {"train_loss": Curve([0, 10, 20], [0.0, 4.0, 4.0], [3.0, 4e9, NAN])}
    lost = History(1.0, 4.0, Curve([10, 20], [4.0, 4.0], [4e9, NAN]), values)
    entrant = {"tuning": [], "rate": 0.3, "runs": [{"seed": 8, "history": asdict(lost)}]}
    held = {"entrants": {"A": entrant}, "variants": {}, "effort": {"tuning_steps": 5}}
    content = {"settings": {}, "environment": report.environment()}
    content["results"] = {"dataset": {"digest": "d"}, "contests": {"title": held}}
    report.write_json(tmp_path / "results.json", content)
    times = {"title": {"seconds_per_step": {"A": 0.4}}}
    assert stored.runs(tmp_path, "d", {}, {"title": ""}, times)[1] == {"title": {}}
    times["title"]["seconds_per_step"]["A"] = 0.8
    assert stored.runs(tmp_path, "d", {}, {"title": ""}, times)[1] == {
        "title": {"A 0.3, seed 8": 2.0}
    }


def test_settings_from_before_there_were_extensions_are_those_without():
    before, after = ({"seed": 1}, {"seed": 1, "extensions": 0})
    assert stored.identity(before, "d", {}) == stored.identity(after, "d", {})
    assert stored.identity(before, "d", {}) != stored.identity(
        {"seed": 1, "extensions": 1}, "d", {}
    )
