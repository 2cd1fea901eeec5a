"""The aliases are the chains that they say they are, and compose with Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly
from linear_layer import first_step

import cqjax

ALIASES = {
    "csgd": (cqjax.csgd(0.1, damping=0.02, relative_damping=0.0, max_change=None), optax.sgd(0.1)),
    "cmomentum": (
        cqjax.cmomentum(0.1, momentum=0.8, damping=0.02, relative_damping=0.0, max_change=None),
        optax.sgd(0.1, 0.8),
    ),
    "cnesterov": (
        cqjax.cnesterov(0.1, momentum=0.8, damping=0.02, relative_damping=0.0, max_change=None),
        optax.sgd(0.1, 0.8, nesterov=True),
    ),
    "crmsprop": (
        cqjax.crmsprop(
            0.1, decay=0.8, eps=1e-6, damping=0.02, relative_damping=0.0, max_change=None
        ),
        optax.rmsprop(0.1, 0.8, 1e-6),
    ),
    "cadam": (
        cqjax.cadam(
            0.1, b1=0.8, b2=0.9, eps=1e-6, damping=0.02, relative_damping=0.0, max_change=None
        ),
        optax.adam(0.1, 0.8, 0.9, 1e-6),
    ),
}


def loss_fn(params, x, y):
    return jnp.mean(jnp.sum((jnp.tanh(x @ params["a"]) @ params["c"] - y) ** 2, -1))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(5, 4)), "c": rng.normal(size=(4, 2)), "b": rng.normal(size=3)}
    x, y = rng.normal(size=(3, 5)), rng.normal(size=(3, 2))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x, y))


def run(tx, data, steps=3):
    params, x, y = data
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def by_hand(rule, data, steps=3):
    """Preconditions with NumPy in float64, then applies Optax's own rule."""
    params, x, y = data
    state = rule.init(params)
    gradient = jax.jit(jax.grad(loss_fn))
    for _ in range(steps):
        grads = gradient(params, x, y)
        inputs = {"a": x, "c": jnp.tanh(x @ params["a"])}
        for key, rows in inputs.items():
            a = np.asarray(rows, np.float64)
            xx = a.T @ a + 0.02 * np.eye(a.shape[1])
            grads[key] = jnp.asarray(3 * np.linalg.solve(xx, grads[key]), jnp.float32)
        updates, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", ALIASES)
def test_alias(name, data):
    ours, rule = ALIASES[name]
    assert_close(run(ours, data)[0], by_hand(rule, data))


def test_nlms(data):
    tx, scale = cqjax.nlms(0.1, 0.01), cqjax.scale_by_nlms(0.01)
    _, _, updates, _ = first_step(tx, loss_fn, *data, solver="dual")
    _, _, direction, _ = first_step(scale, loss_fn, *data, solver="dual")
    assert_close(updates, jax.tree.map(lambda u: -0.1 * u, direction))


def test_learning_rates_can_be_schedules(data):
    tx = cqjax.csgd(optax.linear_schedule(0.0, 0.1, 1))
    params, _ = run(tx, data, steps=1)
    assert_close(params, data[0])


@pytest.mark.parametrize("name", ["cadam", "cmomentum", "cnesterov", "crmsprop"])
def test_at_a_rate_that_is_not_finite_nothing_moves(name, data):
    """The limit on what a step does makes it zero."""
    tx = getattr(cqjax, name)(lambda count: 0.1 / count)
    params, _ = run(tx, data, steps=1)
    assert_close(params, data[0])


def test_masked_parameters_are_left_alone(data):
    mask = {"a": True, "b": False, "c": False}
    tx = optax.masked(cqjax.scale_by_consequentialism(damping=0.02, relative_damping=0.0), mask)
    grads, _, updates, _ = first_step(tx, loss_fn, *data)
    _, _, whole, _ = first_step(
        cqjax.scale_by_consequentialism(damping=0.02, relative_damping=0.0), loss_fn, *data
    )
    np.testing.assert_allclose(updates["a"], whole["a"], rtol=1e-5)
    np.testing.assert_array_equal(updates["c"], grads["c"])


def test_a_masked_bias_is_no_coordinate():
    """A bias that another transformation updates is not solved for with its weight."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 2))), "b": jnp.zeros(2)}
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)

    def loss(params, x):
        return jnp.mean(jnp.sum((x @ params["w"] + params["b"]) ** 2, -1))

    tx = optax.partition(
        {
            "ours": cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0),
            "plain": optax.identity(),
        },
        {"w": "ours", "b": "plain"},
    )
    for solver in ("dual", "primal"):
        grads, _, updates, _ = first_step(tx, loss, params, x, solver=solver)
        want = 3 * np.linalg.solve(x.T @ x + 0.1 * np.eye(4), grads["w"])
        np.testing.assert_allclose(updates["w"], want, rtol=1e-4)
        np.testing.assert_array_equal(updates["b"], grads["b"])


def test_inject_hyperparams(data):
    tx = optax.inject_hyperparams(cqjax.csgd)(
        0.1, damping=0.02, relative_damping=0.0, max_change=None
    )
    params, state = run(tx, data)
    assert_close(
        params, run(cqjax.csgd(0.1, damping=0.02, relative_damping=0.0, max_change=None), data)[0]
    )
    assert state.hyperparams["damping"] == np.float32(0.02)


def test_apply_if_finite_and_gradient_clipping(data):
    plain = run(cqjax.csgd(0.1, damping=0.02, relative_damping=0.0, max_change=None), data)[0]
    guarded = optax.apply_if_finite(
        cqjax.csgd(0.1, damping=0.02, relative_damping=0.0, max_change=None), 3
    )
    assert_close(run(guarded, data)[0], plain)
    unclipped = optax.chain(
        optax.clip_by_global_norm(1e9),
        cqjax.csgd(0.1, damping=0.02, relative_damping=0.0, max_change=None),
    )
    assert_close(run(unclipped, data)[0], plain)
    after = optax.chain(
        cqjax.scale_by_consequentialism(damping=0.02, relative_damping=0.0),
        optax.clip(0.01),
        optax.sgd(1.0),
    )
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), run(after, data, 1)[0], data[0])
    assert max(jax.tree.leaves(moved)) <= 0.0101


def test_unknown_extra_arguments_are_ignored(data):
    params, x, y = data
    _, grads, captures = jax.jit(cqjax.value_and_grad(loss_fn, solver="dual"))(params, x, y)
    for tx in (cqjax.scale_by_consequentialism(), cqjax.scale_by_nlms()):
        jax.jit(tx.update)(grads, tx.init(params), params, captures=captures, value=1.0)


def test_state_does_not_change_its_structure(data):
    tx = cqjax.cadam(0.1)
    state, after = tx.init(data[0]), first_step(tx, loss_fn, *data)[-1]
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


# What the aliases pass on, against the chains that they are documented as.

SOLVE = {"damping": 0.02, "relative_damping": 0.05}
DECAYING = {"weight_decay": 0.3, "mask": {"a": True, "c": False, "gain": True}}
RULES = {  # options, Optax's rule, and the rate at which an update acts in the end
    "csgd": ({}, optax.identity(), 0.1),
    "cmomentum": ({"momentum": 0.8}, optax.trace(0.8), 0.5),
    "cnesterov": ({"momentum": 0.8}, optax.trace(0.8, nesterov=True), 0.5),
    "crmsprop": ({"decay": 0.8, "eps": 1e-3}, optax.scale_by_rms(0.8, 1e-3), None),
    "cadam": ({"b1": 0.8, "b2": 0.9, "eps": 1e-3}, optax.scale_by_adam(0.8, 0.9, 1e-3), None),
}


def gained(params, x, y):
    hidden = jnp.tanh(x @ params["a"]) * params["gain"]
    return jnp.mean(jnp.sum((hidden @ params["c"] - y) ** 2, -1))


@pytest.fixture(scope="module")
def many(data):
    """With a gain, and enough rows to keep an inverse of."""
    params, x, y = data
    tile = np.random.default_rng(1).normal(size=(12, 1))
    x, y = (jnp.asarray(np.concatenate([t * a for t in tile]), jnp.float32) for a in (x, y))
    return {"a": params["a"], "c": params["c"], "gain": jnp.ones(4)}, x, y


def train(tx, data, steps=4):
    params, *batch = data

    def step(carry, _):
        params, state = carry
        _, grads, captures = cqjax.value_and_grad(gained)(params, *batch)
        updates, state = tx.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), None

    return quickly(lambda c: jax.lax.scan(step, c, length=steps)[0])((params, tx.init(params)))


def documented(name, solve, max_change=0.03, rates=None):
    """The solve, the rule, what decays, the rate, and the limits before the rule and at the end."""
    _, rule, acting = RULES[name]
    before, after = (max_change, 1.5 * max_change) if acting else (20 * max_change, max_change)
    before = [cqjax.clip_by_output_change(before, learning_rate=acting or 1.0)]
    after = [] if name == "csgd" else [cqjax.clip_by_output_change(after)]
    decay = optax.masked(optax.add_decayed_weights(0.3), DECAYING["mask"])
    return optax.chain(solve, *before, rule, decay, rates or optax.scale(-0.1), *after)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_documented_chain(name, kept, many):
    """A rule with a memory has a bound before it and one at the end; decay is not solved for."""
    plan = cqjax.plan(gained)(*many)
    more = {"plan": plan, "update_every": 2, "ema_decay": 0.5} if kept else {}
    given, *_ = RULES[name]
    ours = getattr(cqjax, name)(0.1, **given, **SOLVE, **DECAYING, **more, max_change=0.03)
    chain = documented(name, cqjax.scale_by_consequentialism(**SOLVE, **more))
    got, state = train(ours, many)
    want, expected = train(chain, many)
    assert_close(got, want)
    limits = [s for s in state if hasattr(s, "clipped")]
    assert len(limits) == 1 + (name != "csgd") and limits[0].clipped.sum() > 0
    assert bool(state[0].inverses) == bool(state[0].moments) == kept
    assert_close(state[0], expected[0])


@pytest.mark.parametrize("uncovered", [0.02, optax.linear_schedule(0.02, 0.0, 3)])
def test_another_rate_for_what_is_not_covered(uncovered, many):
    ours = cqjax.cadam(0.1, uncovered_learning_rate=uncovered, max_change=None)
    rates = {"covered": optax.scale(-0.1), "rest": optax.scale_by_learning_rate(uncovered)}
    labels = {"a": "covered", "c": "covered", "gain": "rest"}
    solve, rule = cqjax.scale_by_consequentialism(), optax.scale_by_adam()
    chain = optax.chain(solve, rule, optax.partition(rates, labels))
    got, want = train(ours, many)[0], train(chain, many)[0]
    assert_close(got, want)
    assert not np.allclose(got["gain"], train(cqjax.cadam(0.1, max_change=None), many)[0]["gain"])


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (cqjax.cadam(), cqjax.cadam(1e-2, max_change=0.5, relative_damping=0.1, damping=0.0)),
        (cqjax.csgd(0.1), cqjax.csgd(0.1, max_change=0.1, relative_damping=0.1, damping=0.0)),
        (cqjax.cnesterov(0.1), cqjax.cnesterov(0.1, max_change=0.1, relative_damping=0.1)),
        (cqjax.crmsprop(0.1), cqjax.crmsprop(0.1, max_change=0.5, relative_damping=0.1)),
    ],
)
def test_defaults(short, full, many):
    for a, b in zip(*(jax.tree.leaves(train(tx, many)) for tx in (short, full)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rate_that_is_a_schedule_bounds_too(many):
    """The bound has the schedule's rate at each step, over 1 - β."""
    schedule = optax.linear_schedule(0.1, 0.4, 3)
    ours = cqjax.cmomentum(schedule, momentum=0.8, max_change=0.03)
    chain = optax.chain(
        cqjax.scale_by_consequentialism(),
        cqjax.clip_by_output_change(0.03, learning_rate=lambda n: schedule(n) / 0.2),
        optax.trace(0.8),
        optax.scale_by_learning_rate(schedule),
        cqjax.clip_by_output_change(0.045),
    )
    assert_close(train(ours, many)[0], train(chain, many)[0])


@pytest.mark.parametrize("name", RULES)
def test_nothing_but_the_rate_has_a_place(name):
    with pytest.raises(TypeError, match="positional argument"):
        getattr(cqjax, name)(0.1, 0.9)
    with pytest.raises(TypeError, match="positional argument"):
        cqjax.scale_by_consequentialism(*[1e-3])


@pytest.mark.parametrize("alias", [cqjax.cmomentum, cqjax.cnesterov])
def test_endless_momentum_is_refused(alias):
    with pytest.raises(ValueError, match=r"momentum=1.0: expected less than 1"):
        alias(0.1, momentum=1.0)
    alias(0.1, momentum=1.0, max_change=None)
