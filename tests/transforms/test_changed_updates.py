"""Updates that are no longer the gradient, and solves that fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_layer import (
    CHANGES,
    assert_close,
    direction,
    expected,
    first_step,
    problem,
    squared_error,
)

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("change", CHANGES)
def test_updates_that_are_no_longer_the_gradient(change, solver, bias):
    args = problem(4, 7, 2, bias=bias)
    incoming = jax.tree.map(np.asarray, CHANGES[change](jax.grad(squared_error)(*args)))
    updates, _ = direction(*args, 1e-2, solver, CHANGES[change])
    assert_close(updates, expected(*args, 1e-2, incoming), 1e-6)


@pytest.mark.parametrize("changed", [False, True])
def test_gradient_and_update_jitted_apart(changed):
    """Nothing tells at trace time whether the updates are the gradient: a comparison does."""
    args = problem(4, 7, 2, bias=True)
    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    _, grads, captures = jax.jit(cqjax.value_and_grad(squared_error))(*args)
    change = CHANGES["decayed"] if changed else lambda g: g
    update = jax.jit(lambda g, s, c: tx.update(change(g), s, captures=c))
    updates, _ = update(grads, tx.init(args[0]), captures)
    incoming = jax.tree.map(np.asarray, change(grads))
    assert_close(updates, expected(*args, 1e-2, incoming))
    if not changed:
        decayed, _ = update(CHANGES["decayed"](grads), tx.init(args[0]), captures)
        assert_close(decayed, expected(*args, 1e-2, CHANGES["decayed"](grads)))


def test_float32_keeps_a_clipped_gradient_exact():
    """Scaling leaves no remainder that 1/λ could blow up."""
    with jax.enable_x64(False):
        params, x, y = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float32), problem(16, 200, 10, seed=3)
        )
        updates, _ = direction(params, x, y, 1e-6)
        clipped, _ = direction(
            params, x, y, 1e-6, change=lambda g: jax.tree.map(lambda a: 0.3 * a, g)
        )
        np.testing.assert_allclose(clipped["w"], 0.3 * updates["w"], rtol=1e-4, atol=1e-6)


def test_a_loss_term_on_the_weights_is_part_of_the_update():
    params, x, y = problem(4, 7, 2)

    def loss(params, x, y):
        return squared_error(params, x, y) + 0.05 * jnp.sum(params["w"] ** 2)

    incoming = jax.tree.map(np.asarray, jax.grad(loss)(params, x, y))
    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    for solver in ("dual", "primal"):
        _, _, updates, _ = first_step(tx, loss, params, x, y, solver=solver)
        assert_close(updates, expected(params, x, y, 1e-2, incoming))


def test_entries_outside_every_site_keep_their_gradient():
    """Of a kernel used in slices, and elsewhere, each part gets what is due to it."""
    rng = np.random.default_rng(0)
    params, x = {"w": jnp.asarray(rng.normal(size=(4, 6)))}, jnp.asarray(rng.normal(size=(3, 4)))

    def loss(params, x):
        left, middle = params["w"][:, :2], params["w"][:, 2:4]
        return (
            jnp.mean(jnp.sum((x @ left) ** 2, -1))
            + jnp.mean(jnp.sum(jnp.tanh(x @ middle), -1))
            + jnp.sum(params["w"][:, 4:] ** 3)
        )

    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    grads, captures, updates, _ = first_step(tx, loss, params, x)
    assert len(captures["w"]) == 2
    a = np.asarray(x)
    u = 3 * np.linalg.solve(a.T @ a + 1e-2 * np.eye(4), np.asarray(grads["w"])[:, :4])
    np.testing.assert_allclose(updates["w"][:, :4], u, rtol=1e-6)
    np.testing.assert_array_equal(updates["w"][:, 4:], grads["w"][:, 4:])


def test_a_singular_system_is_repaired():
    """Equal rows and λ = 0: the second attempt's damping is 1e-2 of the mean eigenvalue."""
    params, x, y = problem(1, 5, 2)
    x, y = jnp.repeat(x, 3, 0) * 2.0, jnp.repeat(y, 3, 0)
    updates, state = direction(params, x, y, 0.0, "dual")
    scale = float(jnp.sum(x**2)) / 3
    assert state.fallbacks.sum() == 1
    assert_close(updates, expected(params, x, y, 1e-2 * scale))


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_activations_leave_finite_updates(bad, solver):
    params, x, y = problem(3, 5, 2, bias=True)
    updates, state = direction(params, x.at[1, 2].set(bad), y, 1e-3, solver)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert state.fallbacks.sum() == 1


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_layer_that_fails_does_not_touch_the_others(solver):
    good, bad = problem(3, 5, 2), problem(3, 5, 2, seed=1)

    def loss(params, a, b, y):
        return squared_error(params[0], a, y) + squared_error(params[1], b, y)

    x = bad[1].at[0, 0].set(np.inf)
    tx, params = (
        cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0),
        [good[0], bad[0]],
    )
    _, _, updates, state = first_step(tx, loss, params, good[1], x, good[2], solver=solver)
    assert_close(updates[0], expected(*good, 1e-2))
    assert np.isfinite(updates[1]["w"]).all() and state.fallbacks.sum() == 1


def test_a_zero_batch_gives_a_zero_update():
    params, x, y = problem(3, 5, 2)
    updates, _ = direction(params, jnp.zeros_like(x), y, 0.0)
    np.testing.assert_array_equal(updates["w"], 0)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_no_damping_and_a_changed_update(solver):
    """Outside the span of the rows there is no solution: a counted repair, not infinity."""
    params, x, y = problem(3, 5, 2)
    updates, state = direction(params, x, y, 0.0, "dual", CHANGES["decayed"])
    assert state.fallbacks.sum() == 1
    scale = float((np.linalg.svd(np.asarray(x), compute_uv=False) ** 2).mean())
    incoming = jax.tree.map(np.asarray, CHANGES["decayed"](jax.grad(squared_error)(params, x, y)))
    assert_close(updates, expected(params, x, y, 1e-2 * scale, incoming))


def test_an_update_that_is_not_finite_by_rows():
    """It cannot be told what was done to the gradient: the layer keeps what is finite."""
    params, x, y = problem(3, 5, 2, bias=True)
    updates, state = direction(params, x, y, 0.1, "dual", spoiled)
    assert state.fallbacks.sum() == 1
    grads = jax.grad(squared_error)(params, x, y)
    np.testing.assert_allclose(updates["b"], grads["b"], rtol=1e-9)
    np.testing.assert_allclose(updates["w"], grads["w"].at[0, 0].set(0), rtol=1e-9)


def test_an_update_that_is_not_finite_by_features():
    """Only the output that it is of does not learn."""
    params, x, y = problem(3, 5, 2, bias=True)
    updates, state = direction(params, x, y, 0.1, "primal", spoiled)
    assert state.fallbacks.sum() == 1
    want = expected(params, x, y, 0.1)
    for name, u in updates.items():
        np.testing.assert_array_equal(u[..., 0], 0)
        np.testing.assert_allclose(u[..., 1], want[name][..., 1], rtol=1e-9)


def spoiled(grads):
    return grads | {"w": grads["w"].at[0, 0].set(jnp.nan)}


def test_a_rest_in_the_weight_alone_reaches_the_bias():
    """What was added to W's gradient only changes b too: they are solved for together."""
    args = problem(4, 7, 2, bias=True)

    def change(grads):
        added = jnp.cos(jnp.arange(14.0)).reshape(7, 2)
        added -= jnp.vdot(added, grads["w"]) / jnp.vdot(grads["w"], grads["w"]) * grads["w"]
        return grads | {"w": grads["w"] + added}

    incoming = jax.tree.map(np.asarray, change(jax.grad(squared_error)(*args)))
    updates, _ = direction(*args, 1e-2, "dual", change)
    assert_close(updates, expected(*args, 1e-2, incoming))
