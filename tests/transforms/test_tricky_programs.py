"""Programs in which the dual would be wrong if the walk took a use for what it is not.

With a random update in the gradient's place, the primal and the dual must still be NumPy's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_layer import assert_close, first_step

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


def sq(z):
    return jnp.mean(jnp.sin(z) ** 2)


def _rnn(p, x):
    def cell(h, row):
        return jnp.tanh(row @ p["w"] + h), None

    return sq(jax.lax.scan(cell, jnp.broadcast_to(p["b"], (5, 3)), jnp.stack([x, jnp.cos(x)]))[0])


def _both_branches(p, x):
    w = jax.lax.cond(x[0, 0] > 0, lambda a, b: a, lambda a, b: b, p["w"], p["v"])
    return sq(x @ p["w"]) + sq(x @ p["v"]) + sq(w)


TRICKY = {
    "z is used without its bias": lambda p, x: (lambda z: sq(jnp.tanh(z + p["b"]) + z))(x @ p["w"]),
    "a penalty on z": lambda p, x: (lambda z: sq(z + p["b"]) + 0.1 * sq(z))(x @ p["w"]),
    "a learned initial state": _rnn,
    "a carry that is a parameter": lambda p, x: (
        sq(x @ p["w"])
        + sq(jax.lax.scan(lambda c, _: (p["w"], None), jnp.zeros((4, 3)), None, length=2)[0])
    ),
    "branches that return parameters": _both_branches,
    "a bias in parts": lambda p, x: sq((x @ p["w"] + p["c"][:3]) * p["c"][3:]),
    "a bias that is joined with itself": lambda p, x: sq(
        jnp.concatenate([x, x], 0)[:5] @ p["u"] + jnp.concatenate([p["b"], p["b"]])
    ),
    "rounded": lambda p, x: sq(x @ p["w"] + p["b"].astype(int).astype(x.dtype)),
    "a scalar added": lambda p, x: sq(x @ p["w"] + p["s"]),
    "a homogeneous parameter": lambda p, x: sq(x[:, :3] @ p["w"][:3] + p["w"][3]),
    "a positional parameter": lambda p, x: sq(x @ p["w"] + p["t"]),
    "computed in float32": lambda p, x: sq(x.astype(jnp.float32) @ p["w"].astype(jnp.float32)),
    "a dead product": lambda p, x: jax.jit(lambda p, x: (sq(x @ p["w"]), sq(x.T @ x @ p["w"])))(
        p, x
    )[0],
}


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("name", TRICKY)
def test_tricky_programs(name, solver):
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "v": (4, 3), "u": (4, 6), "b": 3, "c": 6, "s": (), "t": (5, 3)}
    params = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}
    x, loss = jnp.asarray(rng.normal(size=(5, 4))), TRICKY[name]
    handed = {k: jnp.asarray(rng.normal(size=shape)) for k, shape in shapes.items()}
    tx = cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0)

    @jax.jit
    def run(params, x, handed):
        _, grads, captures = cqjax.value_and_grad(loss, solver=solver, batch_size=5)(params, x)
        updates = [tx.update(g, tx.init(params), captures=captures)[0] for g in (grads, handed)]
        return grads, captures, updates, jax.grad(loss)(params, x)

    grads, captures, both, want = run(params, x, handed)
    assert_close(grads, jax.tree.map(np.asarray, want), 1e-6)
    for incoming, updates in zip((grads, handed), both, strict=True):
        expected = dict(incoming)
        for capture in captures.blocks:
            expected |= solved(capture, incoming, solver)
        # The sums of the products that are computed in float32 are float32's too.
        rtol = 1e-4 if name == "computed in float32" else 1e-6
        assert_close(updates, jax.tree.map(np.asarray, expected), rtol)


def solved(capture, incoming, solver):
    """N (X̃ᵀX̃ + λI)⁻¹ H of what was captured, where it was captured whole."""
    block = capture.block
    (weight,), bias = block.view.paths, block.bias.view.paths[0] if block.bias else None
    xx = np.asarray(capture.second_moment()[0])
    rows = block.view({weight: np.arange(12).reshape(4, 3)})  # which rows of w these are
    h = np.asarray(incoming[weight])[: len(rows)]
    if bias:
        h = np.concatenate([h, np.asarray(incoming[bias])[None]])
    u = 5 * np.linalg.solve(xx + 0.1 * np.eye(len(xx)), h)
    result = np.asarray(incoming[weight]).copy()
    result[: len(rows)] = u[: len(rows)]
    return {weight: result} | ({bias: u[-1]} if bias else {})


@pytest.mark.filterwarnings("ignore:no parameter is covered")
@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (lambda w: jnp.concatenate([w, w]), (2, 3)),
        (lambda w: jnp.concatenate([w[:2], w[1:]]), (3, 3)),
        (lambda w: jnp.concatenate([jnp.flip(w[:3]), w[:1]]), (5, 3)),
    ],
)
def test_a_weight_with_repeated_entries_keeps_its_gradient(view, shape):
    x, params = jnp.ones((5, 4)), {"w": jnp.ones(shape)}

    def loss(params, x):
        return sq(x @ view(params["w"]))

    assert "occurs more than once" in cqjax.plan(loss)(params, x).uncovered()["w"][0]
    _, grads, captures = jax.jit(cqjax.value_and_grad(loss))(params, x)
    assert not captures.blocks
    assert_close(grads, jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params, x)))


def test_a_lookup_and_a_product_of_one_table_conflict():
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
    plan = cqjax.plan(lambda p, x: sq(x @ p["w"]) + sq(p["w"][jnp.array([0, 2])]))(params, x)
    assert "contract it in different ways" in plan.uncovered()["w"][0]


def test_a_skipped_partner_makes_a_weight_inexact():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3))), "v": jnp.asarray(rng.normal(size=(4, 2)))}
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def loss(p, x):
        return sq(x @ p["w"]) + sq(jnp.tanh(x) @ jnp.concatenate([p["w"], p["v"]], 1))

    tx = cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0)
    grads, _, updates, _ = first_step(tx, loss, params, x, skip="v", solver="dual", batch_size=5)
    a = np.asarray(x)
    want = 5 * np.linalg.solve(a.T @ a + 0.1 * np.eye(4), np.asarray(grads["w"]))
    np.testing.assert_allclose(updates["w"], want, rtol=1e-6)
