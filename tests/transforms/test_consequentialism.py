"""`scale_by_consequentialism` and `scale_by_nlms` against the paper, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cqjax


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def squared_error(params, x, y):
    """Mean over examples of half the squared error, as in seed 000, Eq. 30."""
    z = x @ params["w"] + params.get("b", 0.0)
    return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))


def problem(n, d, o, *, bias=False, seed=0):
    """(params, x, y) of a linear layer with normal numbers."""
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(d, o))}
    if bias:
        params["b"] = rng.normal(size=o)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, o))
    return jax.tree.map(jnp.asarray, (params, x, y))


def direction(params, x, y, damping, solver="auto", change=None, **kwargs):
    """U of one layer, and the state; `change` is what happens to the gradient before."""
    tx = cqjax.scale_by_consequentialism(damping, **kwargs)

    @jax.jit
    def run(params, x, y):
        _, grads, captures = cqjax.value_and_grad(squared_error, solver=solver)(params, x, y)
        if change is not None:
            grads = change(grads)
        return tx.update(grads, tx.init(params), params, captures=captures)

    return run(params, x, y)


def expected(params, x, y, damping, incoming=None):
    """N (X̃ᵀX̃ + λI)⁻¹ H, in NumPy; H is the gradient by default."""
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    n = len(x)
    if "b" in params:
        x = np.concatenate([x, np.ones((n, 1))], 1)
        w = np.concatenate([params["w"], params["b"][None]])
    else:
        w = params["w"]
    h = x.T @ (x @ w - y) / n
    if incoming is not None:
        h = np.concatenate([incoming["w"], incoming["b"][None]]) if "b" in params else incoming["w"]
    u = n * np.linalg.solve(x.T @ x + damping * np.eye(x.shape[1]), h)
    return {"w": u[:-1], "b": u[-1]} if "b" in params else {"w": u}


def assert_close(got, want, rtol=1e-6):
    assert set(got) == set(want)
    for key in want:
        scale = np.abs(want[key]).max()
        np.testing.assert_allclose(got[key], want[key], rtol=rtol, atol=rtol * scale)


SHAPES = [(3, 7, 2), (5, 5, 3), (9, 4, 2), (1, 6, 2), (6, 1, 2), (4, 3, 1), (1, 1, 1)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation_63(shape, solver, bias):
    args = problem(*shape, bias=bias)
    updates, state = direction(*args, 1e-2, solver)
    assert_close(updates, expected(*args, 1e-2))
    assert (state.count, state.fallbacks) == (1, 0)


@given(
    stack=st.integers(1, 3),
    groups=st.integers(1, 3),
    n=st.integers(1, 9),
    d=st.integers(1, 9),
    o=st.integers(1, 4),
    damping=st.floats(1e-2, 1e2),
    solver=st.sampled_from(["dual", "primal", "auto"]),
    dtype=st.sampled_from([jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape_dtype_and_damping(stack, groups, n, d, o, damping, solver, dtype, seed):
    """Stacked layers, each of several groups; 16-bit models against their own rounded rows."""
    rng = np.random.default_rng(seed)
    arrays = (
        {"w": rng.normal(size=(stack, groups, d, o)), "b": rng.normal(size=(stack, groups, o))},
        rng.normal(size=(stack, n, groups, d)),
        rng.normal(size=(stack, n, groups, o)),
    )
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays)

    def loss(params, x, y):
        def layer(total, xs):
            (w, b), x, y = xs
            z = jnp.einsum("ngd,gdo->ngo", x, w) + b
            return total + jnp.sum((z - y) ** 2).astype(total.dtype) / 2, None

        weights = (params["w"], params["b"])
        return jax.lax.scan(layer, jnp.zeros((), jnp.float64), (weights, x, y))[0]

    tx = cqjax.scale_by_consequentialism(damping)

    @jax.jit
    def run(params, x, y):
        fn = cqjax.value_and_grad(loss, solver=solver, loss_reduction="sum")
        _, grads, captures = fn(params, x, y)
        return grads, captures, tx.update(grads, tx.init(params), captures=captures)[0]

    grads, captures, updates = run(params, x, y)
    assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
    grads, updates, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (grads, updates, x))
    (capture,) = captures.blocks
    rows = capture.rows() if capture.block.solver == "dual" else None
    for i in range(stack):
        for g in range(groups):
            a = np.concatenate([x[i, :, g], np.ones((n, 1))], 1)
            h = np.concatenate([grads["w"][i, g], grads["b"][i, g][None]])
            if rows is not None:  # the dual starts from the rows, not from a rounded gradient
                h = a.T @ np.asarray(rows.dz[i * groups + g], np.float64)
            want = np.linalg.solve(a.T @ a + damping * np.eye(d + 1), h)
            got = np.concatenate([updates["w"][i, g], updates["b"][i, g][None]])
            eps = float(jnp.finfo(dtype).eps)
            condition = 1 + np.linalg.norm(a, 2) ** 2 / damping
            single = condition * max(eps, 1e-15) if dtype == jnp.float64 else condition * 1e-6
            bound = (4 * eps + 10 * single) * np.abs(want).max() + 1e-12
            if rows is None:
                bound += 10 * single * np.abs(h).max() / damping
            np.testing.assert_allclose(got, want, atol=bound, rtol=0)


def test_microbatches_around_stacked_layers():
    """Rows of a loop that shares the weights go below each other, those of a stack apart."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4, 4)))}
    x = jnp.asarray(rng.normal(size=(2, 5, 4)))

    def network(params, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["w"])[0]

    def looped(params, x):
        def microbatch(total, x):
            return total + jnp.mean(network(params, x) ** 2) / 2, None

        return jax.lax.scan(microbatch, 0.0, x)[0]

    def at_once(params, x):
        return jnp.mean(network(params, x.reshape(10, 4)) ** 2)

    tx, results = cqjax.scale_by_consequentialism(0.1), []
    for loss in (looped, at_once):
        for solver in ("dual", "primal"):
            fn = cqjax.value_and_grad(loss, solver=solver, batch_size=10)
            _, grads, captures = fn(params, x)
            results.append(tx.update(grads, tx.init(params), captures=captures)[0]["w"])
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-8)


@pytest.mark.parametrize("shape", [(3, 7, 2), (5, 5, 2), (9, 4, 2)])
@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_pseudoinverse_as_damping_vanishes(shape, solver):
    if solver == "primal" and shape[0] < shape[1]:
        damping = 1e-9  # XᵀX is singular
    else:
        damping = 0.0 if (solver == "dual") == (shape[0] <= shape[1]) else 1e-9
    params, x, y = problem(*shape)
    updates, _ = direction(params, x, y, damping, solver)
    dz = np.asarray(x @ params["w"] - y) / len(x)
    assert_close(updates, {"w": len(x) * np.linalg.pinv(np.asarray(x)) @ dz}, 1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_step_with_rate_one_solves_a_linear_layer(bias):
    params, x, y = problem(5, 8, 3, bias=bias)
    updates, _ = direction(params, x, y, 0.0)
    assert squared_error(params, x, y) > 1
    after = jax.tree.map(lambda p, u: p - u, params, updates)
    assert squared_error(after, x, y) < 1e-24


def test_outputs_move_as_meant_when_rows_are_independent():
    """Z(W - μU) - Z = -μ N Z̄ (Eqs. 58 to 62)."""
    params, x, y = problem(5, 8, 3)
    updates, _ = direction(params, x, y, 0.0)
    dz = jax.grad(lambda z: 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1)))(x @ params["w"])
    moved = x @ (params["w"] - 0.3 * updates["w"]) - x @ params["w"]
    np.testing.assert_allclose(moved, -0.3 * 5 * dz, atol=1e-12)


def test_large_damping_gives_the_gradient():
    """λU -> N G."""
    params, x, y = problem(4, 6, 2, bias=True)
    updates, _ = direction(params, x, y, 1e9)
    grads = jax.grad(squared_error)(params, x, y)
    assert_close(jax.tree.map(lambda u: 1e9 * u, updates), jax.tree.map(lambda g: 4 * g, grads))


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_gives_nlms(bias):
    """Eq. 37, with ε = λ; and Eq. 36's rate in closed form."""
    params, x, y = problem(1, 6, 2, bias=bias)
    updates, _ = direction(params, x, y, 0.1)
    tx = cqjax.scale_by_nlms(0.1)
    _, grads, captures = cqjax.value_and_grad(squared_error, solver="dual")(params, x, y)
    normalised, _ = tx.update(grads, tx.init(params), captures=captures)
    norm = np.sum(np.square(x)) + bias
    assert_close(updates, normalised)
    assert_close(normalised, jax.tree.map(lambda g: np.asarray(g) / (norm + 0.1), grads))


def test_proposition_2():
    """μ-LMS towards the virtual targets z - Δz is backpropagation: any loss, any layer."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 5)), "c": rng.normal(size=(5, 3))}
    x, t = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.integers(0, 3, 6))

    def loss(params, x, t):
        z = jnp.tanh(x @ params["a"]) @ params["c"]
        return optax.softmax_cross_entropy_with_integer_labels(z, t).mean()

    _, grads, captures = cqjax.value_and_grad(loss, solver="dual")(params, x, t)
    for key in params:
        (capture,) = captures[key]
        rows, w = capture.rows(), params[key]
        z = np.asarray(rows.x[0]) @ w
        targets = z - np.asarray(rows.dz[0])
        lms = -sum(np.outer(r, e) for r, e in zip(rows.x[0], targets - z, strict=True))
        np.testing.assert_allclose(lms, grads[key], atol=1e-12)


def test_the_order_of_rows_does_not_matter():
    params, x, y = problem(6, 9, 2, bias=True)
    order = np.random.default_rng(1).permutation(6)
    first, _ = direction(params, x, y, 1e-3)
    second, _ = direction(params, x[order], y[order], 1e-3)
    assert_close(first, second, 1e-9)


def grouped(x, kernel, groups):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_groups_equal_their_separate_layers(solver):
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(3, 2, 6)), rng.normal(size=(4, 5, 4))
    target = rng.normal(size=(4, 5, 6))

    def together(params, x):
        return jnp.mean((grouped(x, params["k"], 2) - target) ** 2)

    def separate(params, x):
        z = [grouped(x[..., 2 * i : 2 * i + 2], p, 1) for i, p in enumerate(params)]
        return jnp.mean((jnp.concatenate(z, -1) - target) ** 2)

    tx = cqjax.scale_by_consequentialism(1e-2)
    _, grads, captures = cqjax.value_and_grad(together, solver=solver)({"k": kernel}, x)
    whole, _ = tx.update(grads, tx.init(grads), captures=captures)
    pair = [jnp.asarray(kernel[..., :3]), jnp.asarray(kernel[..., 3:])]
    _, grads, captures = cqjax.value_and_grad(separate, solver=solver)(pair, x)
    parts, _ = tx.update(grads, tx.init(grads), captures=captures)
    np.testing.assert_allclose(whole["k"], np.concatenate(parts, -1), atol=1e-10)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_stacked_layers_equal_separate_layers(solver):
    rng = np.random.default_rng(0)
    stack, x = rng.normal(size=(3, 4, 4)), jnp.asarray(rng.normal(size=(5, 4)))

    def scanned(params, x):
        z, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["w"])
        return jnp.mean(z**2)

    def separate(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    tx = cqjax.scale_by_consequentialism(1e-2)
    results = []
    for loss, params in ((scanned, {"w": jnp.asarray(stack)}), (separate, list(stack))):
        _, grads, captures = cqjax.value_and_grad(loss, solver=solver)(params, x)
        results.append(tx.update(grads, tx.init(grads), captures=captures)[0])
    np.testing.assert_allclose(results[0]["w"], np.stack(results[1]), atol=1e-10)


def test_batch_size_makes_the_rate_independent_of_it():
    """Repeating the batch twice changes nothing when λ is relative to what grows with it."""
    params, x, y = problem(4, 9, 2)
    single, _ = direction(params, x, y, 0.0)
    twice = [jnp.concatenate([a, a]) for a in (x, y)]
    double, _ = direction(params, *twice, 1e-10)
    assert_close(double, single, 1e-4)


def test_a_sum_needs_no_batch_size():
    params, x, y = problem(4, 9, 2)

    def total(params, x, y):
        return 4 * squared_error(params, x, y)

    _, grads, captures = cqjax.value_and_grad(total, loss_reduction="sum")(params, x, y)
    tx = cqjax.scale_by_consequentialism(1e-2)
    updates, _ = tx.update(grads, tx.init(params), captures=captures)
    assert_close(updates, expected(params, x, y, 1e-2))


@pytest.mark.parametrize("shape", [(3, 7, 2), (9, 4, 2)])
def test_relative_damping_is_in_units_of_the_mean_eigenvalue(shape):
    params, x, y = problem(*shape)
    eigenvalues = np.linalg.svd(np.asarray(x), compute_uv=False) ** 2
    want = expected(params, x, y, 0.01 + 0.1 * eigenvalues.mean())
    for solver in ("dual", "primal"):
        updates, _ = direction(params, x, y, 0.01, solver, relative_damping=0.1)
        assert_close(updates, want)


def test_damping_can_be_a_schedule():
    params, x, y = problem(4, 6, 2)
    tx = cqjax.scale_by_consequentialism(optax.linear_schedule(1.0, 3.0, 2))
    state = tx.init(params)
    _, grads, captures = cqjax.value_and_grad(squared_error)(params, x, y)
    for damping in (1.0, 2.0, 3.0):
        updates, state = tx.update(grads, state, captures=captures)
        assert_close(updates, expected(params, x, y, damping))


# What an earlier member of the chain did to the gradient.

CHANGES = {
    "scaled": lambda grads: jax.tree.map(lambda g: 0.25 * g, grads),
    "decayed": lambda grads: jax.tree.map(lambda g: g + 0.1 * jnp.cos(g), grads),
    "replaced": lambda grads: jax.tree.map(lambda g: jnp.sin(3 * g), grads),
    "zero": lambda grads: jax.tree.map(jnp.zeros_like, grads),
}


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
    tx = cqjax.scale_by_consequentialism(1e-2)
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
    for solver in ("dual", "primal"):
        _, grads, captures = cqjax.value_and_grad(loss, solver=solver)(params, x, y)
        tx = cqjax.scale_by_consequentialism(1e-2)
        updates, _ = tx.update(grads, tx.init(params), captures=captures)
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

    _, grads, captures = cqjax.value_and_grad(loss)(params, x)
    assert len(captures["w"]) == 2
    tx = cqjax.scale_by_consequentialism(1e-2)
    updates, _ = tx.update(grads, tx.init(params), captures=captures)
    a = np.asarray(x)
    u = 3 * np.linalg.solve(a.T @ a + 1e-2 * np.eye(4), np.asarray(grads["w"])[:, :4])
    np.testing.assert_allclose(updates["w"][:, :4], u, rtol=1e-6)
    np.testing.assert_array_equal(updates["w"][:, 4:], grads["w"][:, 4:])


# When a solve fails.


def test_a_singular_system_is_repaired():
    """Equal rows and λ = 0: the second attempt's damping is 1e-2 of the mean eigenvalue."""
    params, x, y = problem(1, 5, 2)
    x, y = jnp.repeat(x, 3, 0) * 2.0, jnp.repeat(y, 3, 0)
    updates, state = direction(params, x, y, 0.0, "dual")
    scale = float(jnp.sum(x**2)) / 3
    assert state.fallbacks == 1
    assert_close(updates, expected(params, x, y, 1e-2 * scale))


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_activations_leave_finite_updates(bad, solver):
    params, x, y = problem(3, 5, 2, bias=True)
    updates, state = direction(params, x.at[1, 2].set(bad), y, 1e-3, solver)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert state.fallbacks == 1


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_layer_that_fails_does_not_touch_the_others(solver):
    good, bad = problem(3, 5, 2), problem(3, 5, 2, seed=1)

    def loss(params, a, b, y):
        return squared_error(params[0], a, y) + squared_error(params[1], b, y)

    x = bad[1].at[0, 0].set(np.inf)
    fn = cqjax.value_and_grad(loss, solver=solver)
    _, grads, captures = fn([good[0], bad[0]], good[1], x, good[2])
    tx = cqjax.scale_by_consequentialism(1e-2)
    updates, state = tx.update(grads, tx.init(grads), captures=captures)
    assert_close(updates[0], expected(*good, 1e-2))
    assert np.isfinite(updates[1]["w"]).all() and state.fallbacks == 1


def test_a_zero_batch_gives_a_zero_update():
    params, x, y = problem(3, 5, 2)
    updates, _ = direction(params, jnp.zeros_like(x), y, 0.0)
    np.testing.assert_array_equal(updates["w"], 0)


# NLMS.


@pytest.mark.parametrize("bias", [False, True])
def test_nlms_normalises_row_by_row(bias):
    """Eqs. 49 and 50, as a loop; the whole is not the consequentialism update."""
    params, x, y = problem(4, 6, 2, bias=bias)
    fn = cqjax.value_and_grad(squared_error, solver="dual")
    _, grads, captures = fn(params, x, y)
    tx = cqjax.scale_by_nlms(0.01)
    updates, _ = tx.update(grads, tx.init(params), captures=captures)
    rows = np.concatenate([x, np.ones((4, 1))], 1) if bias else np.asarray(x)
    errors = np.asarray(x @ params["w"] + params.get("b", 0.0) - y)
    u = sum(np.outer(r, e) / (r @ r + 0.01) for r, e in zip(rows, errors, strict=True))
    want = {"w": u[:6], "b": u[6]} if bias else {"w": u}
    assert_close(updates, want)


def test_nlms_keeps_what_came_before():
    params, x, y = problem(4, 6, 2)
    fn = cqjax.value_and_grad(squared_error, solver="dual")
    _, grads, captures = fn(params, x, y)
    tx = cqjax.scale_by_nlms(0.01)
    update = functools.partial(tx.update, state=tx.init(params), captures=captures)
    plain, _ = update(grads)
    half, _ = update(jax.tree.map(lambda g: 0.5 * g, grads))
    np.testing.assert_allclose(half["w"], 0.5 * plain["w"], rtol=1e-9)
    orthogonal = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    overlap = jnp.vdot(orthogonal, grads["w"]) / jnp.vdot(grads["w"], grads["w"])
    orthogonal -= overlap * grads["w"]
    more, _ = update({"w": grads["w"] + orthogonal})
    np.testing.assert_allclose(more["w"], plain["w"] + orthogonal, rtol=1e-6)


def test_nlms_needs_rows():
    params, x, y = problem(9, 4, 2)
    _, grads, captures = cqjax.value_and_grad(squared_error, solver="primal")(params, x, y)
    tx = cqjax.scale_by_nlms()
    with pytest.raises(ValueError, match='rows of w were not captured.*solver="dual"'):
        tx.update(grads, tx.init(params), captures=captures)


# Lookups.


def test_a_lookup_divides_each_row_by_its_count():
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(7, 3)))}
    ids = jnp.asarray([[0, 2, 2], [5, 2, 0], [1, 1, -1]])

    def loss(params, ids):
        return jnp.mean(jnp.sum(jnp.tanh(params["table"][ids]) ** 2, (1, 2)))

    _, grads, captures = cqjax.value_and_grad(loss)(params, ids)
    tx = cqjax.scale_by_consequentialism(0.5)
    updates, _ = tx.update(grads, tx.init(params), captures=captures)
    counts = np.bincount(np.asarray(ids).ravel() % 7, minlength=7)
    want = 3 * np.asarray(grads["table"]) / (counts[:, None] + 0.5)
    np.testing.assert_allclose(updates["table"], want, rtol=1e-12)
    assert not np.asarray(updates["table"])[3:5].any()


# Programs in which the dual would be wrong if the walk took a use for what it is not. With the
# random update in the gradient's place, the primal and the dual must still be NumPy's.


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
    _, grads, captures = cqjax.value_and_grad(loss, solver=solver)(params, x)
    want = jax.grad(loss)(params, x)
    assert_close(grads, jax.tree.map(np.asarray, want), 1e-6)
    handed = {k: jnp.asarray(rng.normal(size=shape)) for k, shape in shapes.items()}
    tx = cqjax.scale_by_consequentialism(0.1)
    for incoming in (grads, handed):
        updates, _ = tx.update(incoming, tx.init(params), captures=captures)
        expected = dict(incoming)
        for capture in captures.blocks:
            expected |= solved(capture, incoming, solver)
        assert_close(updates, jax.tree.map(np.asarray, expected))


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
    _, grads, captures = cqjax.value_and_grad(loss)(params, x)
    assert not captures.blocks
    assert_close(grads, jax.tree.map(np.asarray, jax.grad(loss)(params, x)))


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

    _, grads, captures = cqjax.value_and_grad(loss, skip="v", solver="dual")(params, x)
    tx = cqjax.scale_by_consequentialism(0.1)
    updates, _ = tx.update(grads, tx.init(params), captures=captures)
    a = np.asarray(x)
    want = 5 * np.linalg.solve(a.T @ a + 0.1 * np.eye(4), np.asarray(grads["w"]))
    np.testing.assert_allclose(updates["w"], want, rtol=1e-6)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_no_damping_and_a_changed_update(solver):
    """Outside the span of the rows there is no solution: a counted repair, not infinity."""
    params, x, y = problem(3, 5, 2)
    updates, state = direction(params, x, y, 0.0, "dual", CHANGES["decayed"])
    assert state.fallbacks == 1
    scale = float((np.linalg.svd(np.asarray(x), compute_uv=False) ** 2).mean())
    incoming = jax.tree.map(np.asarray, CHANGES["decayed"](jax.grad(squared_error)(params, x, y)))
    assert_close(updates, expected(params, x, y, 1e-2 * scale, incoming))


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_an_update_that_is_not_finite(solver):
    params, x, y = problem(3, 5, 2, bias=True)
    updates, state = direction(
        params, x, y, 0.1, solver, lambda g: g | {"w": g["w"].at[0, 0].set(jnp.nan)}
    )
    assert state.fallbacks == 1
    grads = jax.grad(squared_error)(params, x, y)
    np.testing.assert_allclose(updates["b"], grads["b"], rtol=1e-9)
    np.testing.assert_allclose(updates["w"], grads["w"].at[0, 0].set(0), rtol=1e-9)


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


def test_nlms_of_a_zero_row_without_eps():
    params, x, y = problem(3, 5, 2)
    fn = cqjax.value_and_grad(squared_error, solver="dual")
    _, grads, captures = fn(params, x.at[1].set(0), y)
    tx = cqjax.scale_by_nlms(0.0)
    updates, _ = tx.update(grads, tx.init(params), captures=captures)
    assert np.isfinite(updates["w"]).all() and np.any(updates["w"])


def test_a_masked_batch_has_a_traced_size():
    params, x, y = problem(6, 9, 2)
    mask = jnp.array([1, 1, 0, 1, 0, 0.0])

    @jax.jit
    def masked(params, x, y, mask):
        def loss(params, x, y, mask):
            errors = jnp.sum((x @ params["w"] - y) ** 2, -1)
            return 0.5 * jnp.sum(mask * errors) / jnp.sum(mask)

        fn = cqjax.value_and_grad(loss, batch_size=jnp.sum(mask))
        _, grads, captures = fn(params, x * mask[:, None], y, mask)
        tx = cqjax.scale_by_consequentialism(1e-2)
        return tx.update(grads, tx.init(params), captures=captures)[0]

    kept = mask > 0
    want = expected(params, x[kept], y[kept], 1e-2)
    assert_close(masked(params, x, y, mask), want)


@pytest.mark.parametrize("change", [None, "decayed"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_under_strict_promotion(dtype, change):
    """No array is broadcast or promoted unless the code says so."""
    with (
        jax.enable_x64(False),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        for solver in ("dual", "primal"):
            for n, d in ((3, 5), (5, 3)):
                x, w = jnp.ones((n, d), dtype) / 2, jnp.ones((d, 2), dtype)

                def loss(params, x):
                    z = x @ params["w"] + params["b"][None]
                    return jnp.mean(z * z) + jnp.sum(params["e"][jnp.arange(2)])

                params = {"w": w, "b": jnp.ones(2, dtype), "e": jnp.ones((3, 1), dtype)}
                fn = cqjax.value_and_grad(loss, solver=solver)
                _, grads, captures = fn(params, x)
                if change:
                    grads = jax.tree.map(lambda g: g + jnp.asarray(0.1, dtype), grads)
                tx = cqjax.csgd(0.1, 0.1, relative_damping=0.01)
                updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, captures=captures)
                assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
