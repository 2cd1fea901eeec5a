"""`scale_by_lsalr` against Singh et al.'s formula, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax


@jax.jit
def scaled(gradients):
    tx = cqjax.scale_by_lsalr()
    updates, state = tx.update(gradients, tx.init(gradients))
    assert state == optax.EmptyState()
    return updates


def formula(gradient):
    """(1 + log(1 + 1/‖G‖)) G, in float64."""
    gradient = np.asarray(gradient, np.float64)
    return (1 + np.log1p(1 / np.linalg.norm(gradient))) * gradient


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_array_is_a_layer(dtype):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (30, 40), "bias": (4,), "scale": ()}
    with jax.enable_x64(True):
        gradients = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
        updates = scaled(gradients)
        for key, gradient in gradients.items():
            assert updates[key].dtype == dtype
            rounded_once = jnp.finfo(dtype).bits == 16
            rtol = float(jnp.finfo(dtype).eps) * (0.51 if rounded_once else 4)
            np.testing.assert_allclose(updates[key].astype(float), formula(gradient), rtol=rtol)


@pytest.mark.parametrize("norm", [2e-38, 1e-30, 1e-20, 1e-3, 1e10, 1e30])
def test_norms_whose_square_is_out_of_range(norm):
    gradient = jnp.array([0.6, -0.8, 0.0], jnp.float32) * norm
    np.testing.assert_allclose(scaled(gradient), formula(gradient), rtol=1e-6)


def test_gradients_of_zero_or_without_entries():
    gradients = {"zero": jnp.zeros((2, 3)), "empty": jnp.zeros((0, 3))}
    updates = scaled(gradients)
    jax.tree.map(np.testing.assert_array_equal, updates, gradients)
    _, tangent = jax.jvp(scaled, (gradients,), (gradients,))
    jax.tree.map(np.testing.assert_array_equal, tangent, gradients)


def test_complex_gradients():
    gradient = jnp.array([3e-3 + 4e-3j, 12e-3j])
    want = (1 + np.log1p(1 / 13e-3)) * np.asarray(gradient)
    np.testing.assert_allclose(scaled(gradient), want, rtol=1e-6)


def test_with_optax():
    """Masks, vmap over stacked layers, hyperparameters and unknown arguments."""
    gradients = {"a": jnp.array([[3.0, 4.0], [0.3, 0.4]]), "b": jnp.ones(2)}
    tx = optax.masked(cqjax.scale_by_lsalr(), {"a": True, "b": False})
    updates, _ = tx.update(gradients, tx.init(gradients), unknown=1)
    np.testing.assert_allclose(updates["a"], formula(gradients["a"]), rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], gradients["b"])
    want = np.stack([formula(layer) for layer in gradients["a"]])
    np.testing.assert_allclose(jax.vmap(scaled)(gradients["a"]), want, rtol=1e-6)
    tx = optax.inject_hyperparams(cqjax.scale_by_lsalr)()
    updates, _ = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates["a"], formula(gradients["a"]), rtol=1e-6)
