"""Weights that a loss makes of parameters, against dense least squares in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import cqjax
import cqjax.nnx

RNG = np.random.default_rng(0)
N, D, OUT = 24, 6, 5
X = RNG.normal(size=(N, D)) @ RNG.normal(size=(D, D)) / 2
Y = RNG.normal(size=(N, OUT))
V = RNG.normal(size=(D, OUT))
MASK = np.arange(1, D + 1)[:, None] % 4 <= np.arange(OUT)  # as in MADE: outputs see other inputs
SCALES = RNG.uniform(0.5, 2, size=(D, OUT)) * MASK
LAMBDA = 0.7


def own(xp, p):
    return p["v"]


def masked(xp, p):
    return p["v"] * xp.asarray(MASK)


def scaled(xp, p):
    return p["v"] * xp.asarray(SCALES)


def centred(xp, p):
    return p["v"] - p["v"].mean(0)


def weight_norm(xp, p):
    return p["g"] * p["v"] / xp.sqrt((p["v"] ** 2).sum(0))


def standardised(xp, p):
    return p["g"] * (p["v"] - p["v"].mean(0)) / xp.sqrt(p["v"].var(0) + 1e-4)


def low_rank(xp, p):
    return p["w0"] + p["a"] @ p["c"]


PARAMETERS = {
    "v": V,
    "g": RNG.uniform(0.5, 2, OUT),
    "w0": RNG.normal(size=(D, OUT)),
    "a": RNG.normal(size=(D, 2)),
    "c": RNG.normal(size=(2, OUT)),
}
FUNCTIONS = {
    masked: ("v",),
    scaled: ("v",),
    centred: ("v",),
    weight_norm: ("g", "v"),
    standardised: ("g", "v"),
    low_rank: ("a", "c", "w0"),
}


def loss_of(make):
    def loss_fn(params, x, y):
        return 0.5 * jnp.mean(jnp.sum((x @ make(jnp, params) + params["b"] - y) ** 2, -1))

    return loss_fn


def parameters(make, dtype=jnp.float32):
    chosen = {path: PARAMETERS[path] for path in FUNCTIONS[make]} | {"b": RNG.normal(size=OUT)}
    return {path: jnp.asarray(array, dtype) for path, array in chosen.items()}


def jacobian(make, params, paths):
    """By central differences: (D, OUT, number of parameters)."""
    columns = []
    for path in paths:
        for i in range(params[path].size):
            ends = []
            for sign in (1, -1):
                moved = {p: np.array(a) for p, a in params.items()}
                moved[path].flat[i] += sign * 1e-5
                ends.append(make(np, moved))
            columns.append((ends[0] - ends[1]) / 2e-5)
    return np.stack(columns, -1)


def reference(make, params, paths, damping=LAMBDA, x=X):
    """argmin ‖X (J D; d) - N Z̄‖² + λ ‖(J D; d)‖² + δ ‖D‖² by one dense least-squares problem."""
    params = {path: np.asarray(a, np.float64) for path, a in params.items()}
    j = jacobian(make, params, paths)
    number = j.shape[-1]
    errors = x @ make(np, params) + params["b"] - Y  # N Z̄
    gradient = np.einsum("iok,io->k", j, x.T @ errors)
    moved = np.einsum("iok,k->io", j, gradient)
    gain = (moved**2).sum() / (gradient**2).sum()
    with_one = np.concatenate([x, np.ones((len(x), 1))], 1)
    mean = np.trace(with_one.T @ with_one + damping * np.eye(D + 1)) / (D + 1)
    delta = 1e-3 * gain * mean
    # Unknowns: V's entries, then the bias. (W; b) is joined @ unknowns.
    joined = np.zeros((D + 1, OUT, number + OUT))
    joined[:D, :, :number] = j
    joined[D, np.arange(OUT), number + np.arange(OUT)] = 1
    rows = np.einsum("ni,iok->nok", with_one, joined).reshape(-1, number + OUT)
    ridge = np.sqrt(damping) * joined.reshape(-1, number + OUT)
    least = np.sqrt(delta) * np.eye(number, number + OUT)
    right = np.concatenate([errors.ravel(), np.zeros(len(ridge) + number)])
    found = np.linalg.lstsq(np.concatenate([rows, ridge, least]), right, rcond=None)[0]
    ends = np.cumsum([params[path].size for path in paths])
    parts = np.split(found, ends)
    return {p: a.reshape(params[p].shape) for p, a in zip((*paths, "b"), parts, strict=True)}


def updated(make, params, x=X, transformation=None, **options):
    differentiate = cqjax.value_and_grad(loss_of(make), reparametrized="nearest", **options)
    tx = transformation or cqjax.scale_by_consequentialism(damping=LAMBDA, relative_damping=0.0)
    _, grads, captures = differentiate(params, jnp.asarray(x), jnp.asarray(Y))
    updates, state = tx.update(grads, tx.init(params), params, captures=captures)
    return updates, state, captures


def assert_near(updates, expected, tolerance):
    largest = max(np.abs(a).max() for a in expected.values())
    for path, array in expected.items():
        np.testing.assert_allclose(updates[path], array, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (masked, 1e-5),
        (scaled, 1e-5),
        (centred, 1e-4),
        (weight_norm, 1e-3),
        (standardised, 1e-3),
        (low_rank, 1e-2),
    ],
)
def test_update_is_that_of_the_dense_problem(make, tolerance):
    with jax.enable_x64(True):
        params = parameters(make, jnp.float64)
        updates, state, captures = updated(make, params)
    assert_near(updates, reference(make, params, FUNCTIONS[make]), tolerance)
    assert not state.fallbacks.any()
    (capture,) = captures[FUNCTIONS[make][0]]
    assert capture.block.solver == "primal"


def test_a_mask_leaves_each_output_its_own_ridge_problem():
    with jax.enable_x64(True):
        params = parameters(masked, jnp.float64)
        updates, _, _ = updated(masked, params)
    errors = X @ (np.asarray(params["v"]) * MASK) + np.asarray(params["b"]) - Y
    for j in range(OUT):
        features = np.concatenate([X[:, MASK[:, j]], np.ones((N, 1))], 1)
        gram = features.T @ features + LAMBDA * np.eye(features.shape[1])
        alone = np.linalg.solve(gram, features.T @ errors[:, j])
        got = np.concatenate([updates["v"][MASK[:, j], j], updates["b"][j : j + 1]])
        np.testing.assert_allclose(got, alone, atol=0.03 * np.abs(alone).max())  # for δ
    assert np.all(np.asarray(updates["v"])[~MASK] == 0)


@jax.custom_vjp
def rounded(v):
    return jnp.round(4 * v) / 4


rounded.defvjp(lambda v: (rounded(v), None), lambda _, g: (g,))


@pytest.mark.parametrize(
    "quantised",
    [
        lambda xp, p: rounded(p["v"]),
        lambda xp, p: p["v"] + jax.lax.stop_gradient(jnp.round(4 * p["v"]) / 4 - p["v"]),
    ],
    ids=["custom_vjp", "stop_gradient"],
)
def test_straight_through_update_is_that_of_the_rounded_weight(quantised):
    with jax.enable_x64(True):
        params = {"v": jnp.asarray(V), "b": jnp.zeros(OUT)}
        updates, _, _ = updated(quantised, params)
        plain, _, _ = updated(own, params | {"v": rounded(params["v"])})
    assert_near(updates, {p: np.asarray(a) for p, a in plain.items()}, 0.02)  # for δ


def test_masks_that_are_passed_or_drawn():
    def loss_fn(params, x, y, mask, key):
        drawn = jax.random.bernoulli(key, 0.7, mask.shape) / 0.7
        return 0.5 * jnp.mean(
            jnp.sum((x @ (params["v"] * mask * drawn) + params["b"] - y) ** 2, -1)
        )

    key = jax.random.key(3)
    both = MASK * np.asarray(jax.random.bernoulli(key, 0.7, MASK.shape)) / 0.7

    def known(xp, p):
        return p["v"] * both

    with jax.enable_x64(True):
        both = MASK * np.asarray(jax.random.bernoulli(key, 0.7, MASK.shape)) / 0.7
        params = {"v": jnp.asarray(V), "b": jnp.zeros(OUT)}
        tx = cqjax.scale_by_consequentialism(damping=LAMBDA, relative_damping=0.0)

        @jax.jit
        def update(params, mask, key):
            differentiate = cqjax.value_and_grad(loss_fn, reparametrized="nearest")
            _, grads, captures = differentiate(params, jnp.asarray(X), jnp.asarray(Y), mask, key)
            return tx.update(grads, tx.init(params), params, captures=captures)[0]

        updates = update(params, jnp.asarray(MASK), key)
    assert_near(updates, reference(known, params, ("v",)), 1e-5)


def test_an_update_that_was_changed_before_is_solved_for_as_it_came_in():
    """The update is linear in what comes in: twice the gradient gives twice the update."""
    with jax.enable_x64(True):
        params = parameters(weight_norm, jnp.float64)
        solve = cqjax.scale_by_consequentialism(damping=LAMBDA, relative_damping=0.0)
        once, _, _ = updated(weight_norm, params, transformation=solve)
        twice, _, _ = updated(
            weight_norm, params, transformation=optax.chain(optax.scale(2.0), solve)
        )
    assert_near(twice, {p: 2 * np.asarray(a) for p, a in once.items()}, 1e-6)


def test_output_change_is_bounded_to_first_order():
    make = weight_norm
    with jax.enable_x64(True):
        params = parameters(make, jnp.float64)
        bound = optax.chain(optax.sgd(50.0), cqjax.clip_by_output_change(0.2))
        updates, state, _ = updated(make, params, transformation=bound)
    numpy = {p: np.asarray(a) for p, a in params.items()}
    j = jacobian(make, numpy, FUNCTIONS[make])
    flat = np.concatenate([np.ravel(updates[p]) for p in FUNCTIONS[make]])
    moved = X @ (j @ flat) + np.asarray(updates["b"])
    outputs = X @ make(np, numpy) + numpy["b"]
    assert np.linalg.norm(moved) == pytest.approx(0.2 * np.linalg.norm(outputs), rel=1e-3)
    assert state[1].clipped.sum() == 1


def test_members_of_a_vmap_and_trips_of_a_scan():
    params = parameters(standardised)
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    tx = cqjax.csgd(0.3)

    def step(carry, _):
        params, state = carry
        differentiate = cqjax.value_and_grad(loss_of(standardised), reparametrized="nearest")
        loss, grads, captures = differentiate(params, x, y)
        updates, state = tx.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), loss

    def trained(params):
        return jax.lax.scan(step, (params, tx.init(params)), None, length=20)

    several = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), params)
    (_, _), losses = jax.jit(jax.vmap(trained))(several)
    (_, _), alone = jax.jit(trained)(params)
    np.testing.assert_allclose(losses[0], alone, rtol=1e-2)
    assert losses[0, -1] < 0.5 * losses[0, 0]


def test_captures_cross_a_jit(float64):
    params = parameters(weight_norm, jnp.float64)
    x, y = jnp.asarray(X), jnp.asarray(Y)
    tx = cqjax.scale_by_consequentialism()
    differentiate = jax.jit(
        lambda p: cqjax.value_and_grad(loss_of(weight_norm), reparametrized="nearest")(p, x, y)
    )
    traces = []

    @jax.jit
    def update(grads, captures):
        traces.append(None)
        return tx.update(grads, tx.init(grads), captures=captures)[0]

    _, grads, captures = differentiate(params)
    apart = update(grads, captures)
    jax.clear_caches()
    _, grads, captures = differentiate(params)
    update(grads, captures)
    together, _, _ = updated(weight_norm, params, x, tx)
    assert_near(apart, together, 1e-5)


def test_bfloat16_is_finite():
    params = parameters(weight_norm, jnp.bfloat16)
    updates, _, _ = updated(weight_norm, params, jnp.asarray(X, jnp.bfloat16))
    for path, array in updates.items():
        assert array.dtype == jnp.bfloat16, path
        assert jnp.isfinite(array).all(), path


def test_a_stack_of_layers_in_a_scan():
    """Each layer's V is normalised within the loop. The layers are those of separate parameters."""

    def normed(v):
        return v / jnp.sqrt((v**2).sum(0))

    def scanned(params, x):
        h, _ = jax.lax.scan(lambda h, v: (jnp.tanh(h @ normed(v)), None), x, params["v"])
        return jnp.mean(jnp.sum(h**2, -1))

    def separate(params, x):
        for v in params.values():
            x = jnp.tanh(x @ normed(v))
        return jnp.mean(jnp.sum(x**2, -1))

    tx = cqjax.scale_by_consequentialism(damping=LAMBDA, relative_damping=0.0)
    with jax.enable_x64(True):
        v = jnp.asarray(RNG.normal(size=(3, D, D)))
        found = []
        for loss, params in ((scanned, {"v": v}), (separate, {str(i): v[i] for i in range(3)})):
            differentiate = cqjax.value_and_grad(loss, reparametrized="nearest")
            _, grads, captures = differentiate(params, jnp.asarray(X))
            found.append(tx.update(grads, tx.init(params), captures=captures)[0])
    one, several = found
    # δ is that of all layers in the one, and each layer's own in the other.
    for i in range(3):
        own = np.asarray(several[str(i)])
        assert np.vdot(one["v"][i], own) > 0.99 * np.linalg.norm(one["v"][i]) * np.linalg.norm(own)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.WeightNorm(nn.Dense(8), name="norm")(x))
        return nn.Dense(OUT)(h)


def test_linen_weight_norm():
    model, x = Normed(), jnp.asarray(X, jnp.float32)
    params = model.init(jax.random.key(0), x)

    def loss_fn(params):
        return 0.5 * jnp.mean(jnp.sum((model.apply(params, x) - Y) ** 2, -1))

    plan = cqjax.plan(loss_fn, reparametrized="nearest")(params)
    assert {p.status for p in plan.parameters} == {"covered"}
    assert "W = f(" in str(plan)
    tx = cqjax.csgd(0.3)
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state):
        loss, grads, captures = cqjax.value_and_grad(loss_fn, reparametrized="nearest")(params)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(loss)
    assert losses[-1] < 0.7 * losses[0]


def test_nnx_weight_norm():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.WeightNorm(nnx.Linear(D, 8, rngs=rngs), rngs=rngs)
            self.last = nnx.Linear(8, OUT, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    def loss_fn(model, x, y):
        return 0.5 * jnp.mean(jnp.sum((model(x) - y) ** 2, -1))

    model = Net(nnx.Rngs(0))
    arrays = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    plan = cqjax.nnx.plan(loss_fn, reparametrized="nearest")(model, *arrays)
    assert {p.status for p in plan.parameters} == {"covered"}
    optimizer = nnx.Optimizer(model, cqjax.csgd(0.3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads, captures = cqjax.nnx.value_and_grad(loss_fn, reparametrized="nearest")(
            model, *arrays
        )
        optimizer.update(model, grads, captures=captures)
        return loss

    losses = [step(model, optimizer) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
