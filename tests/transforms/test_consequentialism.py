"""`scale_by_consequentialism` against the paper, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_layer import assert_close, direction, expected, first_step, problem, squared_error

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


SHAPES = [(3, 7, 2), (5, 5, 3), (9, 4, 2), (1, 6, 2), (6, 1, 2), (4, 3, 1), (1, 1, 1)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation_63(shape, solver, bias):
    args = problem(*shape, bias=bias)
    updates, state = direction(*args, 1e-2, solver)
    assert_close(updates, expected(*args, 1e-2))
    assert (state.count, state.fallbacks.sum()) == (1, 0)


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

    tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=0.0)

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

    tx, results = cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0), []
    for loss in (looped, at_once):
        for solver in ("dual", "primal"):
            _, _, updates, _ = first_step(tx, loss, params, x, solver=solver, batch_size=10)
            results.append(updates["w"])
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


def test_proposition_2():
    """μ-LMS towards the virtual targets z - Δz is backpropagation: any loss, any layer."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 5)), "c": rng.normal(size=(5, 3))}
    x, t = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.integers(0, 3, 6))

    def loss(params, x, t):
        z = jnp.tanh(x @ params["a"]) @ params["c"]
        return optax.softmax_cross_entropy_with_integer_labels(z, t).mean()

    _, grads, captures = jax.jit(cqjax.value_and_grad(loss, solver="dual"))(params, x, t)
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

    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    _, _, whole, _ = first_step(tx, together, {"k": kernel}, x, solver=solver)
    pair = [jnp.asarray(kernel[..., :3]), jnp.asarray(kernel[..., 3:])]
    _, _, parts, _ = first_step(tx, separate, pair, x, solver=solver)
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

    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    results = []
    for loss, params in ((scanned, {"w": jnp.asarray(stack)}), (separate, list(stack))):
        results.append(first_step(tx, loss, params, x, solver=solver)[2])
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

    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
    _, _, updates, _ = first_step(tx, total, params, x, y, loss_reduction="sum")
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
    tx = cqjax.scale_by_consequentialism(
        damping=optax.linear_schedule(1.0, 3.0, 2), relative_damping=0.0
    )
    state = tx.init(params)
    _, grads, captures = jax.jit(cqjax.value_and_grad(squared_error))(params, x, y)
    update = jax.jit(tx.update)
    for damping in (1.0, 2.0, 3.0):
        updates, state = update(grads, state, captures=captures)
        assert_close(updates, expected(params, x, y, damping))


def test_a_lookup_divides_each_row_by_its_count():
    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(7, 3)))}
    ids = jnp.asarray([[0, 2, 2], [5, 2, 0], [1, 1, -1]])

    def loss(params, ids):
        return jnp.mean(jnp.sum(jnp.tanh(params["table"][ids]) ** 2, (1, 2)))

    tx = cqjax.scale_by_consequentialism(damping=0.5, relative_damping=0.0)
    grads, _, updates, _ = first_step(tx, loss, params, ids)
    counts = np.bincount(np.asarray(ids).ravel() % 7, minlength=7)
    want = 3 * np.asarray(grads["table"]) / (counts[:, None] + 0.5)
    np.testing.assert_allclose(updates["table"], want, rtol=1e-12)
    assert not np.asarray(updates["table"])[3:5].any()


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
        tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
        return tx.update(grads, tx.init(params), captures=captures)[0]

    kept = mask > 0
    want = expected(params, x[kept], y[kept], 1e-2)
    assert_close(masked(params, x, y, mask), want)


def decayed(updates, _):
    return jax.tree.map(lambda g: g + jnp.asarray(0.1, g.dtype), updates)


@pytest.mark.parametrize("change", [None, decayed])
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
                tx = cqjax.csgd(0.1, damping=0.1, relative_damping=0.01, max_change=None)
                if change:
                    tx = optax.chain(optax.stateless(change), tx)
                _, _, updates, _ = first_step(tx, loss, params, x, solver=solver)
                assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
