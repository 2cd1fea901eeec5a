"""The updates of a network of two layers by its rows, in float64 NumPy, and those of cqjax."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

import cqjax

RNG = np.random.default_rng(0)
RELATIVE, ABSOLUTE = 0.1, 1e-2
B, T, D, H, OUT = 6, 5, 4, 7, 3


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"w": normal(D, H), "b": normal(H), "v": normal(H, OUT), "c": normal(OUT)}
X, Y = normal(B, T, D), normal(B, T, OUT)


def updates(loss_fn, params, args, jit=True, **options):
    def update(params, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, grads, captures = cqjax.value_and_grad(loss_fn, **options)(params, *args)
        tx = cqjax.scale_by_consequentialism(damping=ABSOLUTE, relative_damping=RELATIVE)
        return tx.update(grads, tx.init(params), captures=captures)[0]

    return (jax.jit(update) if jit else update)(params, *args)


def ridge(x, signal, terms, weights=None):
    """N (Σ w x xᵀ + λI)⁻¹ Xᵀ Z̄, λ relative to the mean of the eigenvalues that may not be zero."""
    weights = np.ones(len(x)) if weights is None else weights
    gram = (x * weights[:, None]).T @ x
    damping = ABSOLUTE + RELATIVE * np.trace(gram) / min(x.shape)
    return terms * np.linalg.solve(gram + damping * np.eye(x.shape[1]), x.T @ signal)


def exact(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def of_rows(params, x, y):
    """The updates of `net` with mean squared error, by rows."""
    p, x, y = exact((params, x, y))
    one = np.ones((len(x), 1))
    hidden = np.tanh(x @ p["w"] + p["b"])
    signal = 2 * (hidden @ p["v"] + p["c"] - y) / len(x)
    last = ridge(np.hstack([hidden, one]), signal, len(x))
    below = (signal @ p["v"].T) * (1 - hidden**2)
    first = ridge(np.hstack([x, one]), below, len(x))
    return {"w": first[:-1], "b": first[-1], "v": last[:-1], "c": last[-1]}


def net(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"]


def losses(p, x, y):
    return jnp.sum((net(p, x) - y) ** 2, -1)


def assert_close(got, want):
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=2e-3, atol=2e-4, err_msg=path)
