"""Plans and captures that are copied, or pickled: they are equal, and of as much use."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cqjax

X, IDS = jnp.arange(12.0).reshape(4, 3) / 12, jnp.array([0, 2, 2, 1])
PARAMS = {
    "bias": jnp.ones(2),
    "both": jnp.ones((3, 4)),
    "heads": jnp.ones((2, 3, 2)),
    "deep": jnp.ones((2, 2, 2)),
    "table": jnp.ones((3, 2)),
}


def loss_fn(params, x, ids):
    """Its weights are split, unstacked, transposed, joined, scanned over and looked up in."""
    left, right = jnp.split(params["both"], 2, 1)
    first, second = jnp.unstack(params["heads"])
    z = x @ left + params["bias"] + x @ right.T.T + x @ first + x @ second
    z = z + params["table"][ids]
    z, _ = jax.lax.scan(lambda z, w: (jnp.tanh(z @ w.T), None), z, params["deep"])
    return jnp.mean(z**2)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_plan(copied):
    plan = cqjax.plan(loss_fn)(PARAMS, X, IDS)
    assert copied(plan) == plan and hash(copied(plan)) == hash(plan)
    assert str(copied(plan)) == str(plan) and not plan.uncovered()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_captures(copied):
    tx = cqjax.scale_by_consequentialism()
    _, grads, captures = cqjax.value_and_grad(loss_fn)(PARAMS, X, IDS)
    other = copied(captures)
    assert jax.tree.structure(other) == jax.tree.structure(captures)
    want, _ = tx.update(grads, tx.init(PARAMS), captures=captures)
    got, _ = tx.update(grads, tx.init(PARAMS), captures=other)
    # The copy's gradients are other arrays: the solve starts from the updates, not from the rows.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
