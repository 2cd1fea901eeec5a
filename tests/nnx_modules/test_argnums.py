"""Models anywhere among a loss's arguments: `argnums`, as `nnx.value_and_grad` has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cqjax

X = jnp.arange(12.0).reshape(4, 3) / 12
KERNELS = nnx.PathContains("kernel")


def models():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1))


def loss_fn(first, x, second):
    return jnp.mean(second(jnp.tanh(first(x))) ** 2)


ARGNUMS = {
    "first": (0, ["bias", "kernel"]),
    "last": (-1, ["bias", "kernel"]),
    "both": ((2, 0), ["0/bias", "0/kernel", "1/bias", "1/kernel"]),
    "filtered": (nnx.DiffState(0, KERNELS), ["kernel"]),
    "one filtered": ((nnx.DiffState(0, KERNELS), 2), ["0/kernel", "1/bias", "1/kernel"]),
}


@pytest.mark.parametrize("name", ARGNUMS)
def test_as_flax_has_it(name):
    (first, second), (argnums, paths) = models(), ARGNUMS[name]
    value, grads, captures = cqjax.nnx.value_and_grad(loss_fn, argnums=argnums)(first, X, second)
    want = nnx.value_and_grad(loss_fn, argnums=argnums)(first, X, second)
    assert jax.tree.structure((value, grads)) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (value, grads), want)
    assert sorted(captures) == paths
    plan = cqjax.nnx.plan(loss_fn, argnums=argnums)(first=first, x=X, second=second)
    assert {p.path: p.layer for p in plan.parameters} == dict.fromkeys(paths, "Linear")


def test_an_optimizer_of_several_models():
    """One step at the full rate, undamped, of a linear last layer fits a batch of 2 exactly."""
    (first, second), y = models(), jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def squared(first, x, second, y):
        return 0.5 * jnp.mean(jnp.sum((second(jax.lax.stop_gradient(first(x))) - y) ** 2, -1))

    tx = cqjax.csgd(1.0, relative_damping=0.0, max_change=None)
    optimizer = nnx.Optimizer((first, second), tx, wrt=nnx.Param)
    differentiate = cqjax.nnx.value_and_grad(squared, argnums=(0, 2))
    _, grads, captures = differentiate(first, X[:2], second, y)
    optimizer.update((first, second), grads, captures=captures)
    assert squared(first, X[:2], second, y) < 1e-8


def test_arrays_are_no_models():
    first, second = models()
    with pytest.raises(ValueError, match="no variables that wrt=.*are for cqjax.value_and_grad"):
        cqjax.nnx.value_and_grad(loss_fn, argnums=(0, 1))(first, X, second)
