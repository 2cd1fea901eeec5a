"""Weights and outputs multiplied by constants: the update is that of the weight the product sees.

With W = c V, its change is N (XᵀX + λI)⁻¹ G of the layer x @ W, and V's is that divided by c.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cqjax

N, D, K, LAM = 7, 4, 3, 0.3
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, D)), RNG.normal(size=(N, K))
W, B = RNG.normal(size=(D, K)), RNG.normal(size=K)
BY_INPUT, BY_OUTPUT = np.array([[2.0], [-1.0], [0.5], [4.0]]), np.array([3.0, -2.0, 0.25])
FULL = RNG.uniform(0.5, 2, size=(D, K))
ROWS = np.array([[1.0], [0.0], [1.0], [1.0]])
COLUMNS = np.array([1.0, 0.0, 1.0])


def updates(predict, params, x=X, y=Y, **options):
    """The update that the loss's gradient becomes, under jit and without, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)

        def loss_fn(params, x, y):
            return 0.5 * jnp.mean(jnp.sum((predict(params, x) - y) ** 2, -1))

        tx = cqjax.scale_by_consequentialism(damping=LAM, relative_damping=0.0)

        def step(params, x, y):
            _, grads, captures = cqjax.value_and_grad(loss_fn, **options)(params, x, y)
            return tx.update(grads, tx.init(params), params, captures=captures)[0]

        eager = step(params, jnp.asarray(x), jnp.asarray(y))
        jitted = jax.jit(step)(params, jnp.asarray(x), jnp.asarray(y))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), eager, jitted)
        return jax.tree.map(np.asarray, eager)


def ridge(x, error):
    """N (XᵀX + λI)⁻¹ XᵀZ̄ for Z̄ = error / N."""
    return np.linalg.solve(x.T @ x + LAM * np.eye(x.shape[1]), x.T @ error)


SCALES = {
    "divided": (lambda w: w / 3.0, 1 / 3),
    "negative": (lambda w: -w, -1.0),
    "times": (lambda w: 2.5 * w, 2.5),
    "computed": (lambda w: w / jnp.sqrt(jnp.array(5.0)), 5**-0.5),
    "transposed": (lambda w: (w.T * 2.0).T, 2.0),
    "by input": (lambda w: w * BY_INPUT, BY_INPUT),
    "by output": (lambda w: w * BY_OUTPUT, BY_OUTPUT),
    "twice": (lambda w: -(w * BY_OUTPUT) / 2, -BY_OUTPUT / 2),
    "entry by entry": (lambda w: w * FULL, FULL),
}


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("name", SCALES)
def test_scaled_weight(name, solver):
    scale, c = SCALES[name]
    u = updates(lambda p, x: x @ scale(p["w"]), {"w": W}, solver=solver)
    np.testing.assert_allclose(u["w"], ridge(X, X @ (W * c) - Y) / c, rtol=1e-8)


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize(
    ("mask", "live"), [(ROWS, ROWS[:, 0] > 0), (COLUMNS, np.ones(D, bool))], ids=["rows", "columns"]
)
def test_masked_rows_take_no_part(mask, live, solver):
    """The rest is solved for as if they were not there."""
    u = updates(lambda p, x: x @ (p["w"] * mask), {"w": W}, solver=solver)["w"]
    error = X @ (W * mask) - Y
    expected = np.zeros((D, K))
    expected[live] = ridge(X[:, live], error)
    np.testing.assert_allclose(u, expected * (mask != 0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_padded_weight(solver):
    def predict(p, x):
        return x @ jnp.pad(p["w"], ((1, 0), (0, 1)))

    w = W[: D - 1, : K - 1]
    error = np.pad(X[:, 1:] @ w, ((0, 0), (0, 1))) - Y
    u = updates(predict, {"w": w}, solver=solver)
    np.testing.assert_allclose(u["w"], ridge(X[:, 1:], error[:, : K - 1]), rtol=1e-8)


def test_relative_damping_counts_live_features_only():
    """It is relative to the mean eigenvalue of the features that take part."""
    with jax.enable_x64(True):

        def loss_fn(w, x):
            return jnp.mean(jnp.sum((x @ (w * ROWS) - Y) ** 2, -1)) / 2

        tx = cqjax.scale_by_consequentialism(relative_damping=0.1, damping=0.0)
        _, grads, captures = cqjax.value_and_grad(loss_fn, solver="primal")(jnp.asarray(W), X)
        u, _ = tx.update(grads, tx.init(jnp.asarray(W)), captures=captures)
    live = ROWS[:, 0] > 0
    x = X[:, live]
    lam = 0.1 * np.trace(x.T @ x) / 3
    expected = np.linalg.solve(x.T @ x + lam * np.eye(3), x.T @ (X @ (W * ROWS) - Y))
    np.testing.assert_allclose(np.asarray(u)[live], expected, rtol=1e-8)


def test_a_mask_that_differs_between_outputs_is_not_covered():
    plan = cqjax.plan(lambda w, x: jnp.mean((x @ jnp.tril(w)) ** 2))(W, X)
    assert plan.uncovered()[""] == (
        "is masked differently for different outputs, of which each needs a solve of its own; it "
        'makes a product\'s weight, which reparametrized="nearest" covers',
    )


def test_a_window_of_a_convolution_in_part():
    """A kernel that sees the past only, by a mask: as the smaller kernel alone."""
    x, k = RNG.normal(size=(5, 8, 2)), RNG.normal(size=(3, 2, 2))
    y = RNG.normal(size=(5, 16))
    mask = np.array([1.0, 1.0, 0.0]).reshape(3, 1, 1)

    def convolved(pad, mask=1.0):
        numbers = ("NWC", "WIO", "NWC")

        def predict(k, x):
            z = jax.lax.conv_general_dilated(x, k * mask, (1,), [pad], dimension_numbers=numbers)
            return z.reshape(5, -1)

        return predict

    for solver in ("primal", "dual"):
        u = updates(convolved((1, 1), mask), k, x, y, solver=solver)
        v = updates(convolved((1, 0)), k[:2], x, y, solver=solver)
        np.testing.assert_allclose(u[:2], v, rtol=1e-8)
        assert not u[2].any()


BIASED = {
    "scaled product": (lambda p, x: (x @ p["w"]) / 4 + p["b"], 0.25, 1.0),
    "scaled by output": (lambda p, x: (x @ p["w"]) * BY_OUTPUT + p["b"], BY_OUTPUT, 1.0),
    "subtracted": (lambda p, x: x @ p["w"] - p["b"], 1.0, -1.0),
    "subtracted from": (lambda p, x: p["b"] - x @ p["w"], -1.0, 1.0),
    "scaled bias": (lambda p, x: x @ (p["w"] / 2) + p["b"] * 3, 0.5, 3.0),
    "scaled bias by output": (lambda p, x: x @ p["w"] + p["b"] / BY_OUTPUT, 1.0, 1 / BY_OUTPUT),
}


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("name", BIASED)
def test_scaled_product_and_bias(name, solver):
    """The layer's output is what the bias is added to."""
    predict, c, k = BIASED[name]
    u = updates(predict, {"w": W, "b": B}, solver=solver)
    joined = np.concatenate([X, np.ones((N, 1))], 1)
    both = ridge(joined, X @ (W * c) + B * k - Y)
    np.testing.assert_allclose(u["w"], both[:-1] / c, rtol=1e-8)
    np.testing.assert_allclose(u["b"], both[-1] / k, rtol=1e-8)


def test_one_step_solves_a_scaled_layer():
    x = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)
    params = {"w": jnp.zeros((5, 2)), "b": jnp.zeros(2)}

    def loss_fn(p, x):
        return 0.5 * jnp.mean(jnp.sum((x @ p["w"] / 16 + p["b"] - x[:, :2]) ** 2, -1))

    tx = cqjax.scale_by_consequentialism(damping=1e-6, relative_damping=0.0)
    loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
    u, _ = tx.update(grads, tx.init(params), captures=captures)
    after = loss_fn(jax.tree.map(jnp.subtract, params, u), x)
    assert after < 1e-6 * loss


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_one_weight_at_two_scales(solver):
    """Z₂ = 3 X₂ V is a product of V with 3 X₂."""
    x2 = RNG.normal(size=(N, D))

    def predict(p, x):
        return jnp.concatenate([x @ p["w"], x2 @ (3 * p["w"])], -1)

    y = np.concatenate([Y, Y], 1)
    u = updates(predict, {"w": W}, y=y, solver=solver, batch_size=N)
    rows = np.concatenate([X, 3 * x2])
    np.testing.assert_allclose(u["w"], ridge(rows, rows @ W - np.concatenate([Y, Y])), rtol=1e-8)


def test_changed_updates_of_a_slice_that_is_scaled():
    """What no layer covers keeps its update, and weight decay before is preconditioned, too."""

    def loss_fn(w, x):
        return 0.5 * jnp.mean(jnp.sum((x @ (w[1:] / 4) - Y) ** 2, -1)) + jnp.sum(w[0])

    w = RNG.normal(size=(D + 1, K))
    for solver in ("primal", "dual"):
        with jax.enable_x64(True):
            params = jnp.asarray(w)
            tx = cqjax.scale_by_consequentialism(damping=LAM, relative_damping=0.0)
            _, grads, captures = cqjax.value_and_grad(loss_fn, solver=solver)(
                params, jnp.asarray(X)
            )
            u, _ = tx.update(grads + 0.1 * params, tx.init(params), captures=captures)
        xx = X.T @ X + LAM * np.eye(D)
        handed = X.T @ (X @ w[1:] / 4 - Y) / N + 4 * 0.1 * w[1:]
        np.testing.assert_allclose(u[1:], 4 * N * np.linalg.solve(xx, handed), rtol=1e-8)
        np.testing.assert_allclose(u[0], 1 + 0.1 * w[0], rtol=1e-8)


def test_output_change_is_that_of_the_scaled_weight():
    """The clip compares X (c ΔV) with X (c V)."""
    c = np.array([100.0, 1.0, 1.0])

    def loss_fn(v, x):
        return jnp.mean(jnp.sum((x @ (v * c) - Y) ** 2, -1))

    with jax.enable_x64(True):
        params, u = jnp.asarray(W), jnp.asarray(RNG.normal(size=(D, K)))
        _, _, captures = cqjax.value_and_grad(loss_fn, solver="dual")(params, jnp.asarray(X))
        tx = cqjax.clip_by_output_change(1e-3, learning_rate=1.0)
        clipped, _ = tx.update(u, tx.init(params), params, captures=captures)
    moved = np.linalg.norm(X @ (np.asarray(clipped) * c))
    np.testing.assert_allclose(moved, 1e-3 * np.linalg.norm(X @ (W * c)), rtol=1e-6)


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_vmap_of_cond(solver):
    """Becomes a selection of broadcast weights whose gradient is stopped in the other rows."""
    takes = np.array([True, False, True, True, False, True, False])

    def predict(p, x):
        def one(x, take):
            return jax.lax.cond(take, lambda x: x @ p["a"], lambda x: x @ p["b"], x)

        return jax.vmap(one)(x, takes)

    def selected(p, x):
        return jnp.where(takes[:, None], x @ p["a"], x @ p["b"])

    params = {"a": W, "b": -W}
    u, v = (updates(f, params, solver=solver) for f in (predict, selected))
    error = np.where(takes[:, None], X @ W, -X @ W) - Y
    for path, kept in (("a", takes), ("b", ~takes)):
        np.testing.assert_allclose(u[path], v[path], rtol=1e-8)
        np.testing.assert_allclose(u[path], ridge(X, error * kept[:, None]), rtol=1e-8)


def test_arrays_among_the_arguments_are_no_constants():
    """Under `jax.jit` they are not known: so they never are."""

    def loss_fn(w, x, mask):
        return jnp.mean((x @ (w * mask)) ** 2)

    for mask in (FULL, jnp.asarray(FULL, jnp.float32)):
        plan = cqjax.plan(loss_fn, batch_size=N)(W, X, mask)
        (reason,) = plan.uncovered()[""]
        assert reason.startswith("enters `mul`, which is no matrix product")


def test_captures_of_scaled_weights_cross_jit():
    """The constants are hashable: the second call is not traced anew."""
    traces = []

    def loss_fn(w, x):
        traces.append(1)
        return jnp.mean((x @ (w * jnp.asarray(BY_INPUT, jnp.float32))) ** 2)

    w, x = jnp.asarray(W, jnp.float32), jnp.asarray(X, jnp.float32)
    tx = cqjax.scale_by_consequentialism()
    differentiate, update = jax.jit(cqjax.value_and_grad(loss_fn)), jax.jit(tx.update)
    for _ in range(2):
        _, grads, captures = differentiate(w, x)
        update(grads, tx.init(w), captures=captures)
    assert len(traces) == update._cache_size() == 1


@pytest.mark.parametrize("by", [0.5, BY_OUTPUT])
def test_back_matching_rates_of_a_scaled_weight(by):
    """A parameter times c moves its product c² times as fast."""

    def network(params, x, by):
        return jnp.mean((jax.nn.relu(x @ (params["w"] * by)) @ params["v"]) ** 2)

    def rates(w, by):
        params = {"w": jnp.asarray(w), "v": jnp.ones((K, 2))}
        plan = cqjax.plan(lambda p, x: network(p, x, by))(params, X)
        return cqjax.back_matching_rates(plan, params)

    scaled, plain = rates(W, by), rates(W * by, 1)
    expected = np.broadcast_to(plain["w"] / np.square(by), (D, K))
    np.testing.assert_allclose(scaled["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(scaled["v"], plain["v"], rtol=1e-5)


def test_back_matching_rates_of_a_scaled_weight_in_parts():
    """Its bias has no parts. The rates do not depend on how a weight is solved for."""
    params = {"u": jnp.ones((D, 6)), "w": jnp.ones((6, K)), "b": jnp.ones(K)}

    def loss_fn(params, x):
        hidden = jax.nn.relu(x @ params["u"])
        return jnp.mean(jnp.sum(jnp.tanh(hidden @ (params["w"] * 0.5) + params["b"]), -1))

    x = jnp.ones((12, D))
    whole, parts = (
        cqjax.back_matching_rates(cqjax.plan(loss_fn, **options)(params, x), params)
        for options in ({}, {"max_dim": 3, "block_size": 3, "solver": "primal"})
    )
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
