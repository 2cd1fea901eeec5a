"""Auxiliary results of any kind: what `jax.value_and_grad` returns, cqjax returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cqjax

PARAMS, X = {"w": jnp.ones((3, 2))}, jnp.arange(12.0).reshape(4, 3)


class Model:
    """An object that is no pytree."""


KEPT = {
    "string": "accuracy",
    "object": Model(),
    "function": jnp.tanh,
    "int": 3,
    "large int": 2**40,
    "float": 2.5,
    "bool": True,
    "complex": 1j,
    "numpy": np.arange(3.0),
    "numpy scalar": np.float64(2.0),
    "array": jnp.arange(3),
    "shape": jax.ShapeDtypeStruct((3,), jnp.float32),
}


def of(aux):
    """A loss with these and some computed auxiliary results."""

    def loss_fn(params, x):
        z = x @ params["w"]
        return jnp.mean(z**2), {"a": z, "b": [aux, None, z > 9], "c": jnp.float16(3)}

    return loss_fn


@pytest.mark.parametrize("kind", KEPT)
def test_as_they_are(kind):
    aux = KEPT[kind]
    (_, got), _, _ = cqjax.value_and_grad(of(aux), has_aux=True)(PARAMS, X)
    (_, want), _ = jax.value_and_grad(of(aux), has_aux=True)(PARAMS, X)
    assert got["b"][0] is aux is want["b"][0] and got["b"][1] is None
    for a, b in ((got["a"], want["a"]), (got["b"][2], want["b"][2]), (got["c"], want["c"])):
        assert type(a) is type(b) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_under_jit():
    """As JAX: numbers become arrays, weakly typed; a string is none."""
    for value in (3, 2.5, True):
        got, want = (
            jax.jit(lambda vg=vg, v=value: vg(of(v), has_aux=True)(PARAMS, X)[0][1]["b"][0])()
            for vg in (cqjax.value_and_grad, jax.value_and_grad)
        )
        assert got.aval == want.aval and got == want == value
    with pytest.raises(TypeError, match="str"):
        jax.jit(lambda: cqjax.value_and_grad(of("accuracy"), has_aux=True)(PARAMS, X)[0])()


def test_of_modules():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def loss_fn(model, x):
        return jnp.mean(model(x)), ("accuracy", 3, KEPT["object"], x.sum())

    (_, aux), _, _ = cqjax.nnx.value_and_grad(loss_fn, has_aux=True)(model, X)
    assert aux == nnx.value_and_grad(loss_fn, has_aux=True)(model, X)[0][1]


@pytest.mark.parametrize("loss", ["high", None, Model()])
def test_a_loss_is_none_of_these(loss):
    with pytest.raises(TypeError, match=f"the loss is a {type(loss).__name__}; expected a scalar"):
        cqjax.value_and_grad(lambda params: loss)(PARAMS)
    with pytest.raises(TypeError, match=f"the loss is a {type(loss).__name__}; expected a scalar"):
        cqjax.value_and_grad(lambda params: (loss, 3), has_aux=True)(PARAMS)
