"""`clip_by_output_change` against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
import zoo_moments as ref
from across_batches import quickly
from linear_layer import problem, squared_error

import cqjax

CHANGE, RATE = 0.2, 0.3
ROUTES = {
    "rows": ({"solver": "dual"}, squared_error),
    "inputs": ({"solver": "primal"}, squared_error),
    "gram": ({"solver": "primal"}, jax.checkpoint(squared_error)),
}


def clipped(tx, loss, params, args, updates, weights=None, count=0, **options):
    """(updates, state) after these updates were handed over, for weights that may be others."""
    weights = params if weights is None else weights

    def run(params, args, updates, weights):
        _, _, captures = cqjax.value_and_grad(loss, **options)(params, *args)
        state = tx.init(params)._replace(count=jnp.int32(count))
        return tx.update(updates, state, weights, captures=captures)

    return quickly(run)(params, args, updates, weights)


def normal(tree, seed=7, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), tree)


def outputs(x, tree):
    x, tree = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, dict(tree)))
    return x @ tree["w"] + tree.get("b", 0.0)


def length(z):
    return np.sqrt((z**2).sum())


# The bound.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("o", [1, 8])
@pytest.mark.parametrize("route", ROUTES)
def test_a_layer(route, o, bias):
    """Exact for so few outputs. A bias moves them too, and is shortened with its weight."""
    options, loss = ROUTES[route]
    params, x, y = problem(6, 4, o, bias=bias)
    weights, updates = normal(params, 1, 3.0), normal(params, 2, 9.0)
    tx = cqjax.clip_by_output_change(CHANGE, learning_rate=RATE)
    got, state = clipped(tx, loss, params, (x, y), updates, weights, **options)
    factor = CHANGE * length(outputs(x, weights)) / length(outputs(x, updates)) / RATE
    assert factor < 1 and state.clipped[-1] == 1 and state.clipped.sum() == 1
    for path, update in updates.items():
        np.testing.assert_allclose(got[path], factor * update, rtol=1e-9)


FORMS = [
    "mlp",
    "conv_same",
    "conv_stride_dilation",
    "conv_grouped",
    "conv_1d",
    "conv_3d",
    "conv_depthwise",
    "conv_transpose",
    "embed",
    "scan_layers",
    "shared_module",
    "kernel_slices",
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_weight(name, solver):
    """Each group of a convolution, layer of a scan and slice has a factor of its own."""
    case = zoo.by_name(name)
    loss, params, args = case.make(jnp.float64)
    weights, updates = normal(params, 1, 5.0), normal(params, 2, 5.0)
    tx = cqjax.clip_by_output_change(CHANGE, learning_rate=CHANGE)  # clipped by chance
    options = {"batch_size": 7, **case.kwargs, "solver": solver}
    got, state = clipped(tx, loss, params, args, updates, weights, **options)
    incoming, own = ref.flat(updates), ref.flat(weights)
    moments, factors, shortened = ref.second_moments(case, params, args), {}, 0
    for site, moment in moments.items():
        moved, now = (squared(case, site, moment, tree) for tree in (incoming, own))
        factor = np.minimum(1, np.sqrt(now / moved))
        factors[site] = factor[:, None, None] * np.eye(moment.xx.shape[1])
        shortened += (factor < 1).sum()
    want = incoming | ref.updates(case, moments, incoming, factors)
    for path, update in ref.flat(got).items():
        np.testing.assert_allclose(update, want[path], rtol=1e-8, atol=1e-12, err_msg=path)
    assert state.clipped.sum() == shortened


def squared(case, site, moment, tree):
    """The squared length of what a site's weights and bias in a tree make of its inputs: (B,)."""
    v = ref.to_matrix(case, site, tree[zoo.path_of(site)], moment.weight)
    if moment.bias is not None:
        batch, _, o = moment.weight
        v = np.concatenate([v, tree[moment.bias].reshape(batch, 1, o)], 1)
    return np.einsum("bdo,bde,beo->b", v, moment.xx, v)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [name for name in FORMS if name.startswith("conv")])
def test_outputs_of_a_convolution_with_other_kernels(name):
    """`times` is the im2col matrix's product."""
    case = zoo.by_name(name)
    loss, params, args = case.make(jnp.float64)
    captures = cqjax.value_and_grad(loss, solver="primal")(params, *args)[-1]
    rng = np.random.default_rng(0)
    for capture in captures.blocks:
        (site,), (inputs,) = capture.block.sites, capture.sites
        x = np.asarray(site.form.rows(inputs.x))
        w = rng.normal(size=(x.shape[0], x.shape[2], 3))
        got = site.form.times(inputs.x, jnp.asarray(w), None)
        np.testing.assert_allclose(got, x @ w, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bias", [False, True])
def test_diagonal_blocks(bias):
    """The squares of the blocks are added up. A bias is shortened, and not measured."""
    params, x, y = problem(9, 6, 2, bias=bias)
    weights, updates = normal(params, 1, 5.0), normal(params, 2, 40.0)
    tx = cqjax.clip_by_output_change(CHANGE)
    options = {"solver": "primal", "max_dim": 3, "block_size": 3}
    got, state = clipped(tx, squared_error, params, (x, y), updates, weights, **options)

    def joined(tree):
        parts = [outputs(x[:, i : i + 3], {"w": tree["w"][i : i + 3]}) for i in (0, 3)]
        return length(np.stack(parts))

    factor = CHANGE * joined(weights) / joined(updates)
    assert factor < 1 and state.clipped.sum() == 1
    for path, update in updates.items():
        np.testing.assert_allclose(got[path], factor * update, rtol=1e-9)


@pytest.mark.parametrize("route", ROUTES)
def test_a_model_of_16_bits(route):
    """Against NumPy on the rounded arrays."""
    options, loss = ROUTES[route]
    params, x, y = jax.tree.map(lambda a: a.astype(jnp.bfloat16), problem(64, 16, 8, bias=True))
    weights, updates = normal(params, 1, 3.0), normal(params, 2, 30.0)
    tx = cqjax.clip_by_output_change(CHANGE)
    got, _ = clipped(tx, loss, params, (x, y), updates, weights, **options)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(got))
    moved = length(outputs(x, got)) / length(outputs(x, weights))
    np.testing.assert_allclose(moved, CHANGE, rtol=5e-3)


# The estimate.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rank", [1, 40])
def test_with_many_outputs_the_squared_length_is_right_in_the_mean(rank):
    """Its standard error is at most half of it: so it is for a change of rank one."""
    d, o, n = 6, 40, 1000
    x = jnp.asarray(2 * np.eye(d))  # whatever the signs, the layer's length at its start is 2 √o
    params = {"w": jnp.zeros((d, o))}
    rng = np.random.default_rng(0)
    update = rng.normal(size=(d, rank)) @ rng.normal(size=(rank, o))
    tx = cqjax.clip_by_output_change(1e-3)
    loss = squared_error
    _, _, captures = cqjax.value_and_grad(loss)(params, x, jnp.zeros((d, o)))

    def factor(count):
        state = tx.init(params)._replace(count=count)
        got, _ = tx.update({"w": jnp.asarray(update)}, state, params, captures=captures)
        return got["w"][0, 0] / update[0, 0]

    factors = np.asarray(quickly(jax.vmap(factor))(jnp.arange(n)))
    squares = (1e-3 * 2 * o**0.5 / factors) ** 2 / (4 * (update**2).sum())
    assert len(np.unique(squares)) > n / 2  # each update draws anew
    assert abs(squares.mean() - 1) < 4 * squares.std() / n**0.5
    assert squares.std() < 0.55 and (rank > 1 or squares.std() > 0.4)


# What is left alone.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "conv_grouped", "kernel_slices", "embed"])
def test_what_is_short_enough_stays_bit_for_bit(name, dtype):
    loss, params, args = zoo.by_name(name).make(dtype)
    updates = normal(params, 1, 1e-3)
    got, state = clipped(cqjax.clip_by_output_change(), loss, params, args, updates)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(updates), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (state.count, state.clipped.sum()) == (1, 0)


def two(params, x):
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) * params["gain"]
    return jnp.mean(jnp.sum((h @ params["c"]["w"]) ** 2, -1))


PARAMS = {
    "a": {"b": jnp.ones(3), "w": jnp.full((4, 3), 0.5)},
    "c": {"w": jnp.full((3, 2), 0.5)},
    "gain": jnp.ones(3),
}  # leaves: a/b, a/w, c/w, gain
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)


def test_counts_by_layer():
    tx, grow = cqjax.clip_by_output_change(0.5), jax.tree.map(lambda p: 10 * p, PARAMS)
    small = jax.tree.map(lambda p: 0.1 * p, PARAMS)
    _, _, captures = cqjax.value_and_grad(two)(PARAMS, X)
    state = tx.init(PARAMS)
    got, state = tx.update({**small, "c": grow["c"]}, state, PARAMS, captures=captures)
    assert state.clipped.tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(got["c"]["w"], 0.5 * PARAMS["c"]["w"], rtol=1e-5)
    np.testing.assert_array_equal(got["gain"], small["gain"])
    np.testing.assert_array_equal(got["a"]["w"], small["a"]["w"])
    got, state = tx.update(grow, state, PARAMS, captures=captures)
    assert (state.count, state.clipped.tolist()) == (2, [0, 1, 2, 1])
    np.testing.assert_allclose(got["a"]["b"], 0.5 * PARAMS["a"]["b"], rtol=1e-5)
    # no layer's: its own root mean square, or 1
    size = max(1, np.sqrt(np.mean(np.square(PARAMS["gain"]))))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(got["gain"]))), 0.5 * size, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_becomes_zero_and_is_counted(bad):
    tx = cqjax.clip_by_output_change(0.5)
    _, _, captures = cqjax.value_and_grad(two)(PARAMS, X)
    updates = jax.tree.map(lambda p: 0.1 * p, PARAMS)
    updates["a"]["w"] = updates["a"]["w"].at[1, 1].set(bad)
    updates["gain"] = updates["gain"].at[0].set(bad)
    got, state = tx.update(updates, tx.init(PARAMS), PARAMS, captures=captures)
    assert state.clipped.tolist() == [0, 1, 0, 1]
    assert not got["a"]["w"].any() and not got["a"]["b"].any()
    np.testing.assert_array_equal(got["c"]["w"], updates["c"]["w"])
    assert not got["gain"].any()


def test_a_masked_bias_is_no_part_of_a_layer():
    mask = {"a": {"w": True, "b": False}, "c": True, "gain": True}
    tx = optax.masked(cqjax.clip_by_output_change(0.5), mask)
    updates = jax.tree.map(lambda p: 10 * p, PARAMS)
    _, _, captures = cqjax.value_and_grad(two)(PARAMS, X)
    got, _ = tx.update(updates, tx.init(PARAMS), PARAMS, captures=captures)
    np.testing.assert_allclose(got["a"]["w"], 0.5 * PARAMS["a"]["w"], rtol=1e-5)
    np.testing.assert_array_equal(got["a"]["b"], updates["a"]["b"])


# The rate, and a layer's start.


def test_the_rate_may_be_a_schedule():
    """Its count is that of the updates; under strict promotion and debug_nans too."""
    params, updates = {"w": jnp.ones((4, 2))}, {"w": jnp.ones((4, 2))}
    tx = cqjax.clip_by_output_change(0.5, learning_rate=lambda n: jnp.float32(0.0) + n)
    _, _, captures = cqjax.value_and_grad(squared_error)(params, X, jnp.zeros((5, 2)))
    state, factors = tx.init(params), []
    for _ in range(4):
        got, state = tx.update(updates, state, params, captures=captures)
        factors.append(float(got["w"][0, 0]))
    np.testing.assert_allclose(factors, [1, 0.5, 0.25, 0.5 / 3], rtol=1e-5)
    assert state.clipped.tolist() == [3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_under_strict_promotion_without_nans(dtype):
    """Whatever the layer does: a zero batch, a zero update, a bound of zero, a schedule."""
    schedule = optax.linear_schedule(1.0, 0.5, 3)
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with jax.enable_x64(dtype == jnp.float64), strict[0], strict[1], jax.debug_nans(True):
        params, x = {"w": jnp.ones((4, 9), dtype)}, jnp.ones((5, 4), dtype)

        def loss(params, x):
            return jnp.mean((x @ params["w"]) ** 2)

        for tx in (cqjax.clip_by_output_change(c, learning_rate=schedule) for c in (0.0, 0.5)):
            for batch, update in ((x, 1.0), (0 * x, 1.0), (x, 0.0)):
                updates = {"w": jnp.full((4, 9), update, dtype)}
                got, _ = clipped(tx, loss, params, (batch,), updates)
                assert got["w"].dtype == dtype and jnp.isfinite(got["w"]).all()


@pytest.mark.parametrize("rate", [0.0, lambda count: 0.0])
def test_at_a_rate_of_zero_nothing_is_shortened(rate):
    params, updates = {"w": jnp.ones((4, 2))}, {"w": jnp.full((4, 2), 1e9)}
    tx = cqjax.clip_by_output_change(0.0, learning_rate=rate)
    args = X, jnp.zeros((5, 2))
    got, state = clipped(tx, squared_error, params, args, updates)
    np.testing.assert_array_equal(got["w"], updates["w"])
    assert state.clipped.tolist() == [0]


@pytest.mark.parametrize("o", [3, 30])
def test_a_layer_may_start_from_zero(o):
    """It moves by the part of what weights of ±1/√d would give; a bias adds nothing to that."""
    params = {"b": jnp.zeros(o), "w": jnp.zeros((4, o))}
    x, updates = 3 * jnp.eye(4), {"b": jnp.zeros(o), "w": normal(params, 1, 100.0)["w"]}
    tx = cqjax.clip_by_output_change(CHANGE)
    got, state = clipped(tx, squared_error, params, (x, jnp.zeros((4, o))), updates)
    want = CHANGE * 3 * o**0.5
    np.testing.assert_allclose(length(outputs(x, got)), want, rtol=1e-5 if o <= 8 else 0.5)
    assert state.clipped.tolist() == [0, 1]


@pytest.mark.parametrize("route", ["rows", "inputs"])
def test_a_bias_that_undoes_a_large_mean(route):
    """What moves is a thousandth of what the weight and the bias move alone, in float32."""
    options, loss = ROUTES[route]
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem(64, 5, 3, bias=True))
    x = x.at[:, 0].set(1000.0)
    w = normal(params, 1, 1e4)["w"].at[0].set(1e4)
    updates = {"w": w, "b": jnp.full(3, -1e7, jnp.float32)}
    params = jax.tree.map(jnp.zeros_like, params)
    tx = cqjax.clip_by_output_change(CHANGE)
    got, _ = clipped(tx, loss, params, (x, y), updates, **options)
    start = length(np.asarray(x, np.float64)) * np.sqrt(3 / 5)
    factor = CHANGE * start / length(outputs(x, updates))
    assert factor < 0.1
    np.testing.assert_allclose(got["w"], factor * updates["w"], rtol=1e-3)


def test_without_parameters():
    tx = cqjax.clip_by_output_change()
    _, _, captures = cqjax.value_and_grad(two)(PARAMS, X)
    message = r"clip_by_output_change: no parameters .* update\(grads, state, params, captures=capt"
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, tx.init(PARAMS), captures=captures)
