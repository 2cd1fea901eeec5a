"""Optax's wrappers around ours: what each combination means, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly
from two_layers import (
    DAMPING,
    assert_close,
    by_hand,
    direction,
    gradient,
    loss_fn,
    problem,
    train,
)

import cqjax

pytestmark = pytest.mark.usefixtures("float64")

RATE = 0.1


def ours():
    return cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None)


def descend(params, update, rate=RATE):
    return jax.tree.map(lambda p, u: p - rate * np.asarray(u), params, update)


def alone(layer, params, batch):
    """The solves for one layer's weight without its bias."""
    grads, rows = gradient(params, *batch)
    x = rows[layer][:, :-1]
    xx = x.T @ x + DAMPING * np.eye(x.shape[1])
    return len(x) * np.linalg.solve(xx, grads[layer]["w"])


@pytest.mark.parametrize("rows", [3, 12], ids=["dual", "primal"])
def test_masked(rows):
    """What is masked passes through; a masked bias is no coordinate of its weight."""
    params, (batch,) = problem((rows,))
    mask = {"a": {"w": True, "b": False}, "c": False, "gain": True}
    tx = optax.masked(cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0), mask)
    (got,), _ = train(optax.chain(tx, optax.sgd(RATE)), params, [batch])
    grads, _ = gradient(params, *batch)
    grads["a"]["w"] = alone("a", params, batch)
    assert_close(got, descend(params, grads))


def test_partition():
    """The pseudoinverse on kernels, Adam on the rest."""
    params, batches = problem()
    kernels = jax.tree.map_with_path(
        lambda keys, _: "ours" if keys[-1].key == "w" else "adam", params
    )
    tx = optax.partition({"ours": ours(), "adam": optax.adam(0.01)}, kernels)
    visited, _ = train(tx, params, batches)
    rest = optax.adam(0.01)
    state = rest.init(params)
    for got, batch in zip(visited, batches, strict=True):
        updates, state = rest.update(gradient(params, *batch)[0], state, params)
        for layer in ("a", "c"):
            updates[layer]["w"] = -RATE * alone(layer, params, batch)
        params = optax.apply_updates(params, updates)
        assert_close(got, params)


def test_injected_schedules():
    """Damping and rate are what their schedules say, and are in the state."""
    params, batches = problem()
    damping, rate = optax.linear_schedule(1.0, 0.2, 2), optax.exponential_decay(0.2, 1, 0.5)
    tx = optax.inject_hyperparams(cqjax.csgd)(
        rate, damping=damping, relative_damping=0.0, max_change=None
    )
    got, state = train(tx, params, batches)
    np.testing.assert_allclose(state.hyperparams["damping"], 0.2)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.05)
    assert_close(got, by_hand(optax.sgd(rate), params, batches, damping))


def test_schedules_without_injection():
    params, batches = problem()
    damping, rate = optax.linear_schedule(1.0, 0.2, 2), optax.exponential_decay(0.2, 1, 0.5)
    got, _ = train(
        cqjax.csgd(rate, damping=damping, relative_damping=0.0, max_change=None), params, batches
    )
    assert_close(got, by_hand(optax.sgd(rate), params, batches, damping))


def test_apply_if_finite():
    """A batch with a NaN never happened, neither for the parameters nor for our state."""
    params, batches = problem()
    bad = (batches[0][0].at[0, 0].set(jnp.nan), batches[0][1])
    tx = optax.apply_if_finite(
        cqjax.csgd(
            RATE, damping=optax.linear_schedule(1.0, 0.2, 2), relative_damping=0.0, max_change=None
        ),
        2,
    )
    got, state = train(tx, params, [bad, batches[0], bad, *batches[1:]])
    assert_close(got[0], params)
    assert_close(got[2], got[1])
    damping = optax.linear_schedule(1.0, 0.2, 2)
    assert_close([got[i] for i in (1, 3, 4)], by_hand(optax.sgd(RATE), params, batches, damping))
    assert state.total_notfinite == 2
    first = state.inner_state[0]
    assert first.count == 3 and jnp.sum(first.fallbacks) == 0


@pytest.mark.parametrize("wrapper", ["conditionally_transform", "conditionally_mask"])
def test_every_second_step(wrapper):
    """Between them, the gradient itself, or nothing."""
    params, batches = problem()
    wrap = getattr(optax, wrapper)
    first = wrap(
        cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0),
        lambda step: step % 2 == 0,
    )
    visited, state = train(optax.chain(first, optax.sgd(RATE)), params, batches)
    for t, (got, batch) in enumerate(zip(visited, batches, strict=True)):
        update = direction(params, batch)
        if t % 2:
            grads, _ = gradient(params, *batch)
            update = grads if wrapper == "conditionally_transform" else descend(grads, grads, 1.0)
        assert_close(got, descend(params, update))
        params = got
    assert state[0].inner_state.count == 2


@pytest.mark.parametrize("reset", [False, True])
def test_lookahead(reset):
    """Gradients and captures are of the fast parameters; the slow ones follow half-way."""
    params, batches = problem((6, 6, 6, 6))

    def wrapped(**extra_args):
        inner = cqjax.bind_extra_args(
            cqjax.cmomentum(
                RATE, momentum=0.9, damping=DAMPING, relative_damping=0.0, max_change=None
            ),
            **extra_args,
        )
        return optax.lookahead(inner, 2, 0.5, reset_state=reset)

    @quickly
    def step(pair, state, x, y):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(pair.fast, x, y)
        updates, state = wrapped(captures=captures).update(grads, state, pair)
        return optax.apply_updates(pair, updates), state

    pair = optax.LookaheadParams.init_synced(params)
    state, rule, slow = wrapped().init(pair), optax.sgd(RATE, 0.9), params
    trace = rule.init(params)
    for t, batch in enumerate(batches):
        pair, state = step(pair, state, *batch)
        updates, trace = rule.update(direction(params, batch), trace, params)
        params = optax.apply_updates(params, updates)
        if t % 2:
            slow = params = jax.tree.map(lambda s, p: s + 0.5 * (p - s), slow, params)
            trace = rule.init(params) if reset else trace
        assert_close(pair, optax.LookaheadParams(params, slow))


def ascended(params, tree):
    """ρ = 0.05 along the tree."""
    size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda p, g: p + 0.05 * g / size, params, tree)


def test_sam_by_two_gradients():
    """The captures are those of the second gradient, at the ascended parameters."""
    params, (batch,) = problem((6,))
    tx = ours()

    @quickly
    def step(params, state, x, y):
        ascent = jax.grad(loss_fn)(params, x, y)
        size = optax.tree.norm(ascent)
        above = jax.tree.map(lambda p, g: p + 0.05 * g / size, params, ascent)
        _, grads, captures = cqjax.value_and_grad(loss_fn)(above, x, y)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    got, _ = step(params, tx.init(params), *batch)
    above = ascended(params, gradient(params, *batch)[0])
    assert_close(got, descend(params, direction(above, batch)))


def test_sam():
    """By turns along the gradient, up, and by ours with the captures from there, down."""
    params, batches = problem((6, 6, 6, 6))
    up = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))

    def wrapped(**extra_args):
        return optax.contrib.sam(cqjax.bind_extra_args(ours(), **extra_args), up)

    @quickly
    def step(params, state, x, y):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
        updates, state = wrapped(captures=captures).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    got, state, above = params, wrapped().init(params), params
    for t, batch in enumerate(batches):
        got, state = step(got, state, *batch)
        if t % 2:
            params = descend(params, direction(above, batch))
            assert_close(got, params)
        else:
            above = ascended(params, gradient(params, *batch)[0])
            assert_close(got, above)
    assert state.opt_state[0].count == 2


def test_schedule_free():
    """Gradient and captures at y; z takes our steps, x is their mean, of equal weights here."""
    params, batches = problem()
    tx = optax.contrib.schedule_free(ours(), RATE, b1=0.8)
    visited, state = train(tx, params, batches)
    x = y = z = params
    for t, (got, batch) in enumerate(zip(visited, batches, strict=True), 1):
        z = descend(z, direction(y, batch))
        x = jax.tree.map(lambda x, z, t=t: x + (z - x) / t, x, z)
        y = jax.tree.map(lambda x, z: 0.8 * x + 0.2 * z, x, z)
        assert_close(got, y)
    assert_close(optax.contrib.schedule_free_eval_params(state, visited[-1]), x)
