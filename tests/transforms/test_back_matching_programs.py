"""`back_matching_value_and_grad` under transformations, with shared or zero weights; its errors."""

import back_matching_reference as ref
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from back_matching_networks import (
    CASES,
    arrays,
    assert_close,
    expected,
    flatten,
    jit,
    mlp_by_hand,
    mlp_reference,
    problem,
)
from flax import traverse_util

import cqjax

DAMPED = {"damping": 0.1, "relative_damping": 0.0}
pytestmark = pytest.mark.usefixtures("float64")


def reference(layers, params, x, y, damping=None):
    """(value, gradients, signals, signal on x) with squared error."""
    params = {path: np.asarray(a, np.float64) for path, a in flatten(params).items()}
    arrays = np.asarray(x, np.float64), np.asarray(y)
    return ref.differentiate(layers, params, *arrays, ref.squared_error, damping=damping)


def half_square(z, y):
    return 0.5 * jnp.sum((z - y) ** 2) / len(z)


def mlp_problem():
    return problem(CASES["mlp"]._replace(apply=mlp_by_hand))


def in_microbatches(params, x):
    return jax.lax.map(lambda x: mlp_by_hand(params, x), x.reshape(2, 2, -1)).reshape(4, -1)


def in_a_branch(params, x):
    return jax.lax.cond(
        x[0, 0] < jnp.inf, mlp_by_hand, lambda p, x: 0 * mlp_by_hand(p, x), params, x
    )


def weights_first(params, x):
    """Products with the weight on the left, stored with its outputs first."""
    activations = [jnp.tanh, lambda x: jnp.maximum(x, 0), lambda x: x]
    x = x.T
    for activation, layer in zip(activations, params.values(), strict=True):
        x = activation(jnp.swapaxes(layer["kernel"], 0, 1) @ x + layer["bias"][:, None])
    return x.T


PROGRAMS = {
    "jit": jax.jit(mlp_by_hand),
    "remat": jax.checkpoint(mlp_by_hand),
    "vmap over examples": jax.vmap(
        lambda params, x: mlp_by_hand(params, x[None])[0], in_axes=(None, 0)
    ),
    "microbatches": in_microbatches,
    "branch": in_a_branch,
    "weights first": weights_first,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_however_the_program_is_written(name):
    loss_fn, params, x, y = problem(CASES["mlp"]._replace(apply=PROGRAMS[name]))
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights="plain")
    value, grads = jit(fn)(params, x, y)
    want, gradients, *_ = reference(mlp_reference(), params, x, y)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert_close(flatten(grads), gradients, 1e-10)


@pytest.mark.parametrize(
    "name, weights", [("mlp_by_hand", "ridge"), ("conv", "ridge"), ("norms", "plain")]
)
def test_vmap_over_seeds(name, weights):
    loss_fn, *_ = arrays(name, jnp.float64)
    seeds = [arrays(name, jnp.float64, seed)[1:] for seed in range(3)]
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights=weights, **DAMPED)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *seeds)
    values, grads = jit(jax.vmap(fn))(*stacked)
    for seed in range(3):
        damping = 0.1 if weights == "ridge" else None
        value, want, _ = expected(name, seed, damping=damping)
        np.testing.assert_allclose(values[seed], value, rtol=1e-9)
        assert_close({k: g[seed] for k, g in flatten(grads).items()}, want, 1e-8)


def test_training_in_a_scan():
    loss_fn, params, x, y = mlp_problem()
    fn = cqjax.back_matching_value_and_grad(loss_fn, **DAMPED)

    def step(params, _):
        value, grads = fn(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    got, values = jit(lambda p: jax.lax.scan(step, p, length=3))(params)
    want = {path: np.asarray(p) for path, p in flatten(params).items()}
    for value in values:
        loss, grads, *_ = reference(mlp_reference(), want, x, y, 0.1)
        np.testing.assert_allclose(value, loss, rtol=1e-8)
        want = {path: p - 0.1 * grads[path] for path, p in want.items()}
    assert_close(flatten(got), want, 1e-8)


@pytest.mark.parametrize("wrap, weights", [(jax.checkpoint, "plain"), (jax.jit, "ridge")])
def test_a_scan_over_layers(wrap, weights):
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(3, 4, 4)), rng.normal(size=(3, 4))
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))

    def loss_fn(params, x, y):
        layer = wrap(lambda a, p: (jnp.tanh(a @ p["kernel"] + p["bias"]), None))
        return half_square(jax.lax.scan(layer, x, params)[0], y)

    layers = [layer for i in range(3) for layer in (ref.Dense(str(i)), ref.tanh())]
    stacked = {"kernel": w, "bias": b}
    parts = {f"{i}/{k}": a[i] for i in range(3) for k, a in stacked.items()}
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights=weights, **DAMPED)
    _, grads = jit(fn)(jax.tree.map(jnp.asarray, stacked), x, y)
    _, want, *_ = reference(layers, parts, x, y, 0.1 if weights == "ridge" else None)
    want = {k: np.stack([want[f"{i}/{k}"] for i in range(3)]) for k in stacked}
    assert_close(grads, want, 1e-8)


def test_a_recurrent_network():
    """Backpropagation through time, each step's two products being layers of their own."""
    rng = np.random.default_rng(0)
    u, w, v = (rng.normal(size=s) for s in [(2, 3), (3, 3), (3, 2)])
    x, y = rng.normal(size=(4, 5, 2)), rng.normal(size=(4, 2))

    def loss_fn(params, x, y):
        def cell(h, x):
            return jnp.tanh(x @ params["u"] + h @ params["w"]), None

        h, _ = jax.lax.scan(cell, jnp.zeros((4, 3)), jnp.swapaxes(x, 0, 1))
        return half_square(h @ params["v"], y)

    h = [np.zeros((4, 3))]
    for t in range(5):
        h.append(np.tanh(x[:, t] @ u + h[-1] @ w))
    error = (h[-1] @ v - y) / 4
    want = {"u": np.zeros_like(u), "w": np.zeros_like(w), "v": h[-1].T @ error}
    dh = error @ v.T / np.sum(v**2, 1)
    for t in reversed(range(5)):
        dz = dh * (1 - h[t + 1] ** 2)
        want["u"] += x[:, t].T @ dz
        want["w"] += h[t].T @ dz
        dh = dz @ w.T / np.sum(w**2, 1)
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights="plain")
    _, grads = jit(fn)({"u": u, "w": w, "v": v}, x, y)
    assert_close(grads, want, 1e-10)


def test_a_weight_used_twice():
    """Each use is a layer of its own; its gradients add up, and its rows go below each other."""
    rng = np.random.default_rng(0)
    w, x, y = (rng.normal(size=s) for s in [(3, 3), (5, 3), (5, 3)])

    def loss_fn(params, x, y):
        return half_square(jnp.tanh(x @ params["w"]) @ params["w"], y)

    layers = [ref.Dense("0"), ref.tanh(), ref.Dense("1")]
    _, parts, signals, _ = reference(layers, {"0/kernel": w, "1/kernel": w}, x, y)
    plain = cqjax.back_matching_value_and_grad(loss_fn, weights="plain")
    _, grads = jit(plain)({"w": jnp.asarray(w)}, x, y)
    total = parts["0/kernel"] + parts["1/kernel"]
    assert_close(grads, {"w": total}, 1e-10)
    rows = np.concatenate([x, np.tanh(x @ w)])
    _, grads = jit(cqjax.back_matching_value_and_grad(loss_fn, **DAMPED))({"w": w}, x, y)
    want = 5 * np.linalg.solve(rows.T @ rows + 0.1 * np.eye(3), total)
    assert_close(grads, {"w": want}, 1e-8)


def test_what_nothing_touches_gets_no_signal():
    """A unit without weights, a scale of zero, and a position that a stride leaves out."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(4, 3)), rng.normal(size=(3, 2))
    v[1] = 0.0
    scale = np.array([1.0, 0.5, 0.0])
    net = nn.Sequential([nn.Dense(3, use_bias=False), nn.LayerNorm(), nn.Dense(2, use_bias=False)])
    x, y = rng.normal(size=(5, 4)), rng.normal(size=(5, 2))
    params = {"layers_0/kernel": w, "layers_1/scale": scale, "layers_1/bias": np.ones(3)}
    params["layers_2/kernel"] = v
    tree = traverse_util.unflatten_dict(params, sep="/")

    def loss_fn(params, x, y):
        return half_square(net.apply({"params": params}, x), y)

    layers = [ref.Dense("layers_0"), ref.Norm("layers_1", -1, 1e-6), ref.Dense("layers_2")]
    _, want, signals, _ = reference(layers, params, x, y)
    assert not signals["layers_1"][:, 1].any() and not signals["layers_0"][:, 1:].any()
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights="plain")
    assert_close(flatten(jit(fn)(tree, x, y)[1]), want, 1e-10)

    def strided(params, x):
        a = x + params["shift"]
        z = jax.lax.conv_general_dilated(
            a, params["k"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.sum(z**2) / 2

    kernel = rng.normal(size=(1, 2, 3))
    fn = cqjax.back_matching_value_and_grad(strided)
    a = rng.normal(size=(2, 5, 2))
    _, grads = jit(fn)({"k": kernel, "shift": jnp.zeros((2, 5, 2))}, a)
    signal = (a @ kernel[0]) @ kernel[0].T / np.sum(kernel[0] ** 2, 1)
    signal[:, 1::2] = 0.0
    np.testing.assert_allclose(grads["shift"], signal, atol=1e-12)


def test_several_readers_add_up():
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=(3, 2)) for k in "abc"} | {"shift": np.zeros((4, 3))}
    x = rng.normal(size=(4, 3))

    def loss_fn(params, x):
        a = x + params["shift"]
        z = a @ params["a"] + jnp.sin(a @ params["b"]) + (2 * a) @ params["c"] + a[:, :2]
        return jnp.sum(z**2) / 2

    a, b, c = (params[k] for k in "abc")
    z = x @ a + np.sin(x @ b) + 2 * x @ c + x[:, :2]
    below = [(d @ w.T) / np.sum(w**2, 1) for d, w in ((z, a), (z * np.cos(x @ b), b), (z, c))]
    want = below[0] + below[1] + 2 * below[2]
    want[:, :2] += z
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights="plain", loss_reduction="sum")
    _, grads = jit(fn)(params, x)
    np.testing.assert_allclose(grads["shift"], want, rtol=1e-10)


def test_selection_and_reduction():
    loss_fn, params, x, y = mlp_problem()
    plain, ridge = (reference(mlp_reference(), params, x, y, d)[1] for d in (None, 0.1))

    def check(solved, loss_fn=loss_fn, scale=1.0, **options):
        fn = cqjax.back_matching_value_and_grad(loss_fn, **DAMPED, **options)
        _, grads = jit(fn)(params, x, y)
        want = {p: ridge[p] if solved in p else scale * plain[p] for p in plain}
        assert_close(flatten(grads), want, 1e-8)

    check("layers_2", only="layers_2/*")
    check("layers_2", skip=["layers_0/*", "layers_4/*"])

    def total(params, x, y):
        return len(x) * loss_fn(params, x, y)

    check("layers", total, loss_reduction="sum")
    check("layers_0", total, scale=len(x), only="layers_0/*", loss_reduction="sum")


def test_relative_damping_and_solver():
    rng = np.random.default_rng(0)
    w, x, y = (rng.normal(size=s) for s in [(3, 2), (6, 3), (6, 2)])
    eigenvalues = np.linalg.eigvalsh(x.T @ x)
    damping = 0.01 + 0.1 * eigenvalues.mean()
    _, want, *_ = reference([ref.Dense("0")], {"0/kernel": w}, x, y, damping)
    for solver in ("auto", "dual", "primal"):
        fn = cqjax.back_matching_value_and_grad(
            lambda p, x, y: half_square(x @ p["w"], y),
            damping=0.01,
            relative_damping=0.1,
            solver=solver,
        )
        _, grads = jit(fn)({"w": w}, x, y)
        np.testing.assert_allclose(grads["w"], want["0/kernel"], rtol=1e-8)


def test_auxiliary_results():
    loss_fn, params, x, y = mlp_problem()

    def with_aux(params, x, y):
        return loss_fn(params, x, y), {"logits": mlp_by_hand(params, x), "count": 3}

    value, grads = jit(cqjax.back_matching_value_and_grad(loss_fn))(params, x, y)
    fn = cqjax.back_matching_value_and_grad(with_aux, has_aux=True)
    (same, aux), again = jit(fn)(params, x, y)
    np.testing.assert_allclose(same, value, rtol=1e-12)
    np.testing.assert_allclose(aux["logits"], mlp_by_hand(params, x), rtol=1e-12)
    assert aux["count"] == 3
    assert_close(flatten(again), flatten(grads), 1e-9)


@pytest.mark.parametrize(
    "name, weights, dtype",
    [
        ("mlp", "ridge", jnp.bfloat16),
        ("conv", "plain", jnp.bfloat16),
        ("norms", "plain", jnp.float16),
    ],
)
def test_16_bits(name, weights, dtype):
    loss_fn, *inputs = arrays(name, dtype)
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights=weights, **DAMPED)
    value, grads = jit(fn)(*inputs)
    want, gradients, _ = expected(name, damping=0.1 if weights == "ridge" else None)
    np.testing.assert_allclose(float(value), want, rtol=0.05)
    for path, g in flatten(grads).items():
        assert g.dtype == dtype and jnp.isfinite(g).all(), path
        if name != "norms":
            g, h = np.asarray(g, float), gradients[path]
            assert np.vdot(g, h) > 0.99 * np.linalg.norm(g) * np.linalg.norm(h)


BAD = [
    ({"weights": "exact"}, "weights"),
    ({"damping": -1.0}, "damping"),
    ({"damping": float("nan")}, "damping"),
    ({"relative_damping": -1.0}, "damping"),
    ({"solver": "qr"}, "solver"),
    ({"loss_reduction": "max"}, "loss_reduction"),
    ({"only": "nothing"}, "nothing"),
]


@pytest.mark.parametrize("options, match", BAD, ids=str)
def test_bad_arguments(options, match):
    loss_fn, params, x, y = mlp_problem()
    with pytest.raises(ValueError, match=match):
        cqjax.back_matching_value_and_grad(loss_fn, **options)(params, x, y)


def test_bad_losses():
    _, params, x, _ = mlp_problem()
    with pytest.raises(ValueError, match="signal"):
        cqjax.value_and_grad(lambda p, x: jnp.sum(mlp_by_hand(p, x)), signal="matching")(params, x)
    with pytest.raises(TypeError, match="scalar"):
        cqjax.back_matching_value_and_grad(mlp_by_hand)(params, x)
    whole = jax.tree.map(lambda p: p.astype(int), params)
    with pytest.raises(TypeError, match="float"):
        cqjax.back_matching_value_and_grad(lambda p, x: jnp.sum(mlp_by_hand(p, x)))(whole, x)
