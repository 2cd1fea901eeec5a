"""`scale_by_nlms` against the paper, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_layer import assert_close, direction, first_step, problem, squared_error

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_gives_nlms(bias):
    """Eq. 37, with ε = λ; and Eq. 36's rate in closed form."""
    params, x, y = problem(1, 6, 2, bias=bias)
    updates, _ = direction(params, x, y, 0.1)
    tx = cqjax.scale_by_nlms(0.1)
    grads, _, normalised, _ = first_step(tx, squared_error, params, x, y, solver="dual")
    norm = np.sum(np.square(x)) + bias
    assert_close(updates, normalised)
    assert_close(normalised, jax.tree.map(lambda g: np.asarray(g) / (norm + 0.1), grads))


@pytest.mark.parametrize("bias", [False, True])
def test_nlms_normalises_row_by_row(bias):
    """Eqs. 49 and 50, as a loop; the whole is not the consequentialism update."""
    params, x, y = problem(4, 6, 2, bias=bias)
    tx = cqjax.scale_by_nlms(0.01)
    _, _, updates, _ = first_step(tx, squared_error, params, x, y, solver="dual")
    rows = np.concatenate([x, np.ones((4, 1))], 1) if bias else np.asarray(x)
    errors = np.asarray(x @ params["w"] + params.get("b", 0.0) - y)
    u = sum(np.outer(r, e) / (r @ r + 0.01) for r, e in zip(rows, errors, strict=True))
    want = {"w": u[:6], "b": u[6]} if bias else {"w": u}
    assert_close(updates, want)


def test_nlms_keeps_what_came_before():
    params, x, y = problem(4, 6, 2)
    fn = jax.jit(cqjax.value_and_grad(squared_error, solver="dual"))
    _, grads, captures = fn(params, x, y)
    tx = cqjax.scale_by_nlms(0.01)
    update = functools.partial(jax.jit(tx.update), state=tx.init(params), captures=captures)
    plain, _ = update(grads)
    half, _ = update(jax.tree.map(lambda g: 0.5 * g, grads))
    np.testing.assert_allclose(half["w"], 0.5 * plain["w"], rtol=1e-9)
    orthogonal = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    overlap = jnp.vdot(orthogonal, grads["w"]) / jnp.vdot(grads["w"], grads["w"])
    orthogonal -= overlap * grads["w"]
    more, _ = update({"w": grads["w"] + orthogonal})
    np.testing.assert_allclose(more["w"], plain["w"] + orthogonal, rtol=1e-6)


def test_nlms_needs_rows():
    params, x, y = problem(9, 4, 2)
    with pytest.raises(ValueError, match='rows of w were not captured.*solver="dual"'):
        first_step(cqjax.scale_by_nlms(), squared_error, params, x, y, solver="primal")


def test_nlms_of_a_zero_row_without_eps():
    params, x, y = problem(3, 5, 2)
    args = params, x.at[1].set(0), y
    _, _, updates, _ = first_step(cqjax.scale_by_nlms(0.0), squared_error, *args, solver="dual")
    assert np.isfinite(updates["w"]).all() and np.any(updates["w"])


def test_a_rate_of_two_diverges_and_is_refused():
    with pytest.raises(ValueError, match=r"nlms: learning_rate=3.0: expected less than 2"):
        cqjax.nlms(3.0)


def test_rows_that_are_alike_act_like_a_higher_rate_and_the_bound_holds_them():
    """As the docstring says: eight equal rows, at 8 times the rate."""
    params, x, y = problem(8, 3, 2)
    x, y = (jnp.broadcast_to(a[:1], a.shape) for a in (x, y))

    def end(tx):
        def step(carry, _):
            params, state = carry
            value_and_grad = cqjax.value_and_grad(squared_error, capture=cqjax.Rows)
            loss, grads, captures = value_and_grad(params, x, y)
            updates, state = tx.update(grads, state, params, captures=captures)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), length=300)[1]

    free, bound = cqjax.nlms(1.0), optax.chain(cqjax.nlms(1.0), cqjax.clip_by_output_change())
    assert not jnp.isfinite(end(free)[-1])
    assert end(bound).max() < 10 * end(bound)[0]
