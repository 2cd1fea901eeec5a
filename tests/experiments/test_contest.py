"""The contests' protocol, with training runs whose outcome is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_contests import EFFORT, NAN, PARTS, Runs, entrant, split, trained

from experiments.contest import Entrant, Parts, Task, held_out, hold, reached
from experiments.data import Dataset, Split
from experiments.models import MLP


def contest(final, augment=None):
    """Three baselines and one of ours, whose final losses are these at the seeds 8, 9 and 10."""
    entrants = [entrant("A"), entrant("B"), entrant("other", "other"), entrant("ours", "ours")]
    tuning = {("A", 0.1): 0.5, ("A", 0.2): 0.4, ("B", 0.1): 0.3, ("B", 0.2): NAN}
    tuning |= {(name, rate): NAN for name in ("other", "ours") for rate in (0.1, 0.2)}
    runs = Runs(tuning, {name: iter(histories) for name, histories in final.items()})
    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({"seed": seed}, {}), augment)
    return hold(runs, "title", task, entrants, EFFORT), runs.calls


FINAL = {
    "A": [trained(3, 2, 1.0), trained(3, 2, 0.8), trained(3, 2, 1.2)],
    "B": [trained(3, 2, 0.7), trained(3, 2, NAN), trained(3, 2, 2.0)],
    "other": [trained(3, 0.1, 0.1)] * 3,
    "ours": [trained(3, 1.0, 0.5), trained(3, 1.1, 0.5), trained(3, 2, 1.5)],
}


def test_every_entrant_is_tuned_alike_and_runs_alike():
    held, calls = contest(FINAL)
    tuning = [call for call in calls if call.at_end]
    assert [call.at for call in tuning] == [(name, r) for name in FINAL for r in (0.1, 0.2)]
    assert {call.start[0]["seed"] for call in tuning} == {7}
    assert {len(call.batches) for call in tuning} == {5}
    assert all(list(call.at_end) == ["validation_loss"] and not call.metrics for call in tuning)
    final = [call for call in calls if not call.at_end]
    assert calls == tuning + final
    chosen = {"A": 0.2, "B": 0.1, "other": 0.1, "ours": 0.1}
    assert {name: e["rate"] for name, e in held["entrants"].items()} == chosen
    for turn, seed in enumerate((8, 9, 10)):
        four = final[4 * turn : 4 * turn + 4]
        assert [call.at for call in four] == list(chosen.items())
        assert {call.start[0]["seed"] for call in four} == {seed}
    groups = [tuning, *(final[i : i + 4] for i in (0, 4, 8))]
    for group in groups:
        for call in group:
            np.testing.assert_array_equal(call.batches, group[0].batches)
            assert call.batches.max() < 12 and call.batches.shape[1] == 4
    assert len({group[0].batches.tobytes() for group in groups}) == 4
    for call in calls:
        np.testing.assert_array_equal(call.examples[1], PARTS.train.labels)
    assert len({call.label for call in calls}) == len(calls)
    seconds = {"A": 1.0, "B": 2.0, "other": 3.0, "ours": 4.0}
    costs = [seconds[call.at[0]] * len(call.batches) for call in calls]
    assert costs == EFFORT.costs([entrant(name) for name in seconds], seconds)


def test_the_target_is_the_best_baselines_median():
    held, _ = contest(FINAL)
    assert held["target"] == {"entrant": "A", "train_loss": 1.0}  # B's median is 2.0
    steps = {
        name: [run["to_target"] and run["to_target"]["step"] for run in e["runs"]]
        for name, e in held["entrants"].items()
    }
    assert steps == {
        "A": [20, 20, None],
        "B": [20, None, None],
        "other": [10, 10, 10],
        "ours": [10, 20, None],
    }
    assert held["entrants"]["ours"]["runs"][0]["to_target"] == {
        "step": 10,
        "seconds": 3.0,
        "seconds_with_compilation": 4.5,
        "test_accuracy": 0.5,
    }
    assert [run["seed"] for run in held["entrants"]["A"]["runs"]] == [8, 9, 10]
    assert held["images"] == {"train": 12, "validation": 2, "test": 3, "training_loss": 6}


def test_metrics_are_of_the_parts_that_they_say():
    _, calls = contest(FINAL)
    model = MLP(2, 1, 40)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2, 2)))["params"]

    def expected(images, labels):
        logits = np.asarray(model.apply({"params": params}, images), np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        return losses.mean(), (logits.argmax(axis=1) == labels).mean()

    metrics = calls[-1].metrics
    for name, part, index in (
        ("train_loss", Split(PARTS.train.images[:6], PARTS.train.labels[:6]), 0),
        ("validation_loss", PARTS.validation, 0),
        ("test_accuracy", PARTS.test, 1),
    ):
        assert metrics[name](params, {}) == pytest.approx(expected(*part)[index], rel=1e-5)
    validating = calls[0].at_end["validation_loss"]
    assert validating(params, {}) == metrics["validation_loss"](params, {})


def test_all_runs_are_augmented_alike():
    _, calls = contest(FINAL, augment="changes")
    assert all(call.augment == "changes" for call in calls)


def test_an_entrant_may_learn_something_else_and_the_best_variant_runs_last():
    def doubled(part):
        return Split(2 * part.images, part.labels)

    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({"seed": seed}, {}))
    other = Task(
        Parts(*map(doubled, PARTS)),
        MLP(3, 1, 40),
        lambda seed: ({"other": seed}, {}),
        "changes",
        {"watched": lambda params, state: 5.0},
    )
    entrants = [
        entrant("A"),
        entrant("ours", "ours")._replace(task=other),
        entrant("more", "variant")._replace(task=other),
        entrant("less", "variant")._replace(task=other),
    ]
    tuning = {(name, rate): rate for name in ("A", "ours", "less") for rate in (0.1, 0.2)}
    tuning |= {("more", 0.1): NAN, ("more", 0.2): 0.15}
    finals = {"A": "A", "ours": "ours", "less": "B"}
    runs = Runs(tuning, {name: iter(FINAL[final]) for name, final in finals.items()})
    held = hold(runs, "", task, entrants, EFFORT)
    assert [call.at[0] for call in runs.calls] == [
        *("A", "A", "ours", "ours", "more", "more", "less", "less"),
        *("A", "ours") * 3,
        *["less"] * 3,
    ]
    for call in runs.calls:
        mine = call.at[0] == "A"
        images = PARTS.train.images if mine else 2 * PARTS.train.images
        np.testing.assert_array_equal(call.examples[0], images)
        assert list(call.start[0]) == ["seed" if mine else "other"]
        assert (call.augment is None) == mine
        assert ("watched" in call.metrics) == (not mine and not call.at_end)
    assert list(held["entrants"]) == ["A", "ours"]
    assert list(held["variants"]) == ["more", "less"]
    more, less = held["variants"].values()
    assert more["rate"] == 0.2 and "runs" not in more and less["rate"] == 0.1
    assert [at["validation_loss"] for at in less["tuning"]] == [0.1, 0.2]
    assert [at["seed"] for at in less["runs"]] == [8, 9, 10]
    ends = [history.last("train_loss") for history in FINAL["B"]]
    assert [at["train_loss"] for at in less["runs"]] == ends
    seconds = {"A": 1.0, "ours": 2.0}
    costs = [seconds.get(call.at[0], 2.0) * len(call.batches) for call in runs.calls]
    assert costs == EFFORT.costs(entrants, seconds)
    params = other.model.init(jax.random.key(0), jnp.zeros((1, 2, 2)))["params"]
    measured = runs.calls[-1].metrics["train_loss"](params, {})
    logits = other.model.apply({"params": params}, 2 * PARTS.train.images[:6])
    expected = -jax.nn.log_softmax(logits)[np.arange(6), PARTS.train.labels[:6]].mean()
    assert measured == pytest.approx(float(expected), rel=1e-5)


def test_grids_go_on_beyond_their_edges_and_winners_are_told():
    """A's best rate is the third that is added, which is the last; B's is in the middle at once."""
    entrants = [
        entrant("A", rates=(0.01, 0.003, 0.03)),
        Entrant("B", lambda rate, its: (("B", rate), its), (0.3, 0.1, 1.0), "other", given=["A"]),
        Entrant("C", lambda rate: (("C", rate), None), (5.0,), "untuned"),
    ]
    tuning = {("A", rate): rate for rate in (0.03, 0.01, 0.003, 1e-3, 3e-4, 1e-4)}
    tuning |= {("B", 0.1): 3.0, ("B", 0.3): 1.0, ("B", 1.0): NAN}
    runs = Runs(tuning, {name: iter(FINAL["A"]) for name in "ABC"})
    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({}, {}))
    held = hold(runs, "", task, entrants, EFFORT._replace(extensions=3))["entrants"]
    tried = {name: [at["rate"] for at in its["tuning"]] for name, its in held.items()}
    assert tried == {"A": [0.01, 0.003, 0.03, 1e-3, 3e-4, 1e-4], "B": [0.3, 0.1, 1.0], "C": []}
    assert {name: its["rate"] for name, its in held.items()} == {"A": 1e-4, "B": 0.3, "C": 5.0}
    assert runs.more == 3 and {call.step for call in runs.calls if call.at[0] == "B"} == {1e-4}
    assert len(held["C"]["runs"]) == 3
    costs = EFFORT.costs(entrants, {"A": 1.0, "B": 1.0, "C": 2.0})
    assert len(costs) == 6 + 9 and sum(costs) == 6 * 5 + 3 * 20 * 4


def test_when_the_target_is_reached():
    assert reached(trained(3, NAN, 0.5), {"train_loss": 0.6})["step"] == 20
    assert reached(trained(3, 2, NAN), {"train_loss": 0.6}) is None


def test_unequal_grids_are_refused():
    with pytest.raises(ValueError, match=r"same number of tuning runs.*'A': 2, 'B': 3"):
        entrants = [entrant("A"), entrant("B", rates=(1, 2, 3))]
        hold(Runs({}, {}), "", Task(PARTS, None, None), entrants, EFFORT)


def test_the_last_tenth_is_held_out():
    dataset = Dataset("x", "y", split(41), split(5))
    parts = held_out(dataset)
    np.testing.assert_array_equal(parts.train.labels, np.arange(37))
    np.testing.assert_array_equal(parts.validation.labels, np.arange(37, 41))
    np.testing.assert_array_equal(parts.validation.images, dataset.train.images[37:])
    assert parts.test is dataset.test


@pytest.mark.parametrize("extended", [True, False])
def test_a_grid_may_stay_as_it_is(extended):
    """The best of 0.1 and 0.2 is at the edge; the next half decade beyond 0.2 is 1."""
    tuning = {("A", rate): 1 / rate for rate in (0.1, 0.2, 1.0)}
    runs = Runs(tuning, {"A": iter(FINAL["A"])})
    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({"seed": seed}, {}))
    hold(runs, "", task, [entrant("A")._replace(extended=extended)], EFFORT._replace(extensions=1))
    tried = [call.at[1] for call in runs.calls if call.at_end]
    assert tried == ([0.1, 0.2, 1.0] if extended else [0.1, 0.2])


@pytest.mark.parametrize(
    ("missing", "finished", "seeds", "begun"),
    [
        ([], ["A", "B", "C"], [8, 9, 10], []),
        ([("B", 0.1, 9)], ["A", "B", "C"], [8, 10], [("A", 0.1, 9), ("C", 0.1, 9)]),
        (
            [("A", 0.1, 8), ("C", 0.1, 10)],
            ["A", "B", "C"],
            [9],
            [("B", 0.1, 8), ("A", 0.1, 10), ("B", 0.1, 10), ("C", 0.1, 8)],
        ),
        (
            [("A", 0.1, 8), ("C", 0.1, 10), ("C", 0.1, 9)],
            ["A", "B"],
            [9, 10],
            [("B", 0.1, 8), ("C", 0.1, None), ("C", 0.2, None), ("C", 0.1, 8)],
        ),
        ([("C", 0.1, None)], ["A", "B"], [8, 9, 10], [("C", 0.2, None)]),
        (
            [("C", 0.1, 8), ("C", 0.1, 10), ("C", 0.1, 9)],
            ["A", "B"],
            [8, 9, 10],
            [("C", 0.1, None), ("C", 0.2, None)],
        ),
        (
            [("A", 0.1, 9), ("A", 0.1, 8), ("A", 0.1, 10)],
            ["C"],
            [8, 9, 10],
            [("A", 0.1, None), ("A", 0.2, None), ("B", 0.1, None), ("B", 0.2, None)]
            + [("B", 0.1, seed) for seed in (8, 9, 10)],
        ),
        (
            [("A", 0.1, None), ("C", 0.1, None)],
            [],
            [],
            [("A", 0.2, None), ("B", 0.1, None), ("B", 0.2, None)],
        ),
    ],
)
def test_of_a_contest_that_was_stopped_the_finished_groups_remain(missing, finished, seeds, begun):
    entrants = [entrant(n)._replace(group=group) for n, group in (("A", 1), ("C", 2), ("B", 1))]
    tuning = {(name, rate): rate for name in "ABC" for rate in (0.1, 0.2)}
    runs = Runs(tuning, {name: iter(FINAL["A"]) for name in "ABC"}, missing)
    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({"seed": seed}, {}))
    held = hold(runs, "", task, entrants, EFFORT)
    assert held["unfinished"] == [name for name in "ACB" if name not in finished]
    assert [(one["entrant"], one["rate"], one["seed"]) for one in held["begun"]] == begun
    if not finished:
        assert set(held) == {"unfinished", "begun"}
        return
    assert set(held["entrants"]) == set(finished) and held["effort"]["seeds"] == len(seeds)
    for its in held["entrants"].values():
        assert [at["seed"] for at in its["runs"]] == seeds
    first = [call.at[0] for call in runs.calls]
    assert first[:4] == ["A", "A", "B", "B"] and first[4:10] == ["A", "B"] * 3
    seconds = dict.fromkeys("ABC", 1.0) | {"C": 3.0}
    costs = [seconds[call.at[0]] * len(call.batches) for call in runs.calls]
    assert EFFORT.costs(entrants, seconds)[: len(costs)] == costs


def test_without_a_finished_baseline_there_is_no_target_and_all_runs_are_kept():
    entrants = [entrant("A"), entrant("ours", "ours")._replace(group="second")]
    tuning = {(name, rate): rate for name in ("A", "ours") for rate in (0.1, 0.2)}
    missing = [("A", 0.1, seed) for seed in (8, 9, 10)]
    runs = Runs(tuning, {name: iter(FINAL["A"]) for name in ("A", "ours")}, missing)
    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({"seed": seed}, {}))
    held = hold(runs, "", task, entrants, EFFORT)
    assert set(held) == {"unfinished", "begun"} and held["unfinished"] == ["A", "ours"]
    assert [(one["entrant"], one["rate"], one["seed"]) for one in held["begun"]] == [
        *(("A", 0.1, None), ("A", 0.2, None), ("ours", 0.1, None), ("ours", 0.2, None)),
        *(("ours", 0.1, seed) for seed in (8, 9, 10)),
    ]


def test_the_goal_may_be_another_metric():
    task = Task(PARTS, MLP(2, 1, 40), lambda seed: ({"seed": seed}, {}), goal="validation_loss")
    tuning = {("A", rate): rate for rate in (0.1, 0.2)}
    held = hold(Runs(tuning, {"A": iter(FINAL["A"])}), "", task, [entrant("A")], EFFORT)
    assert held["target"] == {"entrant": "A", "validation_loss": 1.0}
    assert all(run["to_target"]["step"] == 0 for run in held["entrants"]["A"]["runs"])
