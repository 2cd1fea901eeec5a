"""Layers that read the same inputs have one inverse; all others have their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from across_batches import quickly
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import cqjax
from cqjax.linalg import ridge

DAMPING = 0.3
N, D = 24, 4
TX = cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0)


@pytest.fixture
def inverted(monkeypatch):
    """How many systems each call inverts."""
    numbers, original = [], ridge.inverses

    def counting(systems, *args):
        numbers.append(len(systems))
        return original(systems, *args)

    monkeypatch.setattr(ridge, "inverses", counting)
    return numbers


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def loss_fn(params, x):
    first = [x @ params[name] for name in ("q", "k", "v")]
    with_bias = x @ params["biased"] + params["b"]
    return jnp.mean(jnp.sum(jnp.tanh(sum(first) + with_bias + 2 * x @ params["other"]), -1))


PARAMS = {name: normal(D, 3) for name in ("q", "k", "v", "biased", "other")} | {"b": jnp.ones(3)}


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_one_inverse_for_one_input(inverted, solver):
    """Of x without a bias, x with one, and of 2x."""
    x = normal(N, D)
    _, grads, captures = cqjax.value_and_grad(loss_fn, solver=solver)(PARAMS, x)
    got, _ = TX.update(grads, TX.init(PARAMS), captures=captures)
    assert max(inverted) == 3
    rows = np.asarray(x, np.float64)
    for name in ("q", "k", "v", "other"):
        inputs = 2 * rows if name == "other" else rows
        matrix = inputs.T @ inputs + DAMPING * np.eye(D)
        want = N * np.linalg.solve(matrix, np.asarray(grads[name], np.float64))
        np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=1e-4, err_msg=name)


def test_of_weights_that_are_split_otherwise_each_has_its_own():
    """One weight is on all devices, and sees all their rows; the other differs between them."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

    def local(params, x):
        def loss(params, x):
            z = x @ params["whole"] + x @ params["own"]
            return jax.lax.pmean(jnp.mean(jnp.sum(z**2, -1)), "data")

        _, grads, captures = cqjax.value_and_grad(loss, batch_size=N, solver="primal")(params, x)
        return TX.update(grads, TX.init(params), captures=captures)[0], grads

    specs = {"whole": P(), "own": P("data")}
    x = normal(N, D)
    params = {"whole": normal(D, 2), "own": normal(2 * D, 2)}
    run = jax.shard_map(local, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, specs))
    got, grads = quickly(run)(params, x)
    parts = np.split(np.asarray(x, np.float64), 2)

    def solved(rows, gradient):
        return N * np.linalg.solve(rows.T @ rows + DAMPING * np.eye(D), gradient)

    want = solved(np.concatenate(parts), grads["whole"])
    np.testing.assert_allclose(got["whole"], want, rtol=1e-3, atol=1e-4)
    own = np.split(np.asarray(grads["own"], np.float64), 2)
    want = np.concatenate([solved(*each) for each in zip(parts, own, strict=True)])
    np.testing.assert_allclose(got["own"], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("taken", [0, 1])
def test_branches_have_their_own(taken):
    """What is captured in a branch that was not taken is zero."""

    def loss_fn(params, x, i):
        def branch(name):
            return lambda x: jnp.mean(jnp.sum(jnp.tanh(x @ params[name]), -1))

        return jax.lax.switch(i, [branch("q"), branch("k")], x)

    x, params = normal(N, D), {name: PARAMS[name] for name in ("q", "k")}
    fn = jax.jit(cqjax.value_and_grad(loss_fn, solver="primal"))
    _, grads, captures = fn(params, x, taken)
    got, _ = TX.update(grads, TX.init(params), captures=captures)
    name, other = ("k", "q") if taken else ("q", "k")
    rows = np.asarray(x, np.float64)
    want = N * np.linalg.solve(rows.T @ rows + DAMPING * np.eye(D), np.asarray(grads[name]))
    np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got[other], 0)
