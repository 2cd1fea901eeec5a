"""Hypothesis looks for batches that break a layer, a network, or what is said of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from across_batches import quickly
from hypothesis import given, settings
from hypothesis import strategies as st

import cqjax

HUGE, TINY = 3e38, 1e-42
NASTY = [0.0, 1.0, -1.0, TINY, 1e-18, 1e-6, 1e6, 1e18, 1e20, HUGE, -HUGE, np.inf, np.nan]
SHAPES = [(1, 3, 2), (2, 3, 2), (7, 3, 2)]
"""Rows, features, outputs."""
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def loss_fn(params, x, y):
    h = jax.nn.relu(x @ params["w0"] + params["b0"])
    z = h @ params["w1"] * params["scale"]
    return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))


def linear(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))


@functools.cache
def program(solver, loss=loss_fn):
    """(params, x, y, λ) -> (gradients, updates, counts)."""

    def run(params, x, y, damping):
        _, grads, captures = cqjax.value_and_grad(loss, solver=solver)(params, x, y)
        tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=0.0)
        updates, state = tx.update(grads, tx.init(params), params, captures=captures)
        return grads, updates, state.fallbacks

    return quickly(run)


@st.composite
def batches(draw):
    """X with some entries replaced, rows repeated and columns scaled; its dtype."""
    n, d, o = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    x = rng.normal(size=(n, d))
    if draw(st.booleans()):
        x = x[rng.integers(0, draw(st.integers(1, n)), n)]
    x *= np.array(draw(st.lists(st.sampled_from(NASTY[:9]), min_size=d, max_size=d)))
    places = st.tuples(st.integers(0, n - 1), st.integers(0, d - 1), st.sampled_from(NASTY))
    for row, column, value in draw(st.lists(places, max_size=3)):
        x[row, column] = value
    dtype = draw(st.sampled_from(DTYPES))
    params = {
        "b0": rng.normal(size=4),
        "scale": np.ones(()),
        "w0": rng.normal(size=(d, 4)),
        "w1": rng.normal(size=(4, o)),
    }
    arrays = params, x, rng.normal(size=(n, o))
    with np.errstate(over="ignore", under="ignore"):
        return jax.tree.map(lambda a: jnp.asarray(a).astype(dtype), arrays)


@given(
    batch=batches(),
    solver=st.sampled_from(["dual", "primal"]),
    damping=st.sampled_from([0.0, 1e-30, 1e-3, 1e30]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_update_is_finite(batch, solver, damping):
    """And what was not finite on the way is counted where it was."""
    params, x, y = batch
    grads, updates, counts = program(solver)(params, x, y, damping)
    for path, update in updates.items():
        assert update.dtype == params[path].dtype and np.isfinite(update).all(), path
    b0, scale, w0, w1 = counts.tolist()
    assert b0 == 0 and {scale, w0, w1} <= {0, 1}
    spoiled = {path: not np.isfinite(g).all() for path, g in grads.items()}
    with np.errstate(over="ignore"):  # a rule behind it may square what has no solve
        assert scale == (not np.isfinite(np.square(grads["scale"])).all())
    if solver == "primal":  # whose start is the gradient
        assert w0 >= (spoiled["w0"] | spoiled["b0"]) and w1 >= spoiled["w1"]


@given(
    shape=st.sampled_from(SHAPES),
    solver=st.sampled_from(["dual", "primal"]),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 1e9]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_what_is_benign_is_the_pseudoinverse(shape, solver, seed, scale):
    """Independent rows or features of any scale: U = N X⁺ Z̄, and nothing counted.

    Damped where the solver's matrix is singular.
    """
    n, d, o = shape
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(max(n, d), min(n, d))))[0]
    spread = rng.uniform(0.5, 2.0, min(n, d))
    x = basis * spread if n > d else (basis * spread).T
    arrays = scale * x, np.zeros((d, o)), rng.normal(size=(n, o))
    x, w, y = (a.astype(np.float32) for a in arrays)
    singular = (n > d) if solver == "dual" else (n < d)
    damping = 1e-3 * scale**2 if singular else 0.0
    _, updates, counts = program(solver, linear)({"w": w}, x, y, damping)
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    want = -v.T @ ((s / (s**2 + damping))[:, None] * (u.T @ y))
    tolerance = 1e-3 * np.abs(want).max()
    np.testing.assert_allclose(updates["w"], want, rtol=1e-3, atol=tolerance)
    assert counts.tolist() == [0]
