"""Updates of 16-bit models against float64 NumPy, where an earlier member scales the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_layer import expected, first_step, problem, squared_error

import cqjax

LAMBDA = 1e-3
SCALED = {
    "clipped": optax.clip_by_global_norm(0.1),
    "by 1e-3": optax.scale(1e-3),
    # Times a gradient below .4 that is subnormal in float16: its entries have few digits, or none.
    "by 1e-5": optax.scale(1e-5),
}


def rounded(dtype, n=16, d=64, o=3, bias=True):
    """A problem whose numbers 16 bits hold, in that dtype; float64 may compute with the same."""
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, dtype), problem(n, d, o, bias=bias))
    return jax.tree.map(lambda w: w / 8, params), x, y


def loss_of(params, x, y, scale=1.0):
    """`squared_error`, whose output gradients are as exact as 16 bits can be."""
    return squared_error(params, x, y).astype(jnp.float32) * scale


def assert_near(got, want, tolerance):
    """Relative to the length, since the signal that comes in has been rounded to 16 bits."""
    for key, right in want.items():
        error = np.linalg.norm(np.asarray(got[key], np.float64) - right)
        assert error <= tolerance * np.linalg.norm(right), (key, error, np.linalg.norm(right))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scaled", SCALED)
def test_a_scaled_gradient(scaled, dtype):
    """The update is the unscaled gradient's, times the scale: 1/λ meets no rounding error."""
    params, x, y = rounded(dtype)
    tx = cqjax.scale_by_consequentialism(damping=LAMBDA, relative_damping=0.0)
    before = SCALED[scaled]
    grads, _, updates, state = first_step(
        optax.chain(before, tx), loss_of, params, x, y, solver="dual"
    )
    assert state[1].fallbacks.sum() == 0
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, y))
    want = expected(*exact, LAMBDA)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    scaled_grads, _ = before.update(grads, before.init(grads))
    factor = np.linalg.norm(scaled_grads["w"]) / np.linalg.norm(grads["w"])
    assert_near(updates, {key: factor * u for key, u in want.items()}, 0.03)


def test_what_is_added_counts_still():
    """Above the rounding of bfloat16, a term that an earlier member adds is preconditioned."""
    params, x, y = rounded(jnp.bfloat16, 64, 16)
    tx = cqjax.scale_by_consequentialism(damping=1.0, relative_damping=0.0)
    chain = optax.chain(optax.add_decayed_weights(0.5), tx)
    grads, _, updates, _ = first_step(chain, loss_of, params, x, y, solver="dual")
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, y, grads))
    incoming = {key: exact[3][key] + 0.5 * exact[0][key] for key in params}
    assert_near(updates, expected(*exact[:3], 1.0, incoming), 0.03)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_gradients_whose_squares_float32_cannot_hold(size):
    params, x, y = rounded(jnp.float32, 6, 9)
    tx = cqjax.scale_by_consequentialism(damping=LAMBDA, relative_damping=0.0)
    loss = functools.partial(loss_of, scale=size)
    chain = optax.chain(optax.scale(0.3), tx)
    _, _, updates, _ = first_step(chain, loss, params, x, y, solver="dual")
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x, y))
    want = {key: 0.3 * size * u for key, u in expected(*exact, LAMBDA).items()}
    assert_near(updates, want, 1e-3)


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def trained(dtype, scale, damping, steps=30, spoil=None):
    """(losses, parameters) of a network of two layers, its loss multiplied by a scale."""
    rng = np.random.default_rng(0)
    sizes = {"w": (32, 32), "b": (32,), "v": (32, 2), "c": (2,)}
    params = {key: rng.normal(size=s) / 6 for key, s in sizes.items()}
    x = rng.normal(size=(16, 32))
    y = np.tanh(x @ rng.normal(size=(32, 2)) / 4)
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, x, y))
    tx = optax.chain(cqjax.scale_by_consequentialism(**damping), optax.sgd(0.2))

    def loss_fn(params, x, y, scale):
        errors = (network(params, x) - y).astype(jnp.float32)
        return scale * jnp.mean(jnp.sum(errors**2, -1))

    @jax.jit
    def step(params, state, scale):
        loss, grads, captures = cqjax.value_and_grad(loss_fn, solver="dual")(params, x, y, scale)
        grads = jax.tree.map(lambda g: (g / scale).astype(g.dtype), grads)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss / scale

    state, losses = tx.init(params), []
    for i in range(steps):
        params, state, loss = step(params, state, spoil if i == 10 and spoil else scale)
        losses.append(float(loss))
    return losses, params


def test_loss_scaling_trains_as_float32_does():
    damping = {"damping": LAMBDA, "relative_damping": 0.0}
    want, _ = trained(jnp.float32, 1.0, damping)
    assert want[-1] < 1e-6 * want[0]
    for scale in (2.0**15, 1000.0):
        got, _ = trained(jnp.float16, scale, damping)
        np.testing.assert_allclose(got, want, rtol=0.05, atol=1e-6 * want[0])


def test_a_step_that_overflows_leaves_finite_parameters():
    """A loss scale that is too large for float16, in one step of many."""
    losses, params = trained(jnp.float16, 1024.0, {}, 30, spoil=2.0**40)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert losses[-1] < 0.2 * losses[0]
