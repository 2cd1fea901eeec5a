"""`back_matching_value_and_grad` against the paper's equations, in float64 NumPy."""

import functools

import back_matching_reference as ref
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from back_matching_networks import CASES, arrays, assert_close, expected, flatten, jit
from hypothesis import given, settings
from hypothesis import strategies as st

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", CASES)
def test_signal(name):
    """Eqs. 12, 22, 26 and 30 from layer to layer, and Eq. 7 for the weights.

    The model's value and ordinary gradients are the reference's too, so that the two can only
    differ in what they say of the matched signal.
    """
    loss_fn, *inputs = arrays(name, jnp.float64)
    matched = cqjax.back_matching_value_and_grad(loss_fn, weights="plain")
    both = jit(lambda *inputs: (jax.value_and_grad(loss_fn)(*inputs), matched(*inputs)))(*inputs)
    for (value, grads), signal in zip(both, (False, True), strict=True):
        want, gradients, _ = expected(name, matched=signal)
        np.testing.assert_allclose(value, want, rtol=1e-10)
        assert_close(flatten(grads), gradients, 1e-10)


@pytest.mark.parametrize("name", ["mlp", "general", "conv_by_hand", "lenet"])
def test_weights(name):
    """Eqs. 13 and 23, all at once and as a chain of captures and consequentialism."""
    loss_fn, *inputs = arrays(name, jnp.float64)

    @jit
    def run(params, x, y):
        fn = cqjax.back_matching_value_and_grad(loss_fn, damping=0.1, relative_damping=0.0)
        _, grads, captures = cqjax.value_and_grad(loss_fn, signal="matched")(params, x, y)
        tx = cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0)
        updates, _ = tx.update(grads, tx.init(params), params, captures=captures)
        return fn(params, x, y), grads, updates

    (value, solved), grads, updates = run(*inputs)
    want, gradients, _ = expected(name, damping=0.1)
    np.testing.assert_allclose(value, want, rtol=1e-10)
    for found in (solved, updates):
        assert_close(flatten(found), gradients, 1e-8)
    assert_close(flatten(grads), expected(name)[1], 1e-10)


@pytest.mark.parametrize("name", ["mlp_by_hand", "conv", "transformer"])
def test_captures_hold_the_matched_signal(name):
    loss_fn, *inputs = arrays(name, jnp.float64)

    @jit
    def run(*inputs):
        fn = cqjax.value_and_grad(loss_fn, signal="matched", solver="dual")
        captures = fn(*inputs)[2]
        return {path: captures[path][0].rows().dz for path in captures if "kernel" in path}

    for path, dz in run(*inputs).items():
        want = expected(name)[2][path.removesuffix("/kernel")]
        dz = np.moveaxis(np.asarray(dz), 0, -2).reshape(want.shape)  # groups are features
        assert_close({path: dz}, {path: want}, 1e-10)


@pytest.mark.parametrize(
    "name, weights",
    [("mlp", "ridge"), ("conv_by_hand", "ridge"), ("norms", "plain"), ("lenet", "plain")],
)
def test_float32(name, weights):
    loss_fn, *inputs = arrays(name, jnp.float32)
    fn = cqjax.back_matching_value_and_grad(
        loss_fn, weights=weights, damping=0.1, relative_damping=0.0
    )
    _, grads = jit(fn)(*inputs)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    want = expected(name, damping=0.1 if weights == "ridge" else None)[1]
    assert_close(flatten(grads), want, 1e-4)


BATCH = functools.partial(nn.BatchNorm, use_running_average=False)
MASK = np.random.default_rng(3).random((3, 4, 6)) < [[[0.7]], [[0.7]], [[2.0]]]
NORMS = [  # a layer, the axes of its statistics, the axes of its scale, ε
    (BATCH(axis=1), (0, 2), (1,), 1e-5),
    (BATCH(axis=(1, 2), use_bias=False), (0,), (1, 2), 1e-5),
    (BATCH(use_fast_variance=False, use_scale=False, epsilon=0.1), (0, 1), (2,), 0.1),
    (nn.LayerNorm(reduction_axes=(1, 2)), (1, 2), (2,), 1e-6),
    (nn.LayerNorm(reduction_axes=1, feature_axes=1, use_bias=False), (1,), (1,), 1e-6),
    (nn.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2)), (1, 2), (1, 2), 1e-6),
    (nn.LayerNorm(use_scale=False, use_bias=False, epsilon=0.1), (2,), (2,), 0.1),
    (nn.RMSNorm(reduction_axes=(1, 2), feature_axes=(1, 2)), (1, 2), (1, 2), 1e-6),
    (nn.RMSNorm(use_scale=False), (2,), (2,), 1e-6),
    (nn.InstanceNorm(use_bias=False), (1,), (2,), 1e-6),
]


@pytest.mark.parametrize("case", range(len(NORMS)))
def test_options_of_normalisations(case):
    """Eq. 26 by the statistics' axes; with a mask (every other time), for all entries."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 6))
    layer, over, features, epsilon = NORMS[case]
    masked = case % 2 == 0
    mask = MASK if masked else np.ones_like(MASK)
    params = jax.eval_shape(layer.init, jax.random.key(0), x).get("params", {})
    params = {k: jnp.asarray(rng.normal(size=s.shape)) for k, s in params.items()}

    def loss_fn(params, x):
        norm = {k: v for k, v in params.items() if k != "shift"}
        a = x + params["shift"]
        b = layer.apply({"params": norm}, a, mask=mask if masked else None, mutable=True)[0]
        return jnp.sum(jnp.sin(b)) / len(x)

    def mean(values):
        total = np.sum(values, axis=over, keepdims=True, where=mask)
        return total / np.sum(mask, axis=over, keepdims=True)

    shape = [x.shape[i] if i in features else 1 for i in range(3)]
    scale = np.reshape(params.get("scale", np.ones(np.prod(shape))), shape)
    bias = np.reshape(params.get("bias", np.zeros(np.prod(shape))), shape)
    centre = 0.0 if isinstance(layer, nn.RMSNorm) else mean(x)
    deviation = np.sqrt(mean((x - centre) ** 2) + epsilon)
    normal = (x - centre) / deviation
    db = np.cos(normal * scale + bias) / len(x)
    rest = tuple(i for i in range(3) if i not in features)
    want = {"scale": np.sum(db * normal, rest), "bias": np.sum(db, rest)}
    want = {k: v for k, v in want.items() if k in params} | {"shift": db * deviation / scale}
    fn = cqjax.back_matching_value_and_grad(loss_fn, weights="plain")
    _, grads = jit(fn)(params | {"shift": jnp.zeros_like(x)}, x)
    assert_close(grads, want, 1e-9)


# The least-squares problems themselves.


def conv_net(params, x, y):
    """A convolution, tanh and a dense layer; `shift` makes the signal on x its gradient."""
    a = x + params["shift"]
    b = jax.lax.conv_general_dilated(
        a, params["conv"], (2,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    z = jnp.tanh(b).reshape(len(x), -1) @ params["fc"]
    return 0.5 * jnp.sum((z - y) ** 2) / len(x)


def test_least_squares():
    """Eqs. 8, 10 and 11, solved by LAPACK one weight vector and one input at a time."""
    rng = np.random.default_rng(0)
    n = 16
    kernel, w, shift = (rng.normal(size=s) for s in [(3, 2, 3), (9, 4), (n, 6, 2)])
    x, y = rng.normal(size=(n, 6, 2)), rng.normal(size=(n, 4))
    params = {"conv": kernel, "fc": w, "shift": shift}

    def conv(a, kernel):
        shape = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(a, kernel, (2,), [(1, 0)], dimension_numbers=shape)

    a = x + shift
    b = np.asarray(conv(a, kernel)).reshape(n, 9)
    error = np.tanh(b) @ w - y  # N δz

    def solve(matrix, right):
        return np.linalg.lstsq(matrix, right, rcond=None)[0]

    want = {"fc": np.stack([solve(np.tanh(b), error[:, k]) for k in range(4)], 1)}  # Eq. 10
    db = np.stack([solve(w[j][:, None], error.T)[0] for j in range(9)], 1)  # Eq. 11
    db *= 1 - np.tanh(b) ** 2
    by_weight = np.asarray(jax.jacobian(lambda k: conv(a, k))(kernel)).reshape(n * 9, -1)
    want["conv"] = solve(by_weight, db.ravel()).reshape(kernel.shape)  # Eq. 8
    by_input = np.asarray(jax.jacobian(lambda a: conv(a, kernel))(a[:1])).reshape(9, 12)
    da = np.stack([solve(by_input[:, i][:, None], db.T)[0] for i in range(12)], 1)
    want["shift"] = da.reshape(shift.shape) / n

    fn = cqjax.back_matching_value_and_grad(
        conv_net, damping=0.0, relative_damping=0.0, batch_size=n
    )
    _, grads = jit(fn)(jax.tree.map(jnp.asarray, params), x, y)
    assert_close(grads, want)


@st.composite
def convolution(draw):
    rank = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel, stride, dilation, spread = each(1, 3), each(1, 3), each(1, 2), each(1, 2)
    padding = tuple(zip(each(0, 2), each(0, 2), strict=True))
    size = tuple(
        max(s, -(-max((k - 1) * d - sum(p), 0) // f) + 1)
        for s, k, d, p, f in zip(each(1, 5), kernel, dilation, padding, spread, strict=True)
    )
    groups, m, n = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "spread": spread}
    return (2, *size, groups * m), (*kernel, m, groups * n), options | {"groups": groups}


@given(convolution(), st.integers(0, 2**16))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_convolution_divides_by_what_touches_an_input(shapes, seed):
    """Eq. 22 for any stride, padding, dilation and groups; 0 where no weight touches the input."""
    x_shape, kernel_shape, options = shapes
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=x_shape), rng.normal(size=kernel_shape)
    layer = ref.Conv("conv", **options)
    z = layer.forward({"conv/kernel": kernel}, x)
    target = rng.normal(size=z.shape)
    letters = "NHWC" if len(options["stride"]) == 2 else "NWC"

    def loss(params, x):
        z = jax.lax.conv_general_dilated(
            x + params["shift"],
            params["kernel"],
            options["stride"],
            options["padding"],
            options["spread"],
            options["dilation"],
            (letters, letters[1:-1] + "IO", letters),
            options["groups"],
        )
        return jnp.sum((z - target) ** 2) / 2

    fn = cqjax.back_matching_value_and_grad(loss, weights="plain")
    _, grads = jit(fn)({"kernel": jnp.asarray(kernel), "shift": jnp.zeros(x_shape)}, x)
    want = layer.backward(z - target, matched=True)
    kernel_gradient = layer.gradients(1, None)["conv/kernel"]
    assert_close(grads, {"shift": want, "kernel": kernel_gradient}, 1e-10)
