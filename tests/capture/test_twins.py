"""A layer that is evaluated again on the same input has one set of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from row_updates import OUT, PARAMS, D, X, Y, assert_close, exact, net, normal, ridge, updates

import cqjax


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_a_layer_that_is_evaluated_again_has_one_set_of_rows(solver):
    """A value, and its derivative along x, each by a call of its own: the errors of both add up."""
    x, y = X[:, 0], Y[:, 0]

    def twice(p, x, y):
        value = net(p, x)
        again, slope = jax.jvp(lambda x: net(p, x), (x,), (jnp.ones_like(x),))
        return jnp.mean(jnp.sum((value - y) ** 2 + 0.5 * (slope - again) ** 2, -1))

    def once(p, x, y):
        value, slope = jax.jvp(lambda x: net(p, x), (x,), (jnp.ones_like(x),))
        return jnp.mean(jnp.sum((value - y) ** 2 + 0.5 * (slope - value) ** 2, -1))

    for jit in (False, True):
        got = updates(twice, PARAMS, (x, y), jit, solver=solver)
        assert_close(got, exact(updates(once, PARAMS, (x, y), solver=solver)))
    plans = [cqjax.plan(loss_fn)(PARAMS, x, y) for loss_fn in (twice, once)]
    assert [[b.rows for b in plan.blocks] for plan in plans] == 2 * [2 * [2 * len(x)]]


def test_two_evaluations_of_different_rows_are_two():
    x, y = X[:, 0], Y[:, 0]

    def loss_fn(p, x, y):
        return jnp.mean(jnp.sum((net(p, x) - y) ** 2 + (net(p, 2 * x) - y) ** 2, -1))

    assert {block.rows for block in cqjax.plan(loss_fn)(PARAMS, x, y).blocks} == {2 * len(x)}


def test_a_layer_that_is_evaluated_again_by_numpy():
    x, y, w = X[:, 0], Y[:, 0], normal(D, OUT)

    def loss_fn(w, x, y):
        return jnp.mean(jnp.sum((x @ w - y) ** 2 + (jnp.sin(x @ w)) ** 2, -1))

    got = updates(loss_fn, w, (x, y))
    x, y, w = exact((x, y, w))
    z = x @ w
    signal = (2 * (z - y) + 2 * np.sin(z) * np.cos(z)) / len(x)
    np.testing.assert_allclose(got, ridge(x, signal, len(x)), rtol=2e-3, atol=2e-4)
