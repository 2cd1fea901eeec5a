"""The losses against the NeuronLearning notes' formulas, in float64 NumPy, and at their corners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cqjax


def p_norm(x, target, p=2.0):
    """Eq. 14: the loss and its gradient, for vectors."""
    error = x - target
    return np.sum(np.abs(error) ** p) / p, np.sign(error) * np.abs(error) ** (p - 1)


def kullback_leibler(x, target):
    """Eq. 15."""
    return np.sum(x * np.log(x / target)), np.log(x / target) + 1


def normalized_kullback_leibler(x, target):
    """Eq. 16."""
    total = np.sum(x)
    loss = np.sum(x * np.log(x / (total * target))) / total
    return loss, (np.log(x / (total * target)) - loss) / total


LOSSES = [
    (functools.partial(cqjax.p_norm_loss, p=1.0), functools.partial(p_norm, p=1.0)),
    (functools.partial(cqjax.p_norm_loss, p=1.5), functools.partial(p_norm, p=1.5)),
    (cqjax.p_norm_loss, p_norm),
    (cqjax.kullback_leibler, kullback_leibler),
    (cqjax.normalized_kullback_leibler, normalized_kullback_leibler),
]
NAMES = ["1-norm", "1.5-norm", "2-norm", "kl", "normalized-kl"]
each_loss = pytest.mark.parametrize(("loss", "printed"), LOSSES, ids=NAMES)
each_divergence = pytest.mark.parametrize(
    "loss", [cqjax.kullback_leibler, cqjax.normalized_kullback_leibler], ids=NAMES[-2:]
)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(loss, *args):
    return jax.value_and_grad(loss)(*args)


POSITIVE = hnp.arrays(np.float64, (2, 5), elements=st.floats(1e-12, 1e3))
SCALE = st.sampled_from([1e-30, 1.0, 1e30])


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0])
@settings(max_examples=25, deadline=None)
@given(pair=POSITIVE, scale=SCALE)
def test_p_norms_are_the_printed_ones(p, pair, scale):
    x, target = scale * pair
    with jax.enable_x64(True):
        got = value_and_grad(cqjax.p_norm_loss, x, target, p)
    for ours, want in zip(got, p_norm(x, target, p), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-12)


@each_divergence
@settings(max_examples=50, deadline=None)
@given(pair=POSITIVE, scale=SCALE)
def test_divergences_are_the_printed_ones(loss, pair, scale):
    x, target = scale * pair[0], pair[1] / pair[1].sum()
    with jax.enable_x64(True):
        value, gradient = value_and_grad(loss, x, target)
    normalized = loss is cqjax.normalized_kullback_leibler
    want, slopes = (normalized_kullback_leibler if normalized else kullback_leibler)(x, target)
    # A logarithm near 100 has an error of 1e-14, and is weighted by x, or by x / X.
    weights = x / x.sum() if normalized else x
    noise = 1e-13 * weights.sum()
    np.testing.assert_allclose(value, want, rtol=1e-13, atol=noise)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-13, atol=noise / x.sum())


@each_loss
def test_gradients_are_the_slopes_of_the_values(loss, printed):
    """Central differences; in the targets too, for which nothing is printed."""
    pair = np.random.default_rng(0).uniform(0.1, 1, (2, 4))
    shifts = 1e-6 * np.eye(8).reshape(8, 2, 4)
    with jax.enable_x64(True):
        ends = jax.jit(loss)(*np.moveaxis([pair + shifts, pair - shifts], -2, 0))
        gradients = jax.jit(jax.grad(loss, (0, 1)))(*pair)
    slopes = np.subtract(*np.asarray(ends)) / 2e-6
    np.testing.assert_allclose(np.ravel(gradients), slopes, rtol=1e-7)


@each_loss
def test_axes_and_batches(loss, printed):
    x, target = np.random.default_rng(1).uniform(0.1, 1, (2, 3, 4, 5))
    with jax.enable_x64(True):
        for axis in (-1, (0, 2), None):
            got = jax.jit(functools.partial(loss, axis=axis))(x, target)
            along = range(3) if axis is None else np.atleast_1d(axis) % 3
            rest = [i for i in range(3) if i not in along]
            a, b = (np.transpose(array, [*rest, *along]) for array in (x, target))
            shape = a.shape[: len(rest)]
            rows = zip(a.reshape(got.size, -1), b.reshape(got.size, -1), strict=True)
            want = [printed(*row)[0] for row in rows]
            np.testing.assert_allclose(got, np.reshape(want, shape), rtol=1e-12)
        mapped = jax.jit(jax.vmap(loss, 1, 1))(x, target)
        np.testing.assert_allclose(mapped, jax.jit(loss)(x, target), rtol=1e-12)


@each_loss
def test_what_does_not_count_may_be_anything(loss, printed):
    x, target = np.random.default_rng(2).uniform(0.1, 1, (2, 2, 4))
    counts = np.array([[True, False, True, True], [False, True, True, False]])
    spoilt, marred = np.where(counts, x, -np.inf), np.where(counts, target, np.nan)
    with jax.enable_x64(True):
        masked = functools.partial(loss, where=counts)
        values, pull = jax.jit(functools.partial(jax.vjp, masked))(spoilt, marred)
        gradient, _ = pull(np.ones(2))
    np.testing.assert_array_equal(gradient[~counts], 0)
    for i, row in enumerate(counts):
        want, slopes = printed(x[i][row], target[i][row])
        np.testing.assert_allclose(values[i], want, rtol=1e-12)
        np.testing.assert_allclose(gradient[i][row], slopes, rtol=1e-9, atol=1e-12)


@each_loss
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(loss, printed, dtype):
    """Losses and gradients in the dtype of the predictions, as exact as it is."""
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        x, target = jnp.asarray(rng.uniform(0.1, 1, (2, 300)), dtype)
        value, gradient = value_and_grad(loss, x, target)
        assert value.dtype == gradient.dtype == dtype
        want, slopes = printed(np.asarray(x, np.float64), np.asarray(target, np.float64))
        rtol = float(jnp.finfo(dtype).eps) * (4 if dtype == "float32" else 0.51)  # rounded once
        np.testing.assert_allclose(float(value), want, rtol=rtol)
        np.testing.assert_allclose(gradient.astype(float), slopes, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 1.25, 2.0, 3.0])
def test_p_norm_at_no_error(p):
    """The gradient is zero; so is that in p, where it is traced; p = 2 has curvature 1."""
    x = jnp.array([0.5, 1.0])
    target = jnp.array([0.5, 0.0])
    value, gradient = jax.value_and_grad(cqjax.p_norm_loss)(x, target, p)
    assert (value, gradient.tolist()) == (1 / jnp.float32(p), [0, 1])
    traced = jax.jit(jax.grad(cqjax.p_norm_loss, (0, 2)))(x, target, jnp.float32(p))
    np.testing.assert_array_equal(traced[0], gradient)
    np.testing.assert_allclose(traced[1], -1 / p**2, rtol=1e-6)
    if p >= 2:
        hessian = jax.jit(jax.hessian(cqjax.p_norm_loss))(x, target, p)
        np.testing.assert_array_equal(hessian, [[p == 2, 0], [0, p - 1]])


def test_p_norm_is_optaxs_l2_loss_at_two():
    x, target = jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.zeros((2, 2))
    np.testing.assert_allclose(cqjax.p_norm_loss(x, target), optax.l2_loss(x, target).sum(-1))


def test_kullback_leibler_is_optaxs_the_other_way_round():
    x, target = np.random.default_rng(3).uniform(0.1, 1, (2, 5)).astype(np.float32)
    want = optax.kl_divergence(jnp.log(target), jnp.asarray(x))
    np.testing.assert_allclose(cqjax.kullback_leibler(x, target), want, rtol=1e-6)


CORNERS = {  # x, x̄; what the loss is; the gradients of the plain and of the normalised loss
    "zero output": ([0.0, 1.0], [0.5, 0.5], np.log(2), [-85.6434, 1.693147], [-87.3365, 0.0]),
    "zero target": ([0.5, 0.5], [0.0, 1.0], 42.9751, [87.6434, 0.306853], [43.6683, -43.6683]),
    "both": ([0.0, 1.0], [0.0, 1.0], 0.0, [1.0, 1.0], [0.0, 0.0]),
    "no output": ([0.0, 0.0], [0.5, 0.5], 0.0, [-85.6434] * 2, [-85.6434] * 2),
    "equal": ([0.25, 0.75], [0.25, 0.75], 0.0, [1.0, 1.0], [0.0, 0.0]),
}


@functools.partial(jax.jit, static_argnums=0)
def derivatives(loss, x, target):
    """The value, both gradients and the Hessian."""
    value, (gradient, of_target) = jax.value_and_grad(loss, (0, 1))(x, target)
    return value, gradient, of_target, jax.hessian(loss)(x, target)


@pytest.mark.parametrize("corner", CORNERS)
def test_corners_of_kullback_leibler(corner):
    """The printed formulas with ε for zeros in the logarithms; all of it is finite."""
    x, target, want, plain, normalized = CORNERS[corner]
    x, target = jnp.array(x), jnp.array(target)
    for loss, slopes in (
        (cqjax.kullback_leibler, plain),
        (cqjax.normalized_kullback_leibler, normalized),
    ):
        value, gradient, *others = derivatives(loss, x, target)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)
        assert all(np.isfinite(other).all() for other in others)


@pytest.mark.parametrize("exponent", [-36, -30, -20, 20, 30])
def test_normalized_kullback_leibler_does_not_depend_on_the_scale(exponent):
    """Nor do its derivatives overflow, down to the smallest sums in float32."""
    x, target = np.array([1.0, 3.0, 4.0]), np.array([0.5, 0.25, 0.25])
    want, slopes = normalized_kullback_leibler(x, target)
    scale = 10.0**exponent
    loss, (a, b) = cqjax.normalized_kullback_leibler, jnp.float32([x * scale, target])
    value, gradient = value_and_grad(loss, a, b)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes / scale, rtol=1e-5)
    assert abs(np.sum(np.float64(a) * np.float64(gradient))) < 1e-6  # Eq. 13


def test_least_values():
    """Of the plain divergence at x̄ / e, of the normalised one wherever x is in proportion to x̄."""
    target = jnp.array([0.1, 0.2, 0.7])
    _, gradient = value_and_grad(cqjax.kullback_leibler, target / np.e, target)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    value, gradient = value_and_grad(cqjax.normalized_kullback_leibler, 9 * target, target)
    np.testing.assert_allclose([value, *gradient], 0, atol=1e-6)


GOOD = np.ones((2, 3), np.float32)
ERRORS = [
    (GOOD[:1], GOOD, r"predictions have shape \(1, 3\) and targets \(2, 3\).*broadcast_to"),
    (GOOD, np.ones(3), r"predictions have shape \(2, 3\) and targets \(3,\)"),
    (np.ones((2, 3), int), GOOD, "predictions are of dtype int32: expected a floating dtype"),
    (GOOD, GOOD.astype(complex), "targets are of dtype complex64: expected a floating dtype"),
]


@each_loss
@pytest.mark.parametrize(("x", "target", "message"), ERRORS)
def test_errors(loss, printed, x, target, message):
    with pytest.raises(ValueError, match=message):
        loss(x, target)
    with pytest.raises(ValueError, match=message):
        jax.jit(loss)(x, target)


@each_divergence
def test_negative_entries(loss):
    """Refused where they are known and count."""
    bad = np.array([0.5, -0.25], np.float32)
    good = np.array([0.5, 0.5], np.float32)
    with pytest.raises(ValueError, match="predictions have an entry -0.25: expected none below"):
        loss(bad, good)
    with pytest.raises(ValueError, match="targets have an entry -0.25: expected none below zero"):
        loss(good, bad)
    loss(bad, good, where=np.array([True, False]))
    assert jax.jit(loss)(bad, good).shape == jax.jit(loss)(good, bad).shape == ()
    jax.jit(lambda counts: loss(bad, good, where=counts))(np.array([True, False]))


@pytest.mark.parametrize("p", [0.5, 0, -1.0, float("nan"), float("inf"), np.float32(0.9)])
def test_exponents_below_one(p):
    with pytest.raises(ValueError, match=f"p={p}: expected a finite number, 1 or more"):
        cqjax.p_norm_loss(GOOD, GOOD, p)
