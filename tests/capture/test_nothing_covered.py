"""A loss in which no parameter is covered: then our optimizers are Optax's own, and it is said."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import cqjax

PARAMS = {"rate": jnp.ones(()), "decay": jnp.full(3, 0.5)}


def solver_loss(params, x):
    """An ordinary differential equation, in Euler's steps: no product with a weight."""
    return jnp.mean(jax.lax.fori_loop(0, 3, lambda _, x: x - 0.1 * params["decay"] * x, x)) + (
        params["rate"] ** 2
    )


def test_it_is_said_with_the_reasons():
    with pytest.warns(UserWarning, match="no parameter is covered.*plain SGD") as caught:
        cqjax.value_and_grad(solver_loss)(PARAMS, jnp.ones((4, 3)))
    (warning,) = caught
    for path, reasons in cqjax.plan(solver_loss)(PARAMS, jnp.ones((4, 3))).uncovered().items():
        assert f"  {path}: {'; '.join(reasons)}\n" in str(warning.message)
    assert 'skip="*"' in str(warning.message)
    assert warning.filename == __file__


def test_of_modules_too():
    class Scale(nnx.Module):
        def __init__(self):
            self.gain = nnx.Param(jnp.ones(3))

    with pytest.warns(UserWarning, match="no parameter is covered"):
        cqjax.nnx.value_and_grad(lambda m, x: jnp.mean(m.gain * x))(Scale(), jnp.ones((4, 3)))


@pytest.mark.parametrize("selection", [{"skip": "*"}, {"only": "rate", "skip": "rate"}], ids=str)
def test_what_is_skipped_is_meant(selection):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cqjax.value_and_grad(solver_loss, **selection)(PARAMS, jnp.ones((4, 3)))


def test_a_matched_signal_has_its_effect_without_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cqjax.back_matching_value_and_grad(solver_loss)(PARAMS, jnp.ones((4, 3)))


def test_one_layer_is_enough():
    model = nn.Sequential([nn.Dense(3), nn.LayerNorm()])
    params = model.init(jax.random.key(0), jnp.ones((4, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cqjax.value_and_grad(lambda p, x: jnp.mean(model.apply(p, x) ** 2))(
            params, jnp.ones((4, 3))
        )


def test_error():
    with pytest.raises(ValueError, match="no parameter is covered"):
        cqjax.value_and_grad(solver_loss, on_uncovered="error")(PARAMS, jnp.ones((4, 3)))
