"""Losses that print or call back: each effect happens once per evaluation, as under JAX alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn import dtypes
from jax.experimental import io_callback

import cqjax

PARAMS = {"w": jnp.array([[1.0], [2.0]]), "b": jnp.array([0.5])}
X = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
Z = np.array([1.0, 2.0, 5.0])  # X w
SAID = []


@pytest.fixture(autouse=True)
def silence():
    SAID.clear()


def say(value):
    SAID.append(np.asarray(value).ravel().tolist())


def said(call, *args):
    """What is said when a function runs."""
    SAID.clear()
    jax.block_until_ready(call(*args))
    jax.effects_barrier()
    return SAID


def of_the_loss(params, x):
    loss = jnp.mean((x @ params["w"] + params["b"]) ** 2)
    jax.debug.callback(say, loss)
    return loss


def of_an_activation(params, x):
    z = x @ params["w"]
    jax.debug.callback(say, z)
    return jnp.mean((z + params["b"]) ** 2)


def io(params, x):
    z = x @ params["w"]
    io_callback(say, None, jax.lax.stop_gradient(z), ordered=True)
    return jnp.mean((z + params["b"]) ** 2)


def in_order(params, x):
    z = x @ params["w"]
    jax.debug.callback(say, z[0], ordered=True)
    jax.debug.callback(say, z[2], ordered=True)
    return jnp.mean((z + params["b"]) ** 2)


def scanned(params, x):
    def body(total, row):
        z = row @ params["w"]
        jax.debug.callback(say, z, ordered=True)
        return total + jnp.sum((z + params["b"]) ** 2), None

    return jax.lax.scan(body, 0.0, x)[0] / len(x)


def branched(params, x):
    def loud(x):
        z = x @ params["w"]
        jax.debug.callback(say, z)
        return z

    return jnp.mean((jax.lax.cond(x[0, 0] > 0, loud, lambda x: x @ params["w"], x) + 0.5) ** 2)


WHOLE = [Z.tolist()]
EFFECTS = {
    of_the_loss: [[np.mean((Z + 0.5) ** 2)]],
    of_an_activation: WHOLE,
    io: WHOLE,
    in_order: [[1.0], [5.0]],
    scanned: [[z] for z in Z],
    branched: WHOLE,
}


@pytest.mark.parametrize("loss_fn", EFFECTS, ids=lambda f: f.__name__)
def test_once_per_evaluation(loss_fn):
    eager = cqjax.value_and_grad(loss_fn)
    matched = cqjax.value_and_grad(loss_fn, signal="matched")
    for step in (eager, jax.jit(eager), jax.jit(matched)):
        np.testing.assert_allclose(said(step, PARAMS, X), EFFECTS[loss_fn], rtol=1e-6)
    _, grads, captures = eager(PARAMS, X)
    assert len(captures.flow.nodes) == (2 if loss_fn is branched else 1)
    want = 2 * np.asarray(X).T @ (Z + 0.5)[:, None] / 3
    np.testing.assert_allclose(grads["w"], want, rtol=1e-6)


def test_a_plan_says_nothing():
    assert not said(lambda: cqjax.plan(of_an_activation)(PARAMS, X).unmatched)


def test_a_matched_normalisation():
    """Its rule evaluates the equations within once more."""

    def loud(arrays, **options):
        jax.debug.callback(say, arrays[0].sum())
        return dtypes.promote_dtype(arrays, **options)

    norm = nnx.LayerNorm(2, promote_dtype=loud, rngs=nnx.Rngs(0))
    layers = nnx.Sequential(norm, nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    step = cqjax.nnx.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), signal="matched")
    assert said(step, layers, X) == [[6.0]]
