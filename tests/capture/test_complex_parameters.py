"""Complex parameters: their gradient is JAX's where they are skipped; else they are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 3)).astype(np.float32)
PARAMS = {
    "c": jnp.asarray(RNG.normal(size=(3, 2)) + 1j * RNG.normal(size=(3, 2)), jnp.complex64),
    "phase": jnp.asarray(1j, jnp.complex64),
    "w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32),
}


def loss_fn(params, x):
    z = jnp.abs(params["phase"] * (x.astype(jnp.complex64) @ params["c"]))
    return 0.5 * jnp.mean(jnp.sum((z + x @ params["w"]) ** 2, -1))


@pytest.mark.parametrize("selection", [{"skip": ["c", "phase"]}, {"only": "w"}])
@pytest.mark.parametrize("signal", ["gradient", "matched"])
def test_skipped(selection, signal):
    step = jax.jit(cqjax.value_and_grad(loss_fn, signal=signal, **selection))
    value, grads, captures = step(PARAMS, X)
    want = jax.value_and_grad(loss_fn)(PARAMS, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (value, grads), want)
    tx = optax.chain(cqjax.scale_by_consequentialism(damping=0.5, relative_damping=0.0))
    updates, _ = tx.update(grads, tx.init(PARAMS), captures=captures)
    np.testing.assert_array_equal(updates["c"], grads["c"])
    x = np.float64(X)
    z = abs(1j * (x @ np.asarray(PARAMS["c"]))) + x @ np.float64(PARAMS["w"])
    exact = np.linalg.solve(x.T @ x + 0.5 * np.eye(3), x.T @ z)
    np.testing.assert_allclose(updates["w"], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("skip", "path"), [("c", "phase"), ("phase", "c")])
def test_refused_by_name(skip, path):
    message = f"^the parameter {path} has dtype complex64; expected .*: name it in skip="
    with pytest.raises(TypeError, match=message):
        cqjax.value_and_grad(loss_fn, skip=skip)(PARAMS, X)


def test_a_real_weight_of_complex_numbers_is_uncovered():
    def loss(params, x):
        return jnp.mean(jnp.abs(jax.lax.dot(x, params["w"])) ** 2)

    plan = cqjax.plan(loss)({"w": PARAMS["w"]}, X * np.complex64(1j))
    assert plan.uncovered() == {"w": ("enters `dot_general` of complex numbers",)}
