"""One of three layers attacked: its fallback, its count, and the others' exact updates.

In float32, against float64 NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_layer import expected, first_step, problem, squared_error

import cqjax
from cqjax.linalg.ridge import REPAIR_DAMPING

NAMES = ("before", "attacked", "after")
WIDE, TALL = (4, 6, 2), (9, 3, 2)
"""Rows, features and outputs: fewer rows than features, and more."""


def spoiled(value):
    return lambda x: x.at[1, 2].set(value)


def scaled(factor):
    return lambda x: factor * x


def repeated(x):
    return jnp.broadcast_to(x[:1], x.shape)


def ill_conditioned(x):
    """With singular values from 1 to 1e-12."""
    u, s, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return jnp.asarray(u * np.logspace(0, -12, len(s)) @ v, x.dtype)


def dead(x):
    """Inputs of which two are always zero, as those from dead units are."""
    return x.at[:, :2].set(0.0)


ATTACKS = {
    # name: (what happens to X, λ, (wide dual, wide primal, tall dual, tall primal))
    "none": (lambda x: x, 1e-2, ("exact",) * 4),
    "NaN": (spoiled(jnp.nan), 1e-2, ("zero",) * 4),
    "infinity": (spoiled(jnp.inf), 1e-2, ("zero",) * 4),
    "overflow of XᵀX": (spoiled(1e20), 1e-2, ("zero",) * 4),
    "zeros": (scaled(0.0), 1e-2, ("exact",) * 4),
    "zeros, λ = 0": (scaled(0.0), 0.0, ("repaired",) * 4),
    "duplicates": (repeated, 1e-2, ("exact",) * 4),
    "duplicates, λ = 0": (repeated, 0.0, ("repaired",) * 4),
    "λ = 0": (lambda x: x, 0.0, ("exact", "repaired", "repaired", "exact")),
    "1e18": (scaled(1e18), 1e-2, ("exact", "repaired", "repaired", "exact")),
    "1e-18": (scaled(1e-18), 1e-2, ("exact",) * 4),
    "condition 1e12": (ill_conditioned, 1e-2, ("exact",) * 4),
    "condition 1e12, λ = 0": (ill_conditioned, 0.0, ("repaired",) * 4),
    "dead units": (dead, 1e-2, ("exact",) * 4),
    "dead units, λ = 0": (dead, 0.0, ("exact", "repaired", "repaired", "repaired")),
}


def loss_fn(params, batches):
    losses = (squared_error(params[name], *batches[name]) for name in NAMES)
    return sum(losses, start=jnp.zeros(()))


@functools.cache
def program(solver, shape):
    """(params, batches, λ) -> (updates, counts)."""

    def run(params, batches, damping):
        tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=0.0)
        _, grads, captures = cqjax.value_and_grad(loss_fn, solver=solver, batch_size=shape[0])(
            params, batches
        )
        updates, state = tx.update(grads, tx.init(params), params, captures=captures)
        return updates, state.fallbacks

    return jax.jit(run)


def exactly(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def joined(params):
    """[W; b]."""
    return np.concatenate([np.asarray(params["w"]), np.asarray(params["b"])[None]])


def with_ones(x):
    return np.concatenate([x, np.ones((len(x), 1))], 1)


def exact(params, x, y, damping):
    """N X⁺Z̄, damped: by singular values, of which λ = 0 needs no inverse of XᵀX."""
    rows = with_ones(x)
    u, s, v = np.linalg.svd(rows, full_matrices=False)
    return v.T @ ((s / (s**2 + damping))[:, None] * (u.T @ (rows @ joined(params) - y)))


def repaired(params, x, y):
    """The update with damping of 1e-2 of the mean eigenvalue, of those that may be non-zero."""
    rows = with_ones(x)
    return exact(params, x, y, REPAIR_DAMPING * np.sum(rows**2) / min(rows.shape))


@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_update_and_count(attack, solver, shape):
    change, damping, outcomes = ATTACKS[attack]
    outcome = outcomes[2 * (shape is TALL) + (solver == "primal")]
    problems = {name: problem(*shape, bias=True, seed=i) for i, name in enumerate(NAMES)}
    params = {name: p for name, (p, _, _) in problems.items()}
    batches = {name: (x, y) for name, (_, x, y) in problems.items()}
    x, y = batches["attacked"]
    batches["attacked"] = change(x), y
    updates, counts = program(solver, shape)(params, batches, damping)
    attacked = exactly((params["attacked"], *batches["attacked"]))
    got = joined(updates["attacked"])
    if outcome == "zero":
        np.testing.assert_array_equal(got, 0)
    else:
        want = exact(*attacked, damping) if outcome == "exact" else repaired(*attacked)
        rows = with_ones(attacked[1])
        if attack == "1e18":  # whose squares' inverses are hardly normal numbers of float32
            assert_close(rows @ got, rows @ want, 0.1)
        else:
            assert_close(got, want)
    assert counts.reshape(3, 2)[1].tolist() == [0, outcome != "exact"]
    if damping:  # else it may be the others that need repairs
        assert counts.sum() == (outcome != "exact")
        for name in ("before", "after"):
            want = exact(*exactly((params[name], *batches[name])), damping)
            assert_close(joined(updates[name]), want)


def assert_close(got, want, tolerance=2e-3):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_a_batch_of_one():
    """λ = 0 too: NLMS."""
    params, x, y = problem(1, 5, 2, bias=True)
    for solver, damping in (("dual", 0.0), ("dual", 1e-2), ("primal", 1e-2)):
        tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=0.0)
        _, _, updates, state = first_step(tx, squared_error, params, x, y, solver=solver)
        rows = np.append(np.asarray(x, np.float64)[0], 1.0)
        error = rows @ joined(params) - np.asarray(y)[0]
        assert_close(joined(updates), np.outer(rows, error) / (rows @ rows + damping))
        assert state.fallbacks.sum() == 0


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_layer_never_reached(solver):
    """By the loss, and by the branch that was taken: neither moves, nor counts."""
    params = {"branch": jnp.ones((3, 2)), "used": jnp.ones((3, 2)), "unused": jnp.ones((3, 2))}

    def loss(params, x):
        z = jax.lax.cond(x.sum() > 1e9, lambda: x @ params["branch"], lambda: x @ params["used"])
        return jnp.mean(z**2)

    x = problem(7, 3, 2)[1]
    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    _, _, updates, state = first_step(tx, loss, params, x, solver=solver)
    assert not updates["branch"].any() and not updates["unused"].any()
    assert np.isfinite(updates["used"]).all() and updates["used"].any()
    assert state.fallbacks.tolist() == [0, 0, 0]


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_dead_layer(solver):
    """No unit of the lower layer is ever on: it stays, and the upper one learns its bias."""
    rng = np.random.default_rng(0)
    params, x, y = problem(8, 3, 2, bias=True)
    params = {"top": params, "w": jnp.asarray(rng.normal(size=(3, 3))), "b": jnp.full(3, -1e3)}

    def loss(params, x, y):
        return squared_error(params["top"], jax.nn.relu(x @ params["w"] + params["b"]), y)

    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    _, _, updates, state = first_step(tx, loss, params, x, y, solver=solver)
    assert not updates["w"].any() and not updates["b"].any() and not updates["top"]["w"].any()
    want = 8 * np.mean(exactly(params["top"]["b"] - y), 0) / (8 + 1e-2)
    assert_close(updates["top"]["b"], want)
    assert state.fallbacks.sum() == 0


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_float16_cannot_hold_the_update(solver):
    """U is finite in float32: what float16 cannot hold of it becomes zero, and is counted."""
    params, x, y = problem(3, 5, 2)
    y = y.at[:, 0].set(60.0)
    args = jax.tree.map(lambda a: a.astype(jnp.float16), (params, x * 2e-4, y))
    tx = cqjax.scale_by_consequentialism(damping=1e-9, relative_damping=0.0)
    _, _, updates, state = first_step(tx, squared_error, *args, solver=solver)
    want = expected(*exactly(args), 1e-9)["w"]
    lost = np.abs(want) > 65504
    assert lost.any() and not lost.all() and updates["w"].dtype == jnp.float16
    assert np.array_equal(lost, np.asarray(updates["w"]) == 0)
    assert np.isfinite(updates["w"]).all() and state.fallbacks.tolist() == [1]
