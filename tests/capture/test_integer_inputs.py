"""Layers whose inputs are integers or booleans: images as they are stored, flags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cqjax

RNG = np.random.default_rng(0)
INPUTS = {
    "uint8": RNG.integers(0, 256, (6, 4)).astype(np.uint8),
    "int32": RNG.integers(-70_000, 70_000, (6, 4)).astype(np.int32),
    "bool": RNG.random((6, 4)) < 0.5,
}
Y = RNG.normal(size=(6, 2)).astype(np.float32)
PARAMS = {"b": jnp.zeros(2), "w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)}


def loss_fn(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((x @ params["w"] + params["b"] - y) ** 2, -1))


def scanned(params, x, y):
    """Trip by trip: integers within a loop."""

    def body(total, row):
        return total + 0.5 * jnp.sum((row[0] @ params["w"] + params["b"] - row[1]) ** 2), None

    return jax.lax.scan(body, 0.0, (x, y))[0] / len(x)


def expected(x):
    """N (XᵀX + λI)⁻¹ XᵀZ̄ in float64, the bias among the features; λ in units of XᵀX."""
    x = np.concatenate([x.astype(np.float64), np.ones((6, 1))], 1)
    w = np.concatenate([PARAMS["w"], PARAMS["b"][None]]).astype(np.float64)
    gram = x.T @ x
    ridge = gram + np.trace(gram) / 5 * np.eye(5)
    return np.linalg.solve(ridge, x.T @ (x @ w - Y))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("loss", [loss_fn, scanned])
def test_updates_equal_numpys(loss, solver, kind):
    x = INPUTS[kind]
    tx = cqjax.scale_by_consequentialism(relative_damping=1.0)
    step = cqjax.value_and_grad(loss, solver=solver)
    value, grads, captures = step(PARAMS, x, Y)
    want = jax.value_and_grad(loss)(PARAMS, x, Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (value, grads), want)
    updates, _ = tx.update(grads, tx.init(PARAMS), captures=captures)
    weight, bias = np.split(expected(x), [4])
    scale = abs(weight).max()
    np.testing.assert_allclose(updates["w"], weight, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(updates["b"], bias[0], rtol=1e-3, atol=1e-4 * scale)


def test_what_is_captured_is_exact():
    x = INPUTS["uint8"]
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    for params in (PARAMS, half):
        (rows,) = cqjax.value_and_grad(loss_fn, solver="dual")(params, x, Y)[2]["w"]
        np.testing.assert_array_equal(rows.rows().x[0], x)
        (gram,) = cqjax.value_and_grad(loss_fn, solver="primal")(params, x, Y)[2]["w"]
        exact = np.float64(x).T @ np.float64(x)
        np.testing.assert_allclose(gram.second_moment()[0, :4, :4], exact, rtol=1e-6)


def test_back_matching_ends_there():
    """Integers get no signal; the layer above does, and so its weight has its own gradient."""
    step = cqjax.value_and_grad(loss_fn, signal="matched")
    _, grads, _ = step(PARAMS, INPUTS["uint8"], Y)
    want = jax.grad(loss_fn)(PARAMS, INPUTS["uint8"], Y)
    jax.tree.map(np.testing.assert_array_equal, grads, want)
