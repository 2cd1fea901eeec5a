"""Rows of a table by index: however the lookup is written, and what becomes of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cqjax
from cqjax.program.operators import REASON

N, V, D, K, LAM = 8, 5, 4, 3, 0.3
RNG = np.random.default_rng(0)
TABLE, IDS = RNG.normal(size=(V, D)), np.array([0, 3, 3, 1, 0, 3, -1, 1])
X, Y = RNG.normal(size=(N, D)), RNG.normal(size=(N, D))


def update(loss_fn, params, *args, **options):
    """The update that the loss's gradient becomes, in float64."""
    with jax.enable_x64(True):
        params, args = jax.tree.map(jnp.asarray, (params, args))
        tx = cqjax.scale_by_consequentialism(damping=LAM, relative_damping=0.0)

        @jax.jit
        def step(params, *args):
            _, grads, captures = cqjax.value_and_grad(loss_fn, **options)(params, *args)
            return tx.update(grads, tx.init(params), params, captures=captures)[0]

        return jax.tree.map(np.asarray, step(params, *args))


LOOKUPS = {
    "fancy": lambda t, ids: t[ids],
    "vmap": lambda t, ids: jax.vmap(lambda i: t[i])(ids),
    "vmap of take": lambda t, ids: jax.vmap(lambda i: jnp.take(t, i, axis=0))(ids),
    "dynamic_index_in_dim": lambda t, ids: jax.vmap(
        lambda i: lax.dynamic_index_in_dim(t, i, keepdims=False)
    )(ids),
    "map": lambda t, ids: lax.map(lambda i: t[i], ids),
    "columns": lambda t, ids: jax.vmap(lambda i: t.T[:, i])(ids),
    "two maps": lambda t, ids: jax.vmap(jax.vmap(lambda i: t[i]))(ids.reshape(2, 4)).reshape(N, D),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_by_scalars(name):
    """Each row moves by the mean of what its examples ask for (less, by the damping)."""

    def loss_fn(table, ids, y):
        return 0.5 * jnp.mean(jnp.sum((LOOKUPS[name](table, ids) - y) ** 2, -1))

    expected = np.zeros((V, D))
    for row in range(V):
        at = IDS % V == row
        expected[row] = (TABLE[row] - Y[at]).sum(0) / (at.sum() + LAM)
    plan = cqjax.plan(loss_fn)(TABLE, IDS, Y)
    assert [p.status for p in plan.parameters] == ["covered"]
    np.testing.assert_allclose(update(loss_fn, TABLE, IDS, Y), expected, rtol=1e-8)


def test_a_table_for_each_member():
    """An ensemble's lookups: a batch axis of the gather."""
    tables, ids = RNG.normal(size=(2, V, D)), RNG.integers(0, V, size=(N, 2))
    y = RNG.normal(size=(N, 2, D))

    def loss_fn(tables, ids, y):
        z = jax.vmap(lambda t, i: jax.vmap(lambda i: t[i])(i), (0, 1), 1)(tables, ids)
        return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, (1, 2)))

    u = update(loss_fn, tables, ids, y)
    for member in range(2):
        for row in range(V):
            at = ids[:, member] == row
            errors = (tables[member, row] - y[at, member]).sum(0)
            np.testing.assert_allclose(u[member, row], errors / (at.sum() + LAM), rtol=1e-8)


def test_slices_that_are_no_rows_say_so():
    plan = cqjax.plan(lambda t, i: jnp.mean(lax.dynamic_slice_in_dim(t, i, 2) ** 2), batch_size=1)(
        TABLE, 1
    )
    assert "does not read whole rows" in plan.uncovered()[""][0]


def by_counter(w, x):
    return lax.fori_loop(0, len(w), lambda i, h: jnp.tanh(h @ w[i]), x)


def by_carry(w, x):
    def body(carry, _):
        i, h = carry
        return (i + 1, jnp.tanh(h @ lax.dynamic_index_in_dim(w, i, keepdims=False))), None

    return lax.scan(body, (0, x), None, length=len(w))[0][1]


def by_numbers(w, x):
    return lax.scan(lambda h, i: (jnp.tanh(h @ w[i]), None), x, jnp.arange(len(w)))[0]


def backwards(w, x):
    """The last trip comes first, and its number is 0: so it has the first weight."""

    def body(carry, _):
        i, h = carry
        return (i + 1, jnp.tanh(h @ w[i])), None

    return lax.scan(body, (0, x), None, length=len(w), reverse=True)[0][1]


def from_the_second(w, x):
    x = jnp.tanh(x @ w[0])
    return lax.fori_loop(1, len(w), lambda i, h: jnp.tanh(h @ w[i]), x)


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("network", [by_counter, by_carry, by_numbers, backwards, from_the_second])
def test_layers_by_a_loops_counter(network, solver):
    """Each trip has a weight of its own: the update is that of the layers written out."""
    w = RNG.normal(size=(3, D, D)) / 2

    def written_out(w, x):
        for layer in w:
            x = jnp.tanh(x @ layer)
        return x

    def loss_of(network):
        return lambda w, x, y: 0.5 * jnp.mean(jnp.sum((network(w, x) - y) ** 2, -1))

    u, v = (update(loss_of(f), w, X, Y, solver=solver) for f in (network, written_out))
    h, inputs = X, []
    for layer in w:
        inputs.append(h)
        h = np.tanh(h @ layer)
    signal = h - Y
    for i in reversed(range(3)):
        signal = signal * (1 - np.tanh(inputs[i] @ w[i]) ** 2)
        x = inputs[i]
        expected = np.linalg.solve(x.T @ x + LAM * np.eye(D), x.T @ signal)
        np.testing.assert_allclose(u[i], expected, rtol=1e-7)
        signal = signal @ w[i].T
    np.testing.assert_allclose(u, v, rtol=1e-7)


def test_layers_in_another_order_are_not_taken_for_a_stack():
    def loss_fn(w, x):
        return jnp.mean(lax.scan(lambda h, i: (h @ w[i], None), x, jnp.array([0, 1, 1]))[0])

    (reason,) = cqjax.plan(loss_fn)(RNG.normal(size=(3, D, D)), X).uncovered()[""]
    assert reason.startswith(f"{REASON}; ")


EXPERTS, MIXED = RNG.normal(size=(V, D, K)), RNG.normal(size=(D, D))


def recurrent(p, x, ids):
    def body(h, i):
        return jnp.tanh(p["w"][i] @ h), h

    return lax.scan(body, x[0], ids)[1]


ACTING = {
    "experts": (lambda p, x, ids: jnp.einsum("nd,ndo->no", x, p["w"][ids]), EXPERTS),
    "vmapped experts": (lambda p, x, ids: jax.vmap(lambda x, i: x @ p["w"][i])(x, ids), EXPERTS),
    "hidden": (
        lambda p, x, ids: jnp.einsum("nd,ndo->no", jnp.tanh(x @ p["m"]), p["w"][ids]),
        EXPERTS,
    ),
    "flat matrices": (
        lambda p, x, ids: jnp.einsum("nd,ndo->no", x, p["w"][ids].reshape(N, D, K)),
        EXPERTS.reshape(V, -1),
    ),
    "scaled": (lambda p, x, ids: jnp.einsum("nd,ndo->no", x, p["w"][ids] / 8), EXPERTS),
    "twice": (
        lambda p, x, ids: jnp.einsum(
            "nd,nde->ne", jnp.tanh(jnp.einsum("nd,nde->ne", x, p["w"][ids])), p["w"][ids]
        ),
        RNG.normal(size=(V, D, D)),
    ),
    "film": (lambda p, x, ids: p["w"][ids] * jnp.tanh(x @ p["m"]), TABLE),
    "film of inputs": (lambda p, x, ids: x * p["w"][ids], TABLE),
    "scores": (lambda p, x, ids: jnp.tanh(x @ p["m"]) @ p["w"][ids].T, TABLE),
    "recurrent": (recurrent, RNG.normal(size=(V, D, D))),
    "one a trip": (
        lambda p, x, ids: lax.map(lambda each: each[0] @ p["w"][each[1]], (x, ids)),
        EXPERTS,
    ),
}


@pytest.mark.parametrize("name", ACTING)
def test_rows_that_act_on_activations_are_not_covered(name):
    predict, table = ACTING[name]

    def loss_fn(p, x, ids):
        return jnp.mean(predict(p, x, ids) ** 2)

    plan = cqjax.plan(loss_fn, batch_size=N)({"w": table, "m": MIXED}, X, IDS)
    assert plan.uncovered()["w"] == (REASON,)


def attention(p, x, ids):
    e = p["w"][ids]
    return jax.nn.softmax(e @ e.T) @ e


def projected_attention(p, x, ids):
    e = p["w"][ids] * D**0.5
    q, k = e @ p["m"], e @ p["m"].T
    return jax.nn.softmax(q @ k.T) @ e


def gated(p, x, ids):
    e = p["w"][ids]
    return e * jax.nn.sigmoid(e)


def normalised(p, x, ids):
    e = p["w"][ids]
    return (e * lax.rsqrt(jnp.mean(e**2, -1, keepdims=True) + 1e-6)) @ p["m"]


EMBEDDINGS = {
    "dense": lambda p, x, ids: p["w"][ids] @ p["m"],
    "vmapped dense": lambda p, x, ids: jax.vmap(lambda i: p["w"][i] @ p["m"])(ids),
    "learned scale": lambda p, x, ids: p["w"][ids] * p["m"][0],
    "constant": lambda p, x, ids: p["w"][ids] @ np.ones((D, 2), np.float32),
    "masked": lambda p, x, ids: p["w"][ids] * (ids > 0)[:, None].astype(jnp.float32),
    "gated": gated,
    "and added": lambda p, x, ids: jnp.tanh(x + p["w"][ids]) * x,
    "attention": attention,
    "projected attention": projected_attention,
    "normalised": normalised,
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_stay_covered(name):
    def loss_fn(p, x, ids):
        return jnp.mean(EMBEDDINGS[name](p, x, ids) ** 2)

    plan = jax.jit(lambda *args: cqjax.value_and_grad(loss_fn, batch_size=N)(*args)[2])(
        {"w": TABLE, "m": MIXED}, X, IDS
    )
    assert {p.path: p.status for p in plan.parameters}["w"] == "covered"
