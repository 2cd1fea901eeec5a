"""Layer-wise rates of back-matching against Algorithm 1 and the supplement, in float64 NumPy."""

import functools

import back_matching_rates_reference as ref
import back_matching_reference as network
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from back_matching_networks import (
    CASES,
    assert_close,
    flatten,
    jit,
    mlp_by_hand,
    mlp_reference,
    problem,
)

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


class ConvNet(nn.Module):
    """Convolutions with normalisation, activation and pooling; then dense layers.

    `convs`: (channels, options of nn.Conv, whether pooled by 2) each.
    """

    convs: tuple
    widths: tuple
    affine: bool = False
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        norm = functools.partial(norm, use_bias=self.affine, use_scale=self.affine)
        for i, (channels, options, pooled) in enumerate(self.convs):
            x = nn.Conv(channels, use_bias=self.bias, name=f"cv{i}", **options)(x)
            x = nn.relu(norm(name=f"cv{i}_bn")(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if pooled else x
        x = x.reshape(len(x), -1)
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=self.bias, name=f"fc{i}")(x)
            x = nn.relu(norm(name=f"fc{i}_bn")(x)) if i + 1 < len(self.widths) else x
        return x


SAME, VALID5 = {"kernel_size": (3, 3)}, {"kernel_size": (5, 5), "padding": "VALID"}
LENET = ConvNet(((6, VALID5, True), (16, VALID5, True)), (120, 84, 10))
POOLED = (True, True, False, True, False, True, False, True)
WIDTHS = (4, 6, 8, 8, 12, 12, 12, 12)
VGG11 = ConvNet(tuple((w, SAME, p) for w, p in zip(WIDTHS, POOLED, strict=True)), (10,))
MIXED = ConvNet(
    (
        (6, {"kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 2), (0, 3))}, False),
        (8, {"kernel_size": (3, 3), "feature_group_count": 2, "kernel_dilation": 2}, True),
        (4, {"kernel_size": (1, 3), "padding": "VALID"}, False),
    ),
    (5, 3),
    affine=True,
    bias=True,
)


def described(model, x_shape, dtype=jnp.float64, seed=0):
    """(plan, params, {path: array}) of a Flax model with random parameters."""
    x = jax.ShapeDtypeStruct(x_shape, dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes)

    def loss_fn(params, x):
        z = model.apply({"params": params}, x, mutable="batch_stats")[0]
        return jnp.mean(jnp.sum(z**2, range(1, z.ndim)))

    plan = cqjax.plan(loss_fn)(params, x)
    return plan, params, {k: np.asarray(p, np.float64) for k, p in flatten(params).items()}


def assert_rates(rates, want, rtol):
    """Equal {path: rate}, a scalar for each parameter."""
    rates = flatten(rates)
    assert rates.keys() == want.keys()
    for path, rate in rates.items():
        assert jnp.shape(rate) == (), path
        np.testing.assert_allclose(rate, want[path], rtol=rtol, err_msg=path)


LENET_PATHS = {
    "fc3": "fc2/kernel",
    "fc2": "fc1/kernel",
    "fc1": "fc0/kernel",
    "cv2": "cv1/kernel",
    "cv1": "cv0/kernel",
}


def closed_forms(weights):
    values = [ref.of_flax(weights[path]) for path in LENET_PATHS.values()]
    forms = ref.lenet_closed_forms(*values)
    return {LENET_PATHS[name]: rate for name, rate in forms.items()}


@pytest.mark.parametrize(
    "dtype, rtol, seed",
    [(jnp.float64, 1e-12, 0), (jnp.float64, 1e-12, 1), (jnp.float32, 1e-5, 2)],
)
def test_lenet_is_the_supplement(dtype, rtol, seed):
    plan, params, weights = described(LENET, (8, 32, 32, 3), dtype, seed)
    want = closed_forms(weights)
    assert_rates(cqjax.back_matching_rates(plan, params), want, rtol)
    by_algorithm = ref.algorithm_1(lenet_layers(weights))
    np.testing.assert_allclose(
        [by_algorithm[path.split("/")[0]] for path in want], list(want.values()), rtol=1e-12
    )


def lenet_layers(weights):
    w = {path.split("/")[0]: ref.of_flax(kernel) for path, kernel in weights.items()}
    end = [("bn", None, None), ("relu",)]
    convs = [("conv", "cv0", w["cv0"], 32**2, 14**2), *end, ("pool",)]
    convs += [("conv", "cv1", w["cv1"], 14**2, 5**2), *end, ("pool",)]
    return [
        *convs,
        ("fc", "fc0", w["fc0"]),
        *end,
        ("fc", "fc1", w["fc1"]),
        *end,
        ("fc", "fc2", w["fc2"]),
    ]


def test_an_explicit_chain():
    _, params, weights = described(LENET, (8, 32, 32, 3))
    layer = functools.partial(cqjax.ChainLayer, normalised=True)
    chain = [
        layer("cv0/kernel", inputs=3, outputs=6, shared=196.0, ratio=1024 / 196),
        layer("cv1/kernel", inputs=6, outputs=16, shared=25.0, ratio=196 / 25),
        layer("fc0/kernel", inputs=400, outputs=120),
        layer("fc1/kernel", inputs=120, outputs=84),
        cqjax.ChainLayer("fc2/kernel", inputs=84, outputs=10),
    ]
    assert_rates(cqjax.back_matching_rates(chain, params), closed_forms(weights), 1e-12)


def test_vgg11():
    plan, params, weights = described(VGG11, (4, 32, 32, 3))
    want = ref.algorithm_1(ref.vgg_layers(weights, 32, POOLED))
    assert_rates(cqjax.back_matching_rates(plan, params), want, 1e-12)


def by_path(rates, parameters):
    """The rates of layers, for each of their parameters."""
    return {path: rates[path.split("/")[0]] for path in parameters}


def test_strides_groups_biases_and_learned_normalisation():
    plan, params, weights = described(MIXED, (4, 12, 9, 2))
    w = {p.split("/")[0]: kernel for p, kernel in weights.items() if p.endswith("kernel")}
    relu, scale = ("relu",), {p.split("/")[0]: s for p, s in weights.items() if "scale" in p}
    # 12 x 9 -> stride 2 x 1 -> 7 x 11 -> "SAME", pooled -> 3 x 5 -> "VALID" 1 x 3 -> 3 x 3
    convs = [
        ("conv", "cv0", ref.of_flax(w["cv0"]), 12 * 9, 7 * 11),
        ("conv", "cv1", ref.of_flax(w["cv1"], groups=2), 7 * 11, 3 * 5),
        ("conv", "cv2", ref.of_flax(w["cv2"]), 3 * 5, 3 * 3),
        ("fc", "fc0", ref.of_flax(w["fc0"])),
    ]
    layers = [x for c in convs for x in (c, ("bn", f"{c[1]}_bn", scale[f"{c[1]}_bn"]), relu)]
    layers += [("fc", "fc1", ref.of_flax(w["fc1"]))]
    want = by_path(ref.algorithm_1(layers), weights)
    assert_rates(cqjax.back_matching_rates(plan, params), want, 1e-12)


def mlp_problem():
    return problem(CASES["mlp"]._replace(apply=mlp_by_hand))


def mlp_rates(params):
    kernels = {p.split("/")[0]: w for p, w in params.items() if p.endswith("kernel")}
    layers = [x for name, w in kernels.items() for x in (("fc", name, ref.of_flax(w)), ("relu",))]
    return by_path(ref.algorithm_1(layers), params)


def mlp_arrays(params):
    return {path: np.asarray(p, np.float64) for path, p in flatten(params).items()}


@pytest.mark.parametrize("name", ["mlp", "mlp_by_hand"])
def test_mlp(name):
    loss_fn, params, x, y = problem(CASES[name])
    plan = cqjax.plan(loss_fn)(params, x, y)
    want = mlp_rates(mlp_arrays(params))
    assert_rates(cqjax.back_matching_rates(plan, params), want, 1e-12)
    assert_rates(jit(functools.partial(cqjax.back_matching_rates, plan))(params), want, 1e-12)


def test_the_transformation_multiplies():
    """Under jit, and under vmap over the parameters of several seeds."""
    loss_fn, params, x, y = mlp_problem()
    plan = cqjax.plan(loss_fn)(params, x, y)
    tx = cqjax.scale_by_back_matching(plan)
    seeds = [problem(CASES["mlp"], seed=seed)[1] for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *seeds)

    def scaled(params):
        return tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)[0]

    batch = jit(jax.vmap(scaled))(stacked)
    for i, params in enumerate(seeds):
        weights = mlp_arrays(params)
        rates = mlp_rates(weights)
        want = {path: rates[path] * np.cos(w) for path, w in weights.items()}
        assert_close(flatten(jit(scaled)(params)), want, 1e-12)
        assert_close({path: u[i] for path, u in flatten(batch).items()}, want, 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_keep_their_dtype(dtype):
    plan, params, weights = described(LENET, (4, 32, 32, 3), dtype)
    tx = cqjax.scale_by_back_matching(plan)
    updates, _ = jit(tx.update)(params, tx.init(params), params)
    rates = closed_forms(weights)
    for path, u in flatten(updates).items():
        assert u.dtype == dtype
        tolerance = max(4 * float(jnp.finfo(dtype).eps), 1e-5)
        np.testing.assert_allclose(u.astype(float), rates[path] * weights[path], rtol=tolerance)


@pytest.mark.parametrize("nesterov", [True, False])
def test_decay_then_rates_then_momentum(nesterov):
    """Three steps of section 3.2; the weight decay is taken at the layer's rate."""
    loss_fn, params, x, y = mlp_problem()
    plan = cqjax.plan(loss_fn)(params, x, y)
    tx = cqjax.back_matching_sgd(0.05, 0.8, nesterov, 0.1, plan=plan)
    layers, arrays = mlp_reference(), (np.asarray(x), np.asarray(y))
    want = ref.momentum_sgd(
        mlp_arrays(params),
        lambda p: network.differentiate(layers, p, *arrays, network.squared_error, matched=False)[
            1
        ],
        mlp_rates,
        learning_rate=0.05,
        momentum=0.8,
        nesterov=nesterov,
        weight_decay=0.1,
        steps=3,
    )

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0])
    assert_close(flatten(run(params)), want, 1e-10)


def test_defaults_are_the_papers():
    """Nesterov's momentum 0.9, no decay; captures tell the chain where there is no plan."""
    loss_fn, params, x, y = mlp_problem()
    plan = cqjax.plan(loss_fn)(params, x, y)
    _, grads, captures = jit(cqjax.value_and_grad(loss_fn))(params, x, y)
    scale = cqjax.scale_by_back_matching(plan)
    by_hand = optax.chain(scale, optax.sgd(0.1, 0.9, nesterov=True))
    want, _ = jit(by_hand.update)(grads, by_hand.init(params), params)
    for tx, extra in (
        (cqjax.back_matching_sgd(0.1, plan=plan), {}),
        (cqjax.back_matching_sgd(0.1), {"captures": captures}),
    ):
        got, _ = jit(tx.update)(grads, tx.init(params), params, **extra)
        assert_close(flatten(got), mlp_arrays(want), 1e-12)


def branching(params, x):
    a = jnp.tanh(x @ params["below"])
    return jnp.sum((a + jnp.tanh(a @ params["inside"])) @ params["above"])


def test_a_network_that_branches_is_no_chain():
    params = {name: jnp.eye(3) for name in ("below", "inside", "above")}
    plan = cqjax.plan(branching)(params, jnp.ones((4, 3)))
    for call in (
        lambda: cqjax.back_matching_rates(plan, params),
        lambda: cqjax.scale_by_back_matching(plan).update(params, (), params),
    ):
        with pytest.raises(ValueError) as error:
            call()
        message = str(error.value)
        assert "measured" in message
        assert any(name in message for name in params), message


BAD = [
    ({"factors": "guessed"}, "factors"),
    ({"factors": "measured", "refresh_every": 0}, "refresh_every"),
    ({"factors": "measured", "decay": 1.0}, "decay"),
    ({"factors": "measured", "decay": -0.1}, "decay"),
    ({"factors": "measured", "decay": float("nan")}, "decay"),
]


@pytest.mark.parametrize("options, match", BAD, ids=str)
def test_bad_arguments(options, match):
    loss_fn, params, x, y = mlp_problem()
    plan = cqjax.plan(loss_fn)(params, x, y)
    with pytest.raises(ValueError, match=match):
        cqjax.scale_by_back_matching(plan, **options)
    with pytest.raises(ValueError, match=match):
        cqjax.back_matching_sgd(0.1, plan=plan, **options)


def test_what_is_missing_is_named():
    loss_fn, params, x, y = mlp_problem()
    plan = cqjax.plan(loss_fn)(params, x, y)
    grads = jax.grad(loss_fn)(params, x, y)
    tx = cqjax.scale_by_back_matching(plan)
    with pytest.raises(ValueError, match="params"):
        tx.update(grads, tx.init(params))
    without = cqjax.scale_by_back_matching()
    with pytest.raises(ValueError, match="captures"):
        without.update(grads, without.init(params), params)
    chain = [cqjax.ChainLayer("absent/kernel", inputs=3, outputs=6)]
    with pytest.raises(ValueError, match="absent/kernel"):
        cqjax.back_matching_rates(chain, params)
    with pytest.raises(ValueError, match="layers_./kernel.* are w"):
        cqjax.back_matching_rates(plan, {"w": jnp.eye(3)})
