"""Members of a chain before and after ours: what each combination means, written out by hand."""

import math

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
RULE = optax.sgd(RATE, momentum=0.9)


def ours():
    return cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def scaled_to(limit, tree):
    return jax.tree.map(lambda leaf: leaf * min(1, limit / norm(tree)), tree)


def clipped_to(limit, tree):
    return jax.tree.map(lambda leaf: np.clip(leaf, -limit, limit), tree)


def decayed(tree, params):
    return jax.tree.map(lambda leaf, p: leaf + 0.2 * np.asarray(p), tree, params)


MEMBERS = {
    "clip_by_global_norm": (optax.clip_by_global_norm(0.5), lambda u, p: scaled_to(0.5, u)),
    "clip": (optax.clip(0.05), lambda u, p: clipped_to(0.05, u)),
    "add_decayed_weights": (optax.add_decayed_weights(0.2), decayed),
}


@pytest.mark.parametrize("rows", [3, 12], ids=["dual", "primal"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", MEMBERS)
def test_before_it_is_preconditioned_and_after_it_is_not(name, before, rows):
    member, change = MEMBERS[name]
    params, (batch,) = problem((rows,))
    if before:
        tx = optax.chain(member, ours(), optax.sgd(RATE))
        want = direction(params, batch, change=lambda grads: change(grads, params))
    else:
        tx = optax.chain(ours(), member, optax.sgd(RATE))
        want = change(direction(params, batch), params)
    assert norm(jax.tree.map(np.subtract, want, direction(params, batch))) > 0.01
    (got,), _ = train(tx, params, [batch])
    assert_close(got, jax.tree.map(lambda p, u: p - RATE * u, params, want))


def test_a_gradient_clipped_by_its_norm_gives_a_shorter_step_of_the_same_direction():
    params, (batch,) = problem((6,))
    grads, _ = gradient(params, *batch)
    tx = optax.chain(optax.clip_by_global_norm(0.5), ours(), optax.sgd(RATE))
    (got,), _ = train(tx, params, [batch])
    shorter = RATE * 0.5 / norm(grads)
    want = jax.tree.map(lambda p, u: p - shorter * u, params, direction(params, batch))
    assert_close(got, want)


def test_decay_before_grows_outside_the_span():
    """By N/λ, where the decay after is what it is."""
    params, (batch,) = problem((3,))
    _, rows = gradient(params, *batch)
    span = rows["a"].T @ np.linalg.pinv(rows["a"].T)
    weights = np.concatenate([params["a"]["w"], params["a"]["b"][None]])

    def outside(*members):
        (new,), _ = train(optax.chain(*members, optax.scale(-1.0)), params, [batch])
        moved = np.concatenate([new["a"]["w"], new["a"]["b"][None]]) - weights
        return moved - span @ moved

    rest = weights - span @ weights
    decay = optax.add_decayed_weights(0.2)
    np.testing.assert_allclose(outside(ours(), decay), -0.2 * rest, atol=1e-12)
    grown = -0.2 * 3 / DAMPING * rest
    np.testing.assert_allclose(outside(decay, ours()), grown, atol=1e-12)


@pytest.mark.parametrize("chain", ["chain", "named_chain"])
def test_chain(chain):
    params, batches = problem()
    tx = optax.chain(ours(), RULE)
    if chain == "named_chain":
        tx = optax.named_chain(("ours", ours()), ("rule", RULE))
    got, state = train(tx, params, batches)
    assert_close(got, by_hand(RULE, params, batches))
    if chain == "named_chain":
        assert state["ours"].count == 3


def test_average_of_parameters():
    params, batches = problem()
    average = params
    for new in train(optax.chain(ours(), RULE), params, batches)[0]:
        average = optax.incremental_update(new, average, step_size=0.25)
    want = params
    for new in by_hand(RULE, params, batches):
        want = jax.tree.map(lambda a, p: 0.75 * np.asarray(a) + 0.25 * np.asarray(p), want, new)
    assert_close(average, want)


def test_a_backtracking_line_search_chooses_the_rate():
    """By Armijo's condition, with the slope ⟨G, U⟩ > 0 of the true gradient."""
    params, batches = problem()
    search = optax.scale_by_backtracking_linesearch(
        20, slope_rtol=0.3, decrease_factor=0.5, increase_factor=math.inf, max_learning_rate=8.0
    )
    visited, state = train(optax.chain(ours(), optax.scale(-1.0), search), params, batches)
    rates = []
    for got, batch in zip(visited, batches, strict=True):
        grads, _ = gradient(params, *batch)
        u = direction(params, batch)
        slope = sum(
            np.vdot(a, b) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(u), strict=True)
        )
        rate = 8.0
        while True:
            moved = jax.tree.map(lambda p, d, rate=rate: p - rate * d, params, u)
            if loss_fn(moved, *batch) <= loss_fn(params, *batch) - 0.3 * rate * slope:
                break
            rate /= 2
        rates.append(rate)
        assert_close(got, moved)
        params = got
    assert slope > 0 and len(set(rates)) > 1 and max(rates) < 8


def test_a_zoom_line_search():
    params, batches = problem((6,))
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=15)
    tail = optax.chain(optax.scale(-1.0), search)
    (got,), _ = train(optax.chain(ours(), tail), params, batches)
    x, y = batches[0]

    @quickly
    def by_optax(update):
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        extra = {"value": value, "grad": grads, "value_fn": lambda p: loss_fn(p, x, y)}
        updates, _ = tail.update(update, tail.init(params), params, **extra)
        return optax.apply_updates(params, updates)

    assert_close(got, by_optax(jax.tree.map(jnp.asarray, direction(params, batches[0]))))
    assert loss_fn(got, x, y) < loss_fn(params, x, y)
