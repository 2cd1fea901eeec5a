"""Two faults of a small absolute λ that the default, a relative one, does not have."""

import jax.numpy as jnp
import numpy as np
import pytest
from linear_layer import first_step, squared_error

import cqjax
from cqjax.linalg.ridge import REPAIR_DAMPING


def reference(rows, errors, rank, damping=0.0, relative_damping=0.1):
    """N (XᵀX + λI)⁻¹ XᵀZ̄ of a mean over the rows, in float64."""
    xx = rows.T @ rows
    strength = damping + relative_damping * np.trace(xx) / rank
    return np.linalg.solve(xx + strength * np.eye(len(xx)), rows.T @ errors)


def update_of(loss, params, *args, solver, **options):
    tx = cqjax.scale_by_consequentialism(**options)
    return np.asarray(first_step(tx, loss, params, *args, solver=solver)[2]["w"], np.float64)


def normalised(x):
    x = x - x.mean(-1, keepdims=True)
    return x / ((x * x).mean(-1, keepdims=True) + 1e-6) ** 0.5


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_rows_of_mean_zero_that_were_rounded_to_16_bits(solver):
    """Behind a layer normalisation no row has a part along (1, …, 1), but for its rounding.

    At λ = 1e-3 the primal's update was 9 times too long, all of it there.
    """
    n, d, o = 256, 64, 8
    rng = np.random.default_rng(0)
    x, w, y = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((n, d), (d, o), (n, o)))

    def loss(params, x, y):
        return squared_error({"w": params["w"]}, normalised(x), y)

    got = update_of(loss, {"w": w}, x, y, solver=solver)
    x, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
    rows = normalised(x)
    want = reference(rows, rows @ w - y, d)
    np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(want), rtol=0.03)
    null = np.linalg.norm(got.mean(0)) * d**0.5  # along (1, …, 1)
    assert null < 0.03 * np.linalg.norm(want)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_equal_rows(solver):
    """As rows of padding are: XᵀX has one eigenvalue that is not zero, of 128.

    At λ = 1e-3 the dual's outputs moved twice as far as they should.
    """
    n = d = 128
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.tile(rng.normal(size=d), (n, 1)), jnp.float32)
    w, y = (jnp.asarray(rng.normal(size=(d, 4)), jnp.float32) for _ in range(2))
    got = update_of(squared_error, {"w": w}, x, y, solver=solver)
    rows, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
    want = rows @ reference(rows, rows @ w - y, d)
    assert np.linalg.norm(rows @ got - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("damping", [1e-4, 1e-3, 1e-2])
def test_what_the_arithmetic_cannot_hold_is_raised_and_counted(solver, damping):
    """λ below 8 ε times the trace. The dual had an error of 12 % at 1e-2, of 1,000 % at 1e-3."""
    n = d = 128
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.tile(rng.normal(size=d), (n, 1)), jnp.float32)
    w, y = (jnp.asarray(rng.normal(size=(d, 4)), jnp.float32) for _ in range(2))
    assert damping < 8 * np.finfo(np.float32).eps * float(jnp.sum(x * x))
    tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=0.0)
    *_, got, state = first_step(tx, squared_error, {"w": w}, x, y, solver=solver)
    assert state.fallbacks.tolist() == [1]
    rows, w, y = (np.asarray(a, np.float64) for a in (x, w, y))
    want = reference(rows, rows @ w - y, d, damping, REPAIR_DAMPING)
    moved, wanted = rows @ np.asarray(got["w"], np.float64), rows @ want
    assert np.linalg.norm(moved - wanted) < 0.01 * np.linalg.norm(wanted)
