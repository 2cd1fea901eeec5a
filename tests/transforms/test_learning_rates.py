"""`scale_by_learning_rates`: one rate for what was captured, one for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import stepper
from two_layers import loss_fn, problem

import cqjax


def run(tx, steps=3):
    """[(gradients, updates) of each step], state."""
    params, batches = problem((6,) * steps)
    params, batches = jax.tree.map(lambda a: a.astype(jnp.float32), (params, batches))
    step, state, results = stepper(loss_fn, tx), tx.init(params), []
    for batch in batches:
        grads, updates, state = step(params, state, *batch)
        results.append((grads, updates))
    return results, state


def assert_scaled(updates, grads, layers, gain):
    """Weights and biases are times minus `layers`, what is neither times minus `gain`."""
    for path, update in updates.items():
        rate = gain if path == "gain" else layers
        for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(grads[path]), strict=True):
            np.testing.assert_allclose(a, -rate * b, rtol=1e-6)


@pytest.mark.parametrize(
    ("covered", "uncovered"),
    [
        (0.5, 0.125),
        (lambda n: 0.5 / (1 + n), 0.125),
        (0.5, optax.linear_schedule(1.0, 0.0, 4)),
        (jnp.float32(0.5), optax.constant_schedule(0.0)),
    ],
)
def test_numbers_and_schedules(covered, uncovered):
    results, state = run(cqjax.scale_by_learning_rates(covered, uncovered))
    assert state.count == 3
    for t, (grads, updates) in enumerate(results):
        rates = [rate(t) if callable(rate) else rate for rate in (covered, uncovered)]
        assert_scaled(updates, grads, *rates)


def test_masked():
    """What is masked stays; a bias without its weight is still a captured layer's."""
    mask = {"a": {"w": True, "b": False}, "c": False, "gain": True}
    for grads, updates in run(optax.masked(cqjax.scale_by_learning_rates(0.5, 0.25), mask), 1)[0]:
        np.testing.assert_allclose(updates["a"]["w"], -0.5 * grads["a"]["w"], rtol=1e-6)
        np.testing.assert_allclose(updates["gain"], -0.25 * grads["gain"], rtol=1e-6)
        np.testing.assert_array_equal(updates["a"]["b"], grads["a"]["b"])
        np.testing.assert_array_equal(updates["c"]["w"], grads["c"]["w"])


def test_partition():
    labels = {"a": 0, "c": 1, "gain": 0}
    tx = optax.partition({0: cqjax.scale_by_learning_rates(0.5, 0.25), 1: optax.scale(3.0)}, labels)
    for grads, updates in run(tx, 1)[0]:
        assert_scaled({"a": updates["a"], "gain": updates["gain"]}, grads, 0.5, 0.25)
        np.testing.assert_allclose(updates["c"]["w"], 3 * grads["c"]["w"], rtol=1e-6)
