"""The batches, the curves and the JSON that experiments are made of."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.history import Curve
from experiments.report import write_json
from experiments.training import State, shuffled_batches, train


def test_an_epoch_is_a_permutation_in_batches_and_the_next_another():
    batches = shuffled_batches(seed=3, examples=22, batch_size=5, steps=10)
    assert batches.shape == (10, 5) and batches.dtype == np.int32
    epochs = [batches[:4].ravel(), batches[4:8].ravel()]
    for epoch in epochs:
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(22))
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(batches[:3], shuffled_batches(3, 22, 5, 3))
    assert (batches != shuffled_batches(4, 22, 5, 10)).any()


def test_first_at_most():
    curve = Curve([0, 5, 10, 15], [0.0, 0.1, 0.2, 0.3], [2.0, 0.5, 0.7, 0.4])
    assert curve.first_at_most(0.5) == (5, 0.1)
    assert curve.first_at_most(0.45) == (15, 0.3)
    assert curve.first_at_most(0.3) is None
    assert curve.first_at_most(float("nan")) is None


def test_json_is_standard(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), {"b": (1.5, Path("c"), True, None)}]})
    content = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert content == {"a": [None, {"b": [1.5, "c", True, None]}]}


def test_arrays_of_numbers_are_lines_of_json(tmp_path):
    content = {
        "a": [1, -2.5e-7, None],
        "b": [[1, 2], [3, True]],
        "c": ["[ 1,  2 ]\n[\n3]"],
        "d": [],
    }
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert '"a": [1, -2.5e-07, null],\n' in text and "    [1, 2],\n    [3, true]\n" in text


@pytest.mark.parametrize("looped", [False, True])
def test_chunks_of_steps_are_numpys(looped):
    """160 steps in 75 chunks, of three or two; a step augmented by its number."""
    values = np.random.default_rng(0).uniform(size=20).astype(np.float32)
    batches, seen = shuffled_batches(1, 20, 4, 160), []

    def step(state, images, labels):
        return State(0.9 * state.params + images.mean(), {}, ()), images.sum()

    end, history = train(
        step,
        State(jnp.float32(0), {}, ()),
        (jnp.asarray(values), jnp.zeros(20)),
        batches,
        {"value": lambda params, model_state: float(params)},
        lambda state, history: seen.append(history.steps),
        augment=lambda number, images: images + number,
        looped=looped,
    )
    params, losses = [0.0], []
    for number, batch in enumerate(batches):
        images = np.float64(values[batch]) + number
        params.append(0.9 * params[-1] + images.mean())
        losses.append(images.sum())
    chunks = np.array_split(losses, 75)
    ends = np.cumsum([len(chunk) for chunk in chunks])
    assert seen == [0, *ends] and len(set(map(len, chunks))) == 2
    np.testing.assert_allclose(end.params, params[-1], rtol=1e-5)
    means = [chunk.mean() for chunk in chunks]
    np.testing.assert_allclose(history.batch_loss.value, means, rtol=1e-5)
    curve = history.metrics["value"]
    assert curve.step == [0, *ends[4::5]]
    np.testing.assert_allclose(curve.value, np.array(params)[curve.step], rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "then", "taken"),
    [(2.0, 1.9e6, 15), (2.0, 2.1e6, 7), (2.0, -2.1e6, 7), (2.0, np.nan, 7), (np.nan, 1.0, 1)]
    + [(1e-9, 0.9e6, 15), (1e-9, 1.1e6, 7), (-2.0, -1.9e6, 15)],
)
def test_no_steps_are_taken_where_nothing_can_be_learnt_any_more(first, then, taken):
    """The seventh step of 15, each a chunk, has another loss."""

    def step(state, images, labels):
        return State(state.params + 1, {}, ()), jnp.where(state.params < 6, first, then)

    metrics = {"count": lambda params, model_state: int(params)}
    given = (jnp.zeros(9), jnp.zeros(9)), shuffled_batches(0, 9, 3, 15), metrics
    end, history = train(step, State(jnp.int32(0), {}, ()), *given, lambda *_: None, at_end=metrics)
    assert end.params == taken and history.steps == 15
    rest = [step if step <= taken else np.nan for step in (0, 5, 10, 15, 15)]
    np.testing.assert_array_equal(history.metrics["count"].value, rest)
    lost = np.isnan(history.batch_loss.value)
    np.testing.assert_array_equal(
        lost, [np.isnan(first) or n >= 6 and np.isnan(then) or n >= taken for n in range(15)]
    )
