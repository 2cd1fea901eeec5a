"""What counts as a chain of layers, as pooling and as a normalisation, however it is written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax

KEYS = jax.random.split(jax.random.key(0), 4)


def rates(loss_fn, params, *args, **kwargs):
    plan = cqjax.plan(loss_fn)(params, *args)
    return cqjax.back_matching_rates(plan, params, **kwargs)


def assert_equal(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


class Net(nn.Module):
    """Two convolutions; `pool` and `mean` are written in different ways."""

    pool: object
    mean: object

    @nn.compact
    def __call__(self, x):
        x = self.pool(nn.relu(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(2)(self.mean(nn.relu(nn.Conv(5, (3, 3))(x))))


def max_pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def mean(x):
    return x.mean((-3, -2))


def network(pool=max_pool, mean=mean):
    net = Net(pool, mean)
    x, y = jax.random.normal(KEYS[0], (6, 8, 8, 3)), jnp.ones((6, 2))
    return net, net.init(KEYS[1], x)["params"], x, y


def squares(net):
    return lambda p, x, y: jnp.mean((net.apply({"params": p}, x) - y) ** 2)


def per_example(net):
    def one(p, x, y):
        return (net.apply({"params": p}, x) - y) ** 2

    return lambda p, x, y: jnp.mean(jax.vmap(one, (None, 0, 0))(p, x, y))


def test_a_loss_per_example():
    net, params, x, y = network()
    assert_equal(rates(per_example(net), params, x, y), rates(squares(net), params, x, y))


POOLS = {
    "with an axis more": lambda x: max_pool(x[:, None][:, 0]),
    "reshaped": lambda x: x.reshape(len(x), 4, 2, 4, 2, -1).max((2, 4)),
    "every other": lambda x: x[:, ::2, ::2],
    "less its mean": lambda x: max_pool(x.mean((1, 2), keepdims=True) - x),
}
MEANS = {
    "summed axis by axis": lambda x: x.mean(-2).mean(-2),
    "transposed": lambda x: x.transpose(0, 3, 1, 2).mean((2, 3)),
    "by a window": lambda x: nn.avg_pool(x, (4, 4))[:, 0, 0],
    "one position": lambda x: x[:, 0, 0],
}


@pytest.mark.parametrize("pool", list(POOLS.values()), ids=list(POOLS))
def test_pooling_in_other_words(pool):
    net, params, x, y = network(pool=pool)
    assert_equal(rates(squares(net), params, x, y), rates(squares(network()[0]), params, x, y))


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_in_other_words(name):
    net, params, x, y = network(mean=MEANS[name])
    assert_equal(rates(squares(net), params, x, y), rates(squares(network()[0]), params, x, y))


def tokens():
    x = jax.random.normal(KEYS[0], (8, 10, 3))
    params = {"a": jax.random.normal(KEYS[1], (3, 5)), "c": jax.random.normal(KEYS[2], (5, 1))}
    return params, x, jnp.ones((8, 10, 1))


def outputs(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["c"]


LOSSES = {
    "at once": lambda p, x, y: jnp.mean(jnp.sum((outputs(p, x) - y) ** 2, (1, 2))),
    "positions first": lambda p, x, y: jnp.mean(jnp.sum((outputs(p, x) - y) ** 2, 1)),
    "mean of means": lambda p, x, y: jnp.mean(jnp.mean((outputs(p, x) - y) ** 2, 1)),
    "constants beside": lambda p, x, y: jnp.mean(
        (outputs(p, x) - y) ** 2 + 0.0 * (jax.lax.stop_gradient(outputs(p, x)) > 0)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_losss_own_sums_are_no_pooling(name):
    params, x, y = tokens()
    got = rates(LOSSES[name], params, x, y)
    share = 1 if name in ("mean of means", "constants beside") else 0.1  # N over the 80 rows
    np.testing.assert_allclose(got["c"], share, rtol=1e-6)
    np.testing.assert_allclose(got["a"], share / (np.sum(params["c"] ** 2) / 5), rtol=1e-5)


def test_donated_state():
    params, x, y = tokens()
    plan = cqjax.plan(LOSSES["at once"])(params, x, y)
    for factors in ("chain", "measured"):
        tx = cqjax.scale_by_back_matching(plan, factors=factors)
        value_fn = {"value_fn": lambda p: LOSSES["at once"](p, x, y)}
        step = jax.jit(
            lambda s, tx=tx, f=value_fn: tx.update(params, s, params, **f), donate_argnums=0
        )
        _, state = step(tx.init(params))
        assert step(state)[1].count == 2


def test_injected_hyperparameters():
    params, x, y = tokens()
    plan = cqjax.plan(LOSSES["at once"])(params, x, y)
    make = optax.inject_hyperparams(cqjax.back_matching_sgd, static_args=("nesterov", "factors"))
    tx = make(0.1, plan=plan)
    plain = cqjax.back_matching_sgd(0.1, plan=plan)
    got, _ = tx.update(params, tx.init(params), params)
    assert_equal(got, plain.update(params, plain.init(params), params)[0])


class Odd(nn.LayerNorm):
    """A normalisation by inheritance that does something else as well."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(x.shape[-1])(x))


class Wrapped(nn.LayerNorm):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(super().__call__(x))


@pytest.mark.parametrize("layer", [Odd, Wrapped])
def test_derived_normalisations(layer):
    """Only what Flax's own method does is one."""
    net = nn.Sequential([nn.Dense(7), layer(), nn.Dense(2)])
    x = jax.random.normal(KEYS[0], (6, 3))
    params = net.init(KEYS[1], x)
    flow = cqjax.plan(lambda p, x: jnp.mean(net.apply(p, x) ** 2))(params, x).flow
    middle = [node.site is None for node in flow.nodes]
    assert middle == ([False] * 3 if layer is Odd else [False, True, False])


def test_normalised_twice():
    """The second normalisation's input varies as the first one's scale."""
    net = nn.Sequential([nn.Dense(7), nn.LayerNorm(), nn.LayerNorm(), nn.Dense(2)])
    x = jax.random.normal(KEYS[0], (6, 3))
    params = net.init(KEYS[1], x)["params"]
    params["layers_1"]["scale"] = jnp.linspace(0.5, 2.0, 7)
    params["layers_2"]["scale"] = jnp.linspace(1.0, 3.0, 7)
    got = rates(lambda p, x: jnp.mean(jnp.sum(net.apply({"params": p}, x) ** 2, -1)), params, x)
    square = {
        name: float(np.sum(layer["kernel"] ** 2))
        for name, layer in params.items()
        if "kernel" in layer
    }
    slope = np.mean(np.square(params["layers_2"]["scale"])) / (square["layers_0"] / 7)
    want = 1 / (square["layers_3"] / 7) / slope
    np.testing.assert_allclose(got["layers_0"]["kernel"], want, rtol=1e-5)


def test_a_tied_table_is_no_chain():
    params = {"e": jnp.ones((5, 3)), "w": jnp.ones((3, 3))}
    tokens = jnp.zeros((4,), jnp.int32)
    plan = cqjax.plan(lambda p, t: jnp.mean((p["e"][t] @ p["w"] @ p["e"].T) ** 2))(params, tokens)
    with pytest.raises(ValueError, match="e is used by several layers"):
        cqjax.back_matching_rates(plan, params)


def test_masked_parameters():
    params, x, y = tokens()
    plan = cqjax.plan(LOSSES["at once"])(params, x, y)
    for factors, message in (("chain", "outside of the mask"), ("measured", "outside of the mask")):
        tx = optax.masked(
            cqjax.scale_by_back_matching(plan, factors=factors), {"a": True, "c": False}
        )
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(params), params, value_fn=lambda p: outputs(p, x).sum())


def test_a_value_function_of_another_loss():
    params, x, y = tokens()
    plan = cqjax.plan(LOSSES["at once"])(params, x, y)
    wider = {"a": jnp.ones((3, 9)), "c": jnp.ones((9, 1))}
    with pytest.raises(ValueError, match="make the plan of the same loss"):
        cqjax.back_matching_rates(plan, wider, value_fn=lambda p: LOSSES["at once"](p, x, y))
    with pytest.raises(TypeError, match="returns a pair"):
        cqjax.back_matching_rates(plan, params, value_fn=lambda p: (jnp.sum(outputs(p, x)), 1.0))


def test_a_description_in_the_place_of_a_plan():
    params, x, y = tokens()
    layers = [cqjax.ChainLayer("a", 3, 5, shared=10.0), cqjax.ChainLayer("c", 5, 1, shared=10.0)]
    want = rates(LOSSES["at once"], params, x, y)
    assert_equal(cqjax.back_matching_rates(layers, params), want)
    tx = cqjax.scale_by_back_matching(layers)
    ones = jax.tree.map(jnp.ones_like, params)
    got, _ = jax.jit(tx.update)(ones, tx.init(params), params)
    assert_equal(got, jax.tree.map(jnp.full_like, params, want))
    tx = cqjax.back_matching_sgd(0.5, None, plan=layers)
    got, _ = tx.update(ones, tx.init(params), params)
    assert_equal(got, jax.tree.map(lambda p, r: jnp.full_like(p, -0.5 * r), params, want))
    with pytest.raises(ValueError, match="needs plan="):
        cqjax.scale_by_back_matching(layers, factors="measured")
    with pytest.raises(ValueError, match="not a description"):
        cqjax.back_matching_rates(layers, params, value_fn=lambda p: outputs(p, x).sum())


class Unknown(nn.Module):
    """A layer with parameters that is neither a product nor a normalisation of Flax."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        shift = self.param("shift", nn.initializers.zeros, x.shape[-1:])
        return x * scale + shift


def test_layers_that_are_not_known_are_named():
    net = nn.Sequential([nn.Dense(7), Unknown(), nn.LayerNorm(), nn.Dense(2)])
    x = jax.random.normal(KEYS[0], (6, 3))
    params = net.init(KEYS[1], x)["params"]
    plan = cqjax.plan(lambda p, x: jnp.mean(net.apply({"params": p}, x) ** 2), signal="matched")
    plan = plan(params, x)
    assert plan.unmatched == ("layers_1/scale",)
    assert str(plan).endswith("signal: matched; as in backpropagation through layers_1/scale")
