"""Training steps with a symbolic number of examples, as `jax.export` makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import cqjax

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "b": jnp.zeros(4),
    "v": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32),
}


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return 0.5 * jnp.mean(jnp.sum((hidden @ params["v"] - y) ** 2, -1))


def shape(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def exported(step, *args):
    """A step with shapes in the place of arrays."""
    return export.export(jax.jit(step))(*jax.tree.map(shape, args)).call


def update_of(tx, loss_fn=loss_fn, **options):
    def step(params, state, *batch):
        _, grads, captures = cqjax.value_and_grad(loss_fn, **options)(params, *batch)
        captures = jax.jit(lambda captures: captures)(captures)  # N is an array like the others
        return tx.update(grads, state, params, captures=captures)[0]

    return step


def batch(n):
    return RNG.normal(size=(n, 3)).astype(np.float32), RNG.normal(size=(n, 2)).astype(np.float32)


def symbolic():
    (b,) = export.symbolic_shape("b")
    return [jax.ShapeDtypeStruct((b, width), jnp.float32) for width in (3, 2)]


@pytest.mark.parametrize("options", [{}, {"solver": "primal"}, {"signal": "matched"}])
def test_updates_equal_numpys(options):
    """Of few rows and of many: λ = half of XᵀX's mean eigenvalue, of which there are rank(X)."""
    tx = cqjax.scale_by_consequentialism(relative_damping=0.5)
    step = exported(update_of(tx, **options), PARAMS, tx.init(PARAMS), *symbolic())
    for n in (2, 7):
        x, y = batch(n)
        updates = step(PARAMS, tx.init(PARAMS), x, y)
        w, b, v = (np.asarray(PARAMS[key], np.float64) for key in "wbv")
        h = np.tanh(x @ w + b)
        gram = h.T @ h
        ridge = gram + 0.5 * np.trace(gram) / min(n, 4) * np.eye(4)
        want = np.linalg.solve(ridge, h.T @ (h @ v - y))
        np.testing.assert_allclose(updates["v"], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [cqjax.csgd, cqjax.cadam, cqjax.cnesterov])
def test_optimizers(make):
    """With their limits, for which all rows are used where their number is not known."""
    tx = make(0.1)
    primal = update_of(tx, solver="primal")
    step, state = exported(primal, PARAMS, tx.init(PARAMS), *symbolic()), tx.init(PARAMS)
    got, want = step(PARAMS, state, *(data := batch(7))), jax.jit(primal)(PARAMS, state, *data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_convolutions_lookups_and_tokens():
    """Two symbolic sizes: of images and texts, and of the texts' length."""
    params = {
        "k": jnp.asarray(RNG.normal(size=(3, 3, 1, 2)), jnp.float32),
        "table": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
        "w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32),
    }

    def loss(params, images, texts):
        numbers = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(
            images, params["k"], (1, 1), "SAME", dimension_numbers=numbers
        )
        tokens = params["table"][texts] @ params["w"]
        return jnp.mean((jnp.tanh(z).mean((1, 2)) + jnp.tanh(tokens).mean(1)) ** 2)

    b, t = export.symbolic_shape("b, t")
    shapes = (
        jax.ShapeDtypeStruct((b, 4, 4, 1), jnp.float32),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
    )
    plan = cqjax.plan(loss)(params, *shapes)
    assert "8*b" not in str(plan) and "b*t" in str(plan) and plan.batch_size is None
    assert "N = the computed divisor" in str(plan)
    assert [block.solver for block in plan.blocks] == ["primal", "diagonal", "primal"]
    tx = cqjax.scale_by_consequentialism()
    step = exported(update_of(tx, loss), params, tx.init(params), *shapes)
    data = RNG.normal(size=(9, 4, 4, 1)).astype(np.float32), RNG.integers(0, 5, (9, 6), np.int32)
    got = step(params, tx.init(params), *data)
    want = jax.jit(update_of(tx, loss, solver="primal"))(params, tx.init(params), *data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_a_symbolic_batch_size():
    tx = optax.chain(cqjax.scale_by_consequentialism())

    def step(params, state, x, y):
        return update_of(tx, batch_size=2 * x.shape[0])(params, state, x, y)

    got = exported(step, PARAMS, tx.init(PARAMS), *symbolic())(PARAMS, tx.init(PARAMS), *batch(7))
    assert jnp.isfinite(got["w"]).all()


def test_the_dual_needs_a_number():
    with pytest.raises(ValueError, match=r'solver="dual" needs the number of rows of w, .* is b:'):
        cqjax.plan(loss_fn, solver="dual")(PARAMS, *symbolic())
