"""A weight that a loss makes of parameters in both branches of a condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cqjax


@pytest.mark.parametrize("taken", [False, True])
def test_made_in_both_branches(taken):
    rng = np.random.default_rng(0)
    params = {"v": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)

    def weight(v):
        return v / jnp.sqrt((v**2).sum(0))

    def loss_fn(params, x, i):
        def branch(f):
            return lambda x: jnp.mean(jnp.sum(f(x @ weight(params["v"])), -1))

        return jax.lax.cond(i, branch(jnp.tanh), branch(jnp.sin), x)

    def alone(params, x):
        return jnp.mean(jnp.sum((jnp.tanh if taken else jnp.sin)(x @ weight(params["v"])), -1))

    tx, updates = cqjax.scale_by_consequentialism(), []
    for loss, args in ((loss_fn, (x, taken)), (alone, (x,))):
        fn = cqjax.value_and_grad(loss, reparametrized="nearest", batch_size=len(x))
        assert not fn.plan(params, *args).uncovered()
        _, grads, captures = jax.jit(fn)(params, *args)
        updates.append(tx.update(grads, tx.init(params), captures=captures)[0]["v"])
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-4, atol=1e-6)
