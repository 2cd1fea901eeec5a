"""A linear layer with squared error: its update by cqjax, and by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import cqjax


def squared_error(params, x, y):
    """Mean over examples of half the squared error, as in Eq. 30 of Paeedeh and Ghiasi-Shirazi."""
    z = x @ params["w"] + params.get("b", 0.0)
    return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))


def problem(n, d, o, *, bias=False, seed=0):
    """(params, x, y) of a linear layer with normal numbers."""
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(d, o))}
    if bias:
        params["b"] = rng.normal(size=o)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, o))
    return jax.tree.map(jnp.asarray, (params, x, y))


def first_step(tx, loss, params, *args, **kwargs):
    """(gradients, captures, updates, state), by one program."""

    @jax.jit
    def run(params, *args):
        _, grads, captures = cqjax.value_and_grad(loss, **kwargs)(params, *args)
        return grads, captures, *tx.update(grads, tx.init(params), params, captures=captures)

    return run(params, *args)


def direction(params, x, y, damping, solver="auto", change=None, relative_damping=0.0):
    """U of one layer, and the state; `change` is what happens to the gradient before."""
    tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=relative_damping)

    @jax.jit
    def run(params, x, y):
        _, grads, captures = cqjax.value_and_grad(squared_error, solver=solver)(params, x, y)
        if change is not None:
            grads = change(grads)
        return tx.update(grads, tx.init(params), params, captures=captures)

    return run(params, x, y)


def expected(params, x, y, damping, incoming=None):
    """N (X̃ᵀX̃ + λI)⁻¹ H, in NumPy; H is the gradient by default."""
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    n = len(x)
    if "b" in params:
        x = np.concatenate([x, np.ones((n, 1))], 1)
        w = np.concatenate([params["w"], params["b"][None]])
    else:
        w = params["w"]
    h = x.T @ (x @ w - y) / n
    if incoming is not None:
        h = np.concatenate([incoming["w"], incoming["b"][None]]) if "b" in params else incoming["w"]
    u = n * np.linalg.solve(x.T @ x + damping * np.eye(x.shape[1]), h)
    return {"w": u[:-1], "b": u[-1]} if "b" in params else {"w": u}


def assert_close(got, want, rtol=1e-6):
    assert set(got) == set(want)
    for key in want:
        scale = np.abs(want[key]).max()
        np.testing.assert_allclose(got[key], want[key], rtol=rtol, atol=rtol * scale)


CHANGES = {
    "scaled": lambda grads: jax.tree.map(lambda g: 0.25 * g, grads),
    "decayed": lambda grads: jax.tree.map(lambda g: g + 0.1 * jnp.cos(g), grads),
    "replaced": lambda grads: jax.tree.map(lambda g: jnp.sin(3 * g), grads),
    "zero": lambda grads: jax.tree.map(jnp.zeros_like, grads),
}
