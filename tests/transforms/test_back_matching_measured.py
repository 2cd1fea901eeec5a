"""Measured factors of back-matching: 1/m = ⟨δb, δ'b⟩ / ‖δb‖², in float64 NumPy, on any graph."""

import collections
import functools

import back_matching_rates_reference as rates_ref
import back_matching_reference as ref
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from back_matching_networks import CASES, assert_close, flatten, jit, problem

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


def numpy_tree(tree):
    return {path: np.asarray(a, np.float64) for path, a in flatten(tree).items()}


def measured(name, params, x, y):
    """1/m of each layer of a case, by the reference's two backward passes."""
    case = CASES[name]
    args = numpy_tree(params), np.asarray(x), np.asarray(y), getattr(ref, case.loss)
    passes = [ref.differentiate(case.layers(), *args, matched=m) for m in (False, True)]
    return rates_ref.measured_factors(*(signals for _, _, signals, _ in passes))


def layer_of(path):
    return path.rsplit("/", 1)[0]


ATTENTION = [f"layers_1/layers_1/{name}" for name in ("query", "key", "value", "out")]
PERCEPTRON = [f"layers_2/layers_{i}" for i in (0, 1, 3)]
TRANSFORMER = ["layers_0", "layers_1/layers_0", *ATTENTION, *PERCEPTRON, "layers_3", "layers_4"]

# s of each layer, where it is not 1: its positions in an example, after the pooling that follows
# (if that is an operation of its own, as it is not in "conv_by_hand").
SHARED = {
    "mlp": {},
    "conv_by_hand": {"layers_0": 4 * 6, "layers_2": 4 * 6, "layers_4": 1 * 2},
    "lenet": {"layers_0": 28**2, "layers_4": 10**2},  # all positions, pooled or not (Eq. 23)
    "general": dict.fromkeys(("layers_0", "layers_2", "layers_3"), 4),
    "norms": dict.fromkeys((f"layers_{i}" for i in range(17)), 4),
    "transformer": dict.fromkeys(TRANSFORMER, 5),
}


@pytest.mark.parametrize("name", SHARED)
def test_rates_of_one_batch(name):
    loss_fn, params, x, y = problem(CASES[name])
    tx = cqjax.scale_by_back_matching(cqjax.plan(loss_fn)(params, x, y), factors="measured")
    factors, shared = measured(name, params, x, y), collections.defaultdict(lambda: 1)
    shared |= SHARED[name]

    @jit
    def run(params):
        ones = jax.tree.map(jnp.ones_like, params)
        return tx.update(ones, tx.init(params), params, value_fn=lambda p: loss_fn(p, x, y))

    updates, state = run(params)
    updates = flatten(updates)
    for path, rates in updates.items():
        s, factor = shared[layer_of(path)], factors[layer_of(path)]
        want = factor / s if factor > 0 else 1 / s  # as before anything is measured
        np.testing.assert_allclose(rates, want, rtol=1e-9, err_msg=path)
    assert state.ignored == sum(factors[layer] <= 0 for layer in set(map(layer_of, updates)))


@pytest.mark.parametrize("name", ["mlp", "conv_by_hand"])
def test_rates_as_they_are_measured(name):
    loss_fn, params, x, y = problem(CASES[name])
    plan = cqjax.plan(loss_fn)(params, x, y)
    rates = functools.partial(cqjax.back_matching_rates, value_fn=lambda p: loss_fn(p, x, y))
    factors = measured(name, params, x, y)
    for path, rate in flatten(jit(functools.partial(rates, plan))(params)).items():
        want = factors[layer_of(path)] / SHARED[name].get(layer_of(path), 1)
        np.testing.assert_allclose(rate, want, rtol=1e-9, err_msg=path)


def test_a_moving_average_of_refreshes():
    """Three of six updates measure; the average is unbiased from the first on."""
    loss_fn, params, _, _ = problem(CASES["mlp"])
    batches = [problem(CASES["mlp"], seed=seed)[2:] for seed in range(6)]
    plan = cqjax.plan(loss_fn)(params, *batches[0])
    tx = cqjax.scale_by_back_matching(plan, factors="measured", refresh_every=2, decay=0.7)
    ones = jax.tree.map(jnp.ones_like, params)

    def step(state, batch):
        updates, state = tx.update(
            ones, state, params, value_fn=lambda params: loss_fn(params, *batch)
        )
        return state, updates

    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    updates = flatten(jit(lambda: jax.lax.scan(step, tx.init(params), stacked))()[1])
    average, weight = dict.fromkeys(measured("mlp", params, *batches[0]), 0.0), 0.0
    for i, batch in enumerate(batches):
        if i % 2 == 0:
            factors = measured("mlp", params, *batch)
            average = {k: 0.7 * average[k] + 0.3 * factors[k] for k in average}
            weight = 0.7 * weight + 0.3
        for path, u in updates.items():
            want = average[layer_of(path)] / weight
            np.testing.assert_allclose(u[i], want, rtol=1e-9, err_msg=path)


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def test_measured_is_algorithm_1_where_that_is_exact():
    """Square W = κQ without activations: every ‖w_j‖² is κ², whatever the data."""
    rng = np.random.default_rng(0)
    gains = {"a": 0.5, "b": 2.0, "c": 3.0, "d": 0.7}
    params = {k: jnp.asarray(gain * orthogonal(rng, 5)) for k, gain in gains.items()}
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))

    def loss_fn(params, x, y):
        for w in params.values():
            x = x @ w
        return jnp.mean(jnp.sum((x - y) ** 2, -1))

    plan = cqjax.plan(loss_fn)(params, x, y)
    chain = cqjax.back_matching_rates(plan, params)
    by_data = functools.partial(
        cqjax.back_matching_rates, plan, value_fn=lambda params: loss_fn(params, x, y)
    )
    rates = jit(by_data)(params)
    layers = [("fc", k, rates_ref.of_flax(np.asarray(w))) for k, w in params.items()]
    algorithm_1, m = rates_ref.algorithm_1(layers), 1.0
    for k in reversed(gains):
        for rate in (chain[k], rates[k], algorithm_1[k]):
            np.testing.assert_allclose(rate, 1 / m, rtol=1e-10)
        m *= gains[k] ** 2


def test_measured_order_in_sgd():
    """Decay, measured rates, momentum: two steps, measured in each."""
    loss_fn, params, x, y = problem(CASES["mlp"])
    plan = cqjax.plan(loss_fn)(params, x, y)
    tx = cqjax.back_matching_sgd(
        0.05, 0.8, weight_decay=0.1, plan=plan, factors="measured", refresh_every=1, decay=0.0
    )
    layers, data = CASES["mlp"].layers(), (np.asarray(x), np.asarray(y))

    def rates(p):
        factors = measured("mlp", p, x, y)
        return {path: factors[layer_of(path)] for path in p}

    def slopes(p):
        return ref.differentiate(layers, p, *data, ref.squared_error, matched=False)[1]

    want = rates_ref.momentum_sgd(
        numpy_tree(params),
        slopes,
        rates,
        learning_rate=0.05,
        momentum=0.8,
        nesterov=True,
        weight_decay=0.1,
        steps=2,
    )

    @jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, x, y))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    assert_close(flatten(params), want, 1e-9)


# Networks that branch.


class ResNet20(nn.Module):
    """He et al.'s ResNet for CIFAR-10, n = 3, with few channels."""

    width: int = 4

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
        for i in range(9):
            features, strides = self.width * 2 ** (i // 3), 2 if i in (3, 6) else 1
            y = nn.relu(norm()(conv(features, (3, 3), strides)(x)))
            y = norm()(conv(features, (3, 3))(y))
            if strides == 2:
                x = norm()(conv(features, (1, 1), strides)(x))
            x = nn.relu(x + y)
        return nn.Dense(5)(x.mean((1, 2)))


class Transformer(nn.Module):
    """Two blocks of attention and perceptron over tokens, with normalisation before each."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for _ in range(2):
            x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            x += nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(11)(nn.LayerNorm()(x))


def images(rng):
    return rng.normal(size=(16, 8, 8, 3)).astype(np.float32), rng.integers(0, 5, 16)


def text(rng):
    tokens = rng.integers(0, 11, (8, 7))
    return tokens, (tokens + 1) % 11


@pytest.mark.parametrize(
    "model, data, rate",
    [(ResNet20(), images, 0.01), (Transformer(), text, 0.02)],
    ids=["resnet20", "transformer"],
)
def test_training_networks_that_branch(model, data, rate):
    with jax.enable_x64(False):
        x, y = map(jnp.asarray, data(np.random.default_rng(0)))
        params = jit(model.init)(jax.random.key(0), x)["params"]

        def loss_fn(params, x, y):
            z = model.apply({"params": params}, x, mutable="batch_stats")[0]
            return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

        plan = cqjax.plan(loss_fn)(params, x, y)
        with pytest.raises(ValueError, match="measured"):
            cqjax.back_matching_rates(plan, params)
        tx = cqjax.back_matching_sgd(rate, plan=plan, factors="measured", refresh_every=3)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss_fn)(params, x, y)
            updates, state = tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, x, y))
            return (optax.apply_updates(params, updates), state), value

        run = jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=8))
        (params, _), values = run(params)
        assert np.isfinite(values).all()
        assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))
        assert values[-1] < 0.9 * values[0] and (np.diff(values) < 0).mean() > 0.7, values


def test_a_head_of_zeros():
    """No signal gets below it: there is nothing to measure, and nothing that moves."""
    loss_fn, params, x, y = problem(CASES["mlp"])
    params["layers_4"] = jax.tree.map(jnp.zeros_like, params["layers_4"])
    plan = cqjax.plan(loss_fn)(params, x, y)
    grads = jit(jax.grad(loss_fn))(params, x, y)
    for factors in ("chain", "measured"):
        tx = cqjax.scale_by_back_matching(plan, factors=factors)
        update = functools.partial(tx.update, value_fn=lambda p: loss_fn(p, x, y))
        updates, _ = jit(update)(grads, tx.init(params), params)
        for path, u in flatten(updates).items():
            assert np.array_equal(u, flatten(grads)[path] if "layers_4" in path else 0 * u), path


def test_it_needs_the_loss():
    loss_fn, params, x, y = problem(CASES["mlp"])
    tx = cqjax.scale_by_back_matching(cqjax.plan(loss_fn)(params, x, y), factors="measured")
    grads = jax.grad(loss_fn)(params, x, y)
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(grads, tx.init(params), params)
