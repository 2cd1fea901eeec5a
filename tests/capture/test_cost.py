"""What solves may cost: max_dim and block_size, against float64 NumPy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import zoo
from across_batches import stepper
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxpr_equations import shapes
from linear_layer import assert_close, expected, problem, squared_error
from zoo_moments import (
    DAMPING,
    block_inverses,
    inverse_of,
    second_moment,
    second_moments,
    updated,
    updates,
)

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


# max_dim.


def test_a_layer_that_is_too_large_keeps_its_gradient():
    case = zoo.by_name("mlp")  # with their biases, 4 and 5 features; 5 rows
    loss_fn, params, args = case.make(jnp.float64)
    plan = cqjax.plan(loss_fn, max_dim=4)(params, *args)
    path, bias = "params/Dense_1/kernel", "params/Dense_1/bias"
    reason = "needs the inverse of a matrix of 5 rows, more than max_dim"
    assert plan.uncovered()[path] == (reason,)
    assert set(plan.uncovered()) == {path, bias}
    lines = {line.split()[0]: line for line in str(plan).splitlines()}
    assert f"uncovered: {reason}" in lines[path]
    assert "whose weight is not solved for" in lines[bias]
    with pytest.raises(ValueError, match=f"{path}: {reason}"):
        cqjax.value_and_grad(loss_fn, max_dim=4, on_uncovered="error")(params, *args)
    grads, got = updated(loss_fn, params, args, max_dim=4)
    moments = second_moments(case, params, args)
    want = updates(case, moments, grads, block_inverses(moments, 5, {}))
    assert_close(got, want | {p: grads[p] for p in (path, bias)}, 1e-8)
    assert not np.allclose(grads["params/Dense_0/kernel"], got["params/Dense_0/kernel"])


@pytest.mark.filterwarnings("ignore:no parameter is covered")
@pytest.mark.parametrize(
    ("rows", "solver", "max_dim", "taken"),
    [
        (18, "auto", None, "dual"),
        (18, "auto", 18, "dual"),
        (18, "auto", 17, None),
        (18, "primal", 21, "primal"),
        (18, "primal", 20, None),
        (18, "dual", 17, None),
        (50, "auto", None, "primal"),
        (50, "auto", 21, "primal"),
        (50, "auto", 20, None),
        (50, "dual", 50, "dual"),
        (50, "dual", 49, None),
    ],
)
@pytest.mark.filterwarnings("ignore:no parameter is covered")
def test_the_solver_whose_matrix_is_small_enough(rows, solver, max_dim, taken):
    """20 features and a bias."""
    params, x, y = problem(rows, 20, 2, bias=True)
    options = {"solver": solver, "max_dim": max_dim}
    plan = cqjax.plan(squared_error, **options)(params, x, y)
    assert [block.solver for block in plan.blocks] == ([taken] if taken else [])
    assert bool(plan.uncovered()) == (taken is None)
    grads, got = updated(squared_error, params, (x, y), **options)
    assert_close(got, expected(params, x, y, DAMPING) if taken else grads, 1e-7)


@pytest.mark.parametrize(
    ("max_dim", "taken"),
    [(None, "primal"), (27, "primal"), (26, "dual"), (25, "dual"), (24, None)],
)
def test_the_cheaper_solver_may_be_that_of_the_larger_matrix(max_dim, taken):
    """25 rows of 27 features, whose XᵀX is an autocorrelation."""
    params, x = {"w": jnp.ones((3, 3, 3, 2))}, jnp.ones((1, 5, 5, 3))

    def loss(params, x):
        return jnp.mean(jax_output(params, x, 1) ** 2)

    plan = cqjax.plan(loss, batch_size=1, max_dim=max_dim)(params, x)
    assert [block.solver for block in plan.blocks] == ([taken] if taken else [])


def test_lookups_are_never_too_large():
    case = zoo.by_name("embed")
    loss_fn, params, args = case.make(jnp.float64)
    plan = cqjax.plan(loss_fn, max_dim=1)(params, *args)
    assert [block.name for block in plan.blocks] == ["params/embed/embedding"]


@pytest.mark.parametrize("solver", ["auto", "primal"])
def test_averages_do_not_invert_larger_matrices_either(solver):
    """Each batch is solved for alone then, by rows; or not at all."""
    params = problem(1, 64, 2, bias=True)[0]
    batches = [problem(8, 64, 2, seed=i)[1:] for i in range(3)]
    options = {"max_dim": 16, "solver": solver}
    plan = cqjax.plan(squared_error, **options)(params, *batches[0])
    tx = cqjax.scale_by_consequentialism(
        damping=DAMPING, plan=plan, ema_decay=0.9, update_every=2, relative_damping=0.0
    )
    state, step = tx.init(params), stepper(squared_error, tx, **options)
    assert not state.moments and not state.inverses
    if solver == "auto":
        for batch in batches:
            _, got, state = step(params, state, *batch)
            assert_close(got, expected(params, *batch, DAMPING), 1e-8)


# block_size.

PRODUCTS = {
    "mlp": {"Dense_0": [0, 1, 2], "Dense_1": [0, 0, 1, 1]},  # three features: parts of one
    "dense_general": {"first": [0, 0, 1, 1, 2, 2, 3, 3], "last": [0, 0, 1, 1, 2, 2]},
    "scan_layers": {"layers/dense": [0, 1, 2], "last": [0, 1, 2]},
    "microbatch_scan": {"Dense_0": [0, 1, 2], "Dense_1": [0, 0, 1, 1]},
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_blocks_of_two_features(name):
    """Contiguous ones; of several axes, along the longest. A bias is a layer of its own."""
    case = zoo.by_name(name)
    loss_fn, params, args = case.make(jnp.float64)
    parts = {f"params/{path}/kernel": part for path, part in PRODUCTS[name].items()}
    grads, got = updated(loss_fn, params, args, max_dim=2, block_size=2)
    moments, size = second_moments(case, params, args), len(args[0])
    want = updates(case, moments, grads, block_inverses(moments, size, parts))
    assert_close(got, want, 1e-8)
    for _, rows, _, bias in moments.values():
        np.testing.assert_allclose(got[bias], size * grads[bias] / (rows + DAMPING))


IMAGES = {
    ("conv_same", 9): {"first": [0, 1] * 9, "last": [0, 1, 2] * 4},
    ("conv_same", 4): {"first": None, "last": [0, 1, 2] * 4},
    ("conv_grouped", 8): {"first": [0, 1] * 6, "last": [0, 0, 1, 1] * 4},
    ("conv_1d", 3): {"first": [0, 1] * 3, "last": [0, 1, 2] * 2},
}


@pytest.mark.parametrize(("name", "block_size"), IMAGES)
def test_blocks_of_channels(name, block_size):
    """With all offsets of the window; where it has more of them, the gradient is kept."""
    case, options = zoo.by_name(name), {"max_dim": block_size, "block_size": block_size}
    loss_fn, params, args = case.make(jnp.float64)
    grads, got = updated(loss_fn, params, args, **options)
    parts = {f"params/{p}/kernel": part for p, part in IMAGES[name, block_size].items()}
    dropped = {site for site, part in parts.items() if part is None}
    moments = second_moments(case, params, args)
    known = {site: moment for site, moment in moments.items() if site not in dropped}
    want = updates(case, known, grads, block_inverses(known, len(args[0]), parts))
    assert_close(got, grads | want, 1e-8)
    uncovered = cqjax.plan(loss_fn, **options)(params, *args).uncovered()
    assert dropped == {path for path in uncovered if path.endswith("kernel")}


def test_features_that_fit_a_block_without_their_bias():
    """No larger matrix than max_dim is inverted: the bias is a layer of its own."""
    params, x, y = problem(40, 8, 2, bias=True)
    grads, got = updated(squared_error, params, (x, y), max_dim=8, block_size=8)
    xx = second_moment(np.asarray(x)[None], None)[0]
    want = {"w": inverse_of(xx, 40, DAMPING) @ grads["w"], "b": 40 * grads["b"] / (40 + DAMPING)}
    assert_close(got, want, 1e-8)


def test_a_product_that_contracts_nothing():
    """X is a column: its only feature is a block."""
    params, x = {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(3)}, jnp.arange(5.0)

    def loss(params, x):
        return jnp.mean((jnp.tensordot(x, params["w"], 0) + params["b"]) ** 2)

    grads, got = updated(loss, params, (x,), max_dim=1, block_size=1)
    want = {"w": 15 * grads["w"] / (30 + DAMPING), "b": 15 * grads["b"] / (5 + DAMPING)}
    assert_close(got, want, 1e-8)


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(64)(nn.tanh(nn.Dense(80, use_bias=False)(x))), None


class Net(nn.Module):
    """A convolution, a dense layer and a stack of pairs, none of whose weights is square."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64)(nn.Conv(99, (3, 3))(x).mean((1, 2)))
        cell = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return cell()(x, None)[0]


def test_nothing_of_the_full_size_is_computed():
    """No array has the features twice, or those and a bias, or an image's channels."""

    def loss(params, x):
        return jnp.mean(Net().apply(params, x) ** 2)

    x = jnp.ones((12, 4, 4, 7))
    params = Net().init(jax.random.key(0), x)
    options = {"max_dim": 11, "block_size": 9}
    plan = cqjax.plan(loss, **options)(params, x)
    split = {(7, 9), (11, 9), (2 * 8, 8), (2 * 10, 8)}
    assert {(block.batch, block.features) for block in plan.blocks} == split
    tx = cqjax.scale_by_consequentialism(plan=plan, ema_decay=0.9, update_every=2)

    def step(params, state, x):
        _, grads, captures = cqjax.value_and_grad(loss, **options)(params, x)
        return tx.update(grads, state, params, captures=captures)

    found = shapes(jax.make_jaxpr(step)(params, tx.init(params), x))
    assert any(shape[-1] == 99 for shape in found if shape)
    assert not {s for s in found if any(s.count(n) > 1 for n in s if n == 7 or n > 60)}


@st.composite
def layers(draw):
    """(the kernel's shape, the inputs', groups or 0 for a product, block_size)."""
    outputs, block_size = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        features = draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))
        return (*features, outputs), (9, *features), 0, block_size
    ndim, groups, channels = draw(st.tuples(*map(st.integers, (1, 1, 1), (2, 2, 5))))
    space = draw(st.tuples(*[st.integers(3, 4)] * ndim))
    window = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    kernel = (*window, channels, groups * outputs)
    return kernel, (3, *space, groups * channels), groups, block_size


def jax_output(params, x, groups):
    kernel = params["w"]
    if not groups:
        return jnp.tensordot(x, kernel, kernel.ndim - 1) + params.get("b", 0.0)
    space = "HW"[: kernel.ndim - 2]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    ones = (1,) * len(space)
    z = jax.lax.conv_general_dilated(
        x, kernel, ones, "SAME", dimension_numbers=numbers, feature_group_count=groups
    )
    return z + params.get("b", 0.0)


def rows_and_parts(x, kernel, groups, block_size):
    """X: (B, n, d), and the part of each feature, None where the parts are too large."""
    rows = []

    def linear(site, x, w):
        rows.append(x)
        return x @ w

    if groups:
        *window, channels, _ = kernel.shape
        sizes = zip(x.shape[1:-1], window, strict=True)
        padding = [references.same_padding(*size) for size in sizes]
        references.conv(linear, "", x, {"kernel": kernel}, padding=padding, groups=groups)
        axis = np.tile(np.arange(channels), math.prod(window))
    else:
        references.contract(linear, "", x, kernel, kernel.ndim - 1)
        features = kernel.shape[:-1]
        axis = np.indices(features)[int(np.argmax(features))].reshape(-1)
    length, d = axis.max() + 1, len(axis)
    for parts in range(1, length + 1):
        if length % parts == 0 and d // parts <= block_size:
            return rows[0], axis // (length // parts)
    return rows[0], None


@pytest.mark.filterwarnings("ignore:no parameter is covered")
@given(layer=layers(), bias=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_split(layer, bias, seed):
    """The least number of equal parts of at most `block_size` features, each solved for alone."""
    shape, inputs, groups, block_size = layer
    rng = np.random.default_rng(seed)
    x, params = rng.normal(size=inputs), {"w": rng.normal(size=shape)}
    if bias:
        params["b"] = rng.normal(size=shape[-1])
    rows, part = rows_and_parts(x, params["w"], groups, block_size)
    batch, n, d = rows.shape
    assume(not (bias and d == block_size))  # test_features_that_fit_a_block_without_their_bias

    def loss(params, x):
        return 0.5 * jnp.sum(jnp.sin(jax_output(params, x, groups))) / len(x)

    grads, got = updated(loss, params, (x,), max_dim=block_size, block_size=block_size)
    if part is None:
        return assert_close(got, grads, 1e-12)
    g = (
        references.split_groups(grads["w"], max(groups, 1))
        if groups
        else grads["w"].reshape(1, d, -1)
    )
    u = np.zeros_like(g)
    if bias and d < block_size:
        rows = np.concatenate([rows, np.ones((batch, n, 1))], -1)
        g = np.concatenate([g, grads["b"].reshape(batch, 1, -1)], 1)
        part, u = np.zeros(d + 1, int), np.zeros_like(g)
    for b in range(batch):
        for p in range(part.max() + 1):
            own = part == p
            xx = second_moment(rows[b : b + 1, :, own], None)[0]
            u[b, own] = inverse_of(xx, len(x), DAMPING) @ g[b, own]
    want = {"w": references.join_groups(u[:, :d], shape) if groups else u[:, :d].reshape(shape)}
    if bias:
        alone = len(x) * grads["b"] / (n + DAMPING)
        want["b"] = u[:, d].reshape(-1) if d < block_size else alone
    assert_close(got, want, 1e-7)


# What is refused.


@pytest.mark.parametrize("make", [cqjax.plan, cqjax.value_and_grad])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8"])
@pytest.mark.parametrize("argument", ["max_dim", "block_size"])
def test_bad_numbers(make, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}={value}: expected a positive integer"):
        make(squared_error, **{argument: value})


@pytest.mark.parametrize("max_dim", [None, 7])
def test_a_block_size_that_exceeds_max_dim(max_dim):
    message = f"^block_size=8 with max_dim={max_dim}: expected max_dim, .*no larger than it"
    with pytest.raises(ValueError, match=message):
        cqjax.value_and_grad(squared_error, max_dim=max_dim, block_size=8)
