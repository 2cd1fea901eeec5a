"""Ragged products: rows sorted by groups, each with a weight, and a ridge problem, of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cqjax

N, G, D, K = 9, 4, 3, 2
RNG = np.random.default_rng(0)
X, Y, W = RNG.normal(size=(N, D)), RNG.normal(size=(N, K)), RNG.normal(size=(G, D, K))
SIZES = np.array([4, 0, 1, 3])  # one group is empty, and the last row has none


def loss_fn(w, x, y, sizes):
    return 0.5 * jnp.mean(jnp.sum((lax.ragged_dot(x, w, sizes) - y) ** 2, -1))


def expected(w, x, y, sizes, absolute, relative):
    u, start = np.zeros_like(w), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        a, start = x[rows], start + size
        if size:
            lam = absolute + relative * np.trace(a.T @ a) / min(size, D)
            error = a @ w[group] - y[rows]
            u[group] = np.linalg.solve(a.T @ a + lam * np.eye(D), a.T @ error)
    return u


def updated(loss_fn, w, args, absolute, relative, **options):
    """The update, and how many solves failed."""
    with jax.enable_x64(True):
        w, *args = map(jnp.asarray, (w, *args))
        tx = cqjax.scale_by_consequentialism(damping=absolute, relative_damping=relative)

        @jax.jit
        def step(w, *args):
            _, grads, captures = cqjax.value_and_grad(loss_fn, batch_size=N, **options)(w, *args)
            u, state = tx.update(grads, tx.init(w), w, captures=captures)
            return u, state.fallbacks

        u, failures = step(w, *args)
        return np.asarray(u), int(failures.sum())


@pytest.mark.parametrize(("absolute", "relative"), [(0.3, 0.0), (0.0, 0.1)])
def test_each_group_has_its_own_ridge_solution(absolute, relative):
    """Damping is relative to the mean over the group's own rows; an empty group is no failure."""
    u, failures = updated(loss_fn, W, (X, Y, SIZES), absolute, relative)
    np.testing.assert_allclose(u, expected(W, X, Y, SIZES, absolute, relative), rtol=1e-8)
    assert not failures


def test_a_scaled_and_transposed_weight():
    def scaled(w, x, y, sizes):
        return loss_fn(w.transpose(0, 2, 1) / 4, x, y, sizes)

    u, _ = updated(scaled, W.transpose(0, 2, 1), (X, Y, SIZES), 0.3, 0.0)
    v = 4 * expected(W / 4, X, Y, SIZES, 0.3, 0.0)
    np.testing.assert_allclose(u.transpose(0, 2, 1), v, rtol=1e-8)


def test_trips_of_a_loop_add_up():
    """Two microbatches with groups of their own."""
    x, y = RNG.normal(size=(2, N, D)), RNG.normal(size=(2, N, K))
    sizes = np.array([[4, 0, 1, 4], [2, 0, 3, 4]])

    def scanned(w, x, y, sizes):
        return jnp.mean(lax.map(lambda each: loss_fn(w, *each), (x, y, sizes)))

    u, _ = updated(lambda *args: 2 * scanned(*args), W, (x, y, sizes), 0.3, 0.0)
    starts = np.concatenate([np.zeros((2, 1), int), sizes.cumsum(1)], 1)
    for group in range(G):
        a, b = (
            np.concatenate([z[i, starts[i, group] : starts[i, group + 1]] for i in range(2)])
            for z in (x, y)
        )
        v = np.linalg.solve(a.T @ a + 0.3 * np.eye(D), a.T @ (a @ W[group] - b))
        np.testing.assert_allclose(u[group], v, rtol=1e-8, atol=1e-12)


def test_experts_by_sorting():
    """A switch layer with weights before and behind: as its experts written out."""
    ids = np.array([2, 0, 3, 0, 0, 3, 2, 0, 3])
    order = np.argsort(ids, kind="stable")

    def switch(w, x, y):
        z = lax.ragged_dot(x[order], w, jnp.bincount(ids, length=G).astype(jnp.int32))
        return 0.5 * jnp.mean(jnp.sum((jnp.zeros_like(y).at[order].set(z) - y) ** 2, -1))

    u, _ = updated(switch, W, (X, Y), 0.0, 0.1)
    v = expected(W, X[order], Y[order], np.bincount(ids, minlength=G), 0.0, 0.1)
    np.testing.assert_allclose(u, v, rtol=1e-8, atol=1e-12)


def test_the_plan_says_how():
    plan = cqjax.plan(loss_fn, capture=cqjax.Rows)(W, X, Y, SIZES)
    (block,) = plan.blocks
    assert (block.solver, block.batch, block.rows, block.exact) == ("primal", G, N, True)
    plan = cqjax.plan(loss_fn, max_dim=2)(W, X, Y, SIZES)
    assert plan.uncovered()[""] == ("needs the inverse of a matrix of 3 rows, more than max_dim",)


def test_an_average_over_steps_and_a_clip():
    """They take the statistic as any other layer's."""
    tx = cqjax.clip_by_output_change(1e-3, learning_rate=1.0)
    with jax.enable_x64(True):
        w = jnp.asarray(W)
        _, grads, captures = cqjax.value_and_grad(loss_fn, batch_size=N)(w, X, Y, SIZES)
        u, _ = tx.update(1e3 * grads, tx.init(w), w, captures=captures)
        start = 0
        for group, size in enumerate(SIZES):
            a, start = X[start : start + size], start + size
            moved, now = (np.linalg.norm(a @ np.asarray(v[group])) for v in (u, w))
            assert moved <= 1.001e-3 * max(now, np.linalg.norm(a))
        plan = cqjax.plan(loss_fn)(w, X, Y, SIZES)
        ema = cqjax.scale_by_consequentialism(
            damping=0.3, relative_damping=0.0, ema_decay=0.5, plan=plan
        )
        v, _ = ema.update(grads, ema.init(w), w, captures=captures)
    assert np.isfinite(v).all()


def test_rows_are_not_to_be_had(float64):
    _, grads, captures = cqjax.value_and_grad(loss_fn, batch_size=N)(W, X, Y, SIZES)
    with pytest.raises(ValueError, match="a ragged product's rows never are"):
        tx = cqjax.scale_by_nlms(0.1)
        tx.update(grads, tx.init(W), captures=captures)


def test_back_matching_says_that_it_does_not_match_them(float64):
    plan = cqjax.plan(loss_fn, signal="matched", batch_size=N)({"w": W}["w"], X, Y, SIZES)
    assert plan.unmatched == ("",)
