"""The batches, the curves and the JSON that experiments are made of."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.report import write_json
from experiments.training import Curve, shuffled_batches


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
