"""Weights that a loss uses both ways are solved for as dense least squares says."""

import jax
import numpy as np
import pytest
from both_sides import MODELS, Recorder, mean_eigenvalue, updates

import cqjax


def made(model, loss=None, **options):
    """The updates that cqjax makes of a model's gradient."""
    tx = cqjax.scale_by_consequentialism(**options)

    @jax.jit
    def step(params, *args):
        _, grads, captures = cqjax.value_and_grad(loss or model.loss)(params, *args)
        new, state = tx.update(grads, tx.init(params), params, captures=captures)
        return new, state

    new, state = step(jax.tree.map(jax.numpy.asarray, model.params), *model.args)
    assert not state.fallbacks.sum()
    return new


@pytest.fixture(params=MODELS)
def model(request, float64):
    return MODELS[request.param](np.random.default_rng(0))


def test_every_parameter_is_covered(model):
    plan = cqjax.plan(model.loss)(model.params, *model.args)
    assert not plan.uncovered()
    assert plan.batch_size == model.terms
    assert "both sides" in str(plan)


def test_by_hand_is_the_loss(model):
    expected = model.loss(model.params, *model.args)
    np.testing.assert_allclose(model.by_hand(Recorder(model.params), *model.args), expected)


@pytest.mark.parametrize("damping", [1e-3, 2.0])
def test_updates_are_those_of_dense_least_squares(model, damping):
    new = made(model, damping=damping, relative_damping=0.0)
    expected = updates(model, lambda normal: damping)
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(new[name], expected[name], rtol=0, atol=1e-10 * scale)


def test_relative_damping_is_in_units_of_the_mean_eigenvalue(model):
    new = made(model, relative_damping=0.5)
    expected = updates(model, lambda normal: 0.5 * mean_eigenvalue(normal))
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(new[name], expected[name], rtol=0, atol=1e-10 * scale)
