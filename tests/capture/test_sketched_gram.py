"""XᵀX of random sums of rows: which sums, right in the mean, and where there are none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import cqjax
from cqjax.linalg import gram

pytestmark = pytest.mark.usefixtures("float64")

N, D, OUT, WANTED = 70, 2, 3, 8  # 70 rows are summed by eights: 8 = 70 // (4 · 2)


def sums(x):
    """The sums of rows, by a matrix of signs that is written out."""
    together = len(x) // WANTED
    length = -(-len(x) // together)
    signs = np.asarray(jax.random.rademacher(jax.random.key(0), (len(x), 1), jnp.float64))[:, 0]
    mixing = np.zeros((length, len(x)))
    mixing[np.arange(len(x)) % length, np.arange(len(x))] = signs
    assert (np.abs(mixing).sum(0) == 1).all()  # each row is in one sum
    return mixing @ x


def problem(bias):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(D, OUT)))}
    if bias:
        params["b"] = jnp.asarray(rng.normal(size=OUT))
    return params, jnp.asarray(rng.normal(size=(N, D))), jnp.asarray(rng.normal(size=(N, OUT)))


def loss_fn(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((x @ params["w"] + params.get("b", 0) - y) ** 2, -1))


@pytest.mark.parametrize("bias", [False, True])
def test_the_update_is_numpys(bias):
    params, x, y = problem(bias)
    differentiate = cqjax.value_and_grad(loss_fn, capture=cqjax.SketchedGram)
    _, grads, captures = jax.jit(differentiate)(params, x, y)
    tx = cqjax.scale_by_consequentialism(relative_damping=0.1)
    updates, _ = tx.update(grads, tx.init(params), params, captures=captures)
    rows = np.concatenate([x, np.ones((N, 1))], 1) if bias else np.asarray(x)
    gradient = np.concatenate([grads["w"], grads["b"][None]]) if bias else grads["w"]
    few = sums(rows)
    xx = few.T @ few
    damped = xx + 0.1 * np.trace(xx) / len(xx) * np.eye(len(xx))
    want = N * np.linalg.solve(damped, gradient)
    got = np.concatenate([updates["w"], updates["b"][None]]) if bias else updates["w"]
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_right_in_the_mean():
    """Over many inputs with their own signs: as if the signs changed from batch to batch."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(N, D)) + 1.0
    errors = []
    for _ in range(300):
        signs = rng.choice([-1.0, 1.0], size=(N, 1))
        few = np.asarray(gram.sketched(jnp.asarray(signs * x)[None], WANTED))[0]
        errors.append(few.T @ few - x.T @ x)
    mean, spread = np.mean(errors, 0), np.std(errors, 0) / len(errors) ** 0.5
    assert (np.abs(mean) < 4 * spread + 1e-9).all(), (mean, spread)


@pytest.mark.parametrize("rows", [1, WANTED, 2 * WANTED - 1])
def test_few_rows_stay_as_they_are(rows):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, rows, D)))
    np.testing.assert_array_equal(gram.sketched(x, WANTED), x)


@pytest.mark.parametrize("name", ["mlp", "conv_grouped", "scan_layers", "microbatch_scan"])
def test_elsewhere_it_is_the_gram_matrix(name):
    """Few rows, convolutions, lookups and loops: bit for bit."""
    loss, params, args = zoo.by_name(name).make(jnp.float64)
    moments = []
    for capture in (cqjax.Gram, cqjax.SketchedGram):
        differentiate = cqjax.value_and_grad(loss, capture=capture, batch_size=1)
        captures = jax.jit(lambda p, d=differentiate: d(p, *args)[2])(params)
        moments.append([block.second_moment() for block in captures.blocks])
    for one, other in zip(*moments, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_step_trains():
    params, x, y = problem(bias=True)
    differentiate = cqjax.value_and_grad(loss_fn, capture=cqjax.SketchedGram)
    tx = cqjax.cadam(0.1)
    state, losses = tx.init(params), []
    step = jax.jit(lambda p, s: (differentiate(p, x, y), s))
    for _ in range(30):
        (loss, grads, captures), state = step(params, state)
        updates, state = tx.update(grads, state, params, captures=captures)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
