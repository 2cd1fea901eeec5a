"""Rows that all examples share: positions, queries that are parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax

N, T, D = 6, 4, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(N, T, D)), jnp.float32)
PARAMS = {
    "table": jnp.asarray(np.random.default_rng(1).normal(size=(T, D)), jnp.float32),
    "w": jnp.asarray(np.random.default_rng(2).normal(size=(D, D)), jnp.float32),
}
DAMPING = 1e-2


def looked_up_once(params, x):
    positions = params["table"][jnp.arange(T)]
    return jnp.mean(jnp.sum((x + positions @ params["w"]) ** 2, (1, 2)))


def shared(loss_fn, args=(PARAMS, X), **kwargs):
    """{path: whether all examples share its rows}."""
    captures = {}

    def record(*args):
        _, _, found = cqjax.value_and_grad(loss_fn, **kwargs)(*args)
        captures.update({path: found[path][0].block.shared for path in found})

    jax.eval_shape(record, *args)
    return captures


def updates(loss_fn, damping=DAMPING, **kwargs):
    @jax.jit
    def update(params, x):
        _, grads, captures = cqjax.value_and_grad(loss_fn, **kwargs)(params, x)
        tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=0.0)
        return tx.update(grads, tx.init(params), captures=captures)[0]

    return update(PARAMS, X)


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_updates_remove_the_mean_virtual_error(solver):
    got = updates(looked_up_once, solver=solver)
    x, table, w = (np.asarray(a, np.float64) for a in (X, PARAMS["table"], PARAMS["w"]))
    error = np.mean([2 * (x[i] + table @ w) for i in range(N)], 0)
    expected = table.T @ np.linalg.solve(table @ table.T + DAMPING * np.eye(T), error)
    np.testing.assert_allclose(got["w"], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got["table"], error @ w.T / (1 + DAMPING), rtol=1e-4, atol=1e-5)


def test_the_same_as_rows_of_each_examples_own():
    def looked_up_by_each(params, x):
        positions = params["table"][
            jnp.tile(jnp.arange(T), (len(x), 1)) + 0 * x[..., 0].astype(int)
        ]
        return jnp.mean(jnp.sum((x + positions @ params["w"]) ** 2, (1, 2)))

    once, each = updates(looked_up_once), updates(looked_up_by_each, N * DAMPING)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), once, each)


@pytest.mark.parametrize(
    ("kwargs", "loss_fn", "terms"),
    [
        ({}, looked_up_once, 1),
        ({"batch_size": N * T}, lambda p, x: looked_up_once(p, x) / T, T),
        ({"loss_reduction": "sum"}, lambda p, x: N * looked_up_once(p, x), 1 / N),
    ],
)
def test_updates_do_not_depend_on_how_the_loss_is_reduced(kwargs, loss_fn, terms):
    expected, got = updates(looked_up_once), updates(loss_fn, **kwargs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, got)
    _, _, captures = cqjax.value_and_grad(loss_fn, **kwargs)(PARAMS, X)
    block = captures["w"][0].block
    assert block.terms(captures.batch_size, captures.examples) == pytest.approx(terms)


def within_scan(params, x):
    def body(carry, _):
        return carry @ params["w"], None

    start = jnp.ones((T, D))
    once, _ = jax.lax.scan(body, start, length=2)
    return jnp.mean((x + once + params["table"]) ** 2)


def carried_by_scan(params, x):
    def body(carry, _):
        return carry @ params["w"] + x, None

    return jnp.mean(jax.lax.scan(body, jnp.zeros((N, T, D)), length=2)[0] ** 2)


def chosen_by_data(params, x):
    rows = jax.lax.cond(x[0, 0, 0] > 0, lambda: params["table"], lambda: 2 * params["table"])
    return jnp.mean((x + rows @ params["w"]) ** 2)


def through_custom_rule(params, x):
    @jax.custom_jvp
    def scaled(rows):
        return rows * x.mean()

    scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0] * x.mean()))
    return jnp.mean((scaled(jnp.ones((T, D))) @ params["w"] + params["table"]) ** 2)


def inputs(params, x):
    return jnp.mean((jax.jit(jax.checkpoint(lambda x: x @ params["w"]))(x) + params["table"]) ** 2)


def noise(params, x, key):
    rows = jax.random.normal(key, (T, D))
    return jnp.mean((x + rows @ params["w"] + params["table"]) ** 2)


def numbers(params, x):
    return jnp.mean((x + np.eye(T, D, dtype=np.float32) @ params["w"] + params["table"]) ** 2)


@pytest.mark.parametrize(
    ("loss_fn", "expected"),
    [
        (looked_up_once, True),
        (within_scan, True),
        (numbers, True),
        (carried_by_scan, False),
        (chosen_by_data, False),
        (through_custom_rule, False),
        (inputs, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_depends_on_data(loss_fn, expected):
    assert shared(loss_fn, batch_size=N)["w"] == expected


def test_random_keys_are_no_data():
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert shared(noise, (PARAMS, X, key))["w"]


def test_constants_may_be_the_batch_where_nothing_is_traced():
    x = np.asarray(X)
    for batch in (X, x):
        _, _, captures = cqjax.value_and_grad(inputs)(PARAMS, batch)
        assert not captures["w"][0].block.shared
        _, _, captures = cqjax.value_and_grad(looked_up_once)(PARAMS, batch)
        assert captures["w"][0].block.shared
    _, _, captures = cqjax.value_and_grad(lambda p: inputs(p, X), batch_size=N)(PARAMS)
    assert not captures["w"][0].block.shared and captures.examples == N


def test_plans_say_so():
    for x in (X, jax.ShapeDtypeStruct(X.shape, X.dtype)):
        plan = cqjax.plan(looked_up_once)(PARAMS, x)
        assert {p.path: p.notes for p in plan.parameters} == {
            "table": ("all examples share its rows",),
            "w": ("all examples share its rows",),
        }
        assert plan.examples == N


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        positions = nn.Embed(T, 8, name="positions")(jnp.arange(T))
        x = nn.Dense(8)(x) + positions
        return nn.Dense(1)(nn.tanh(nn.MultiHeadDotProductAttention(2)(x)).mean(1))


def test_a_learned_position_table_trains():
    model = Positions()
    params = model.init(jax.random.key(0), X)
    y = jnp.sin(X.sum((1, 2), keepdims=True)[..., 0])
    tx = cqjax.csgd(0.5, damping=1e-2, relative_damping=0.0, max_change=None)

    def loss_fn(params, x, y):
        return 0.5 * jnp.mean(jnp.sum((model.apply(params, x) - y) ** 2, -1))

    def step(carry, _):
        params, state = carry
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, X, y)
        updates, state = tx.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=40))(
        (params, tx.init(params))
    )
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.parametrize("number", [N, N + 1])
def test_points_that_the_loss_holds_are_no_shared_rows(number):
    """As many points on a border as inside, and biases that are added to all of them."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(2, 5)), "b": rng.normal(size=5), "v": rng.normal(size=(5, 1))}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    border = jnp.asarray(rng.normal(size=(number, 2)), jnp.float32)

    def network(params, x):
        return (jnp.tanh(x @ params["w"] + params["b"]) @ params["v"])[0]

    def loss(params, x):
        inside, outside = (jax.vmap(lambda x: network(params, x))(points) for points in (x, border))
        return jnp.mean(inside**2) + jnp.mean(outside**2)

    _, _, captures = cqjax.value_and_grad(loss, capture=cqjax.Gram)(params, X[:, 0, :2])
    x = np.concatenate([X[:, 0, :2], border])
    (weight,), (head,) = captures["w"], captures["v"]
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    np.testing.assert_allclose(weight.second_moment()[0], x.T @ x, rtol=1e-5, atol=1e-5)
    h = np.tanh(x[:, :2] @ params["w"] + params["b"])
    np.testing.assert_allclose(head.second_moment()[0], h.T @ h, rtol=1e-5, atol=1e-5)
