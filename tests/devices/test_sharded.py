"""Programs under `jax.jit` whose arrays are split over devices by a `NamedSharding`."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from many_devices import EVERYWHERE, MESH, SPLIT, assert_close, collectives, step

import cqjax

EXAMPLES, SIDE = 256, 12
TX = optax.chain(
    cqjax.scale_by_consequentialism(relative_damping=0.1), optax.sgd(0.1, momentum=0.9)
)


def loss_fn(params, x, y):
    """Two layers of convolution, so many positions that patch Grams take partial sums, and one."""
    for layer in params["conv"]:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + layer["bias"])
    return jnp.mean(jnp.sum((x.mean((1, 2)) @ params["dense"] - y) ** 2, -1))


def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = (8, 8, 16)
    params = {
        "conv": [
            {"kernel": jax.random.normal(k, (3, 3, i, o)) / 8, "bias": jnp.zeros(o)}
            for k, i, o in zip(keys[:2], sizes[:-1], sizes[1:], strict=True)
        ],
        "dense": jax.random.normal(keys[2], (16, 8)) / 4,
    }
    x = jax.random.normal(keys[3], (EXAMPLES, SIDE, SIDE, 8))
    return params, (x, jax.random.normal(keys[4], (EXAMPLES, 8)))


def train(params, state, x, y):
    return step(loss_fn, TX, params, state, x, y, solver="primal")


def copied(tree):
    return jax.tree.map(lambda _: EVERYWHERE, tree)


def fully_sharded(tree):
    """Each array along its first axis that the devices divide."""

    def sharding(array):
        axis = next((i for i, n in enumerate(array.shape) if n % 8 == 0), None)
        return EVERYWHERE if axis is None else NamedSharding(MESH, P(*[None] * axis, "data"))

    return jax.tree.map(sharding, tree)


@pytest.mark.parametrize("placed", [copied, fully_sharded])
def test_training_by_the_primal_route(placed):
    """The single device's update; inputs stay where they are, and XᵀX is summed over devices."""
    params, batch = problem()
    trees = params, TX.init(params)
    shardings = placed(trees)
    places = (*shardings, SPLIT, SPLIT)
    jitted = jax.jit(train, in_shardings=places, out_shardings=(*shardings, EVERYWHERE))
    program = jitted.lower(*trees, *batch).compile()
    got = program(*jax.device_put((*trees, *batch), places))
    assert_close(got, jax.jit(train)(*trees, *batch), 1e-4)
    moved = [
        shape
        for kind in ("all-gather", "all-to-all", "collective-permute")
        for shape in collectives(program, kind)
    ]
    assert not [shape for shape in moved if SIDE in shape or EXAMPLES in shape]
    assert bool(moved) == (placed is fully_sharded)
    reduced = collectives(program, "all-reduce") + collectives(program, "reduce-scatter")
    assert (16, 16) in reduced
    if placed is fully_sharded:
        kernel, new = params["conv"][0]["kernel"], got[0]["conv"][0]["kernel"]
        assert new.addressable_data(0).size == kernel.size // 8


def test_rows_are_found_where_they_are_gathered():
    """The check above sees it where inputs are moved: by the dual route."""
    params, batch = problem()
    params, batch = params["dense"], (batch[0][:, 0, :2].reshape(EXAMPLES, 16), batch[1])

    def train(params, state, x, y):
        def loss(params, x, y):
            return jnp.mean((x @ params - y) ** 2)

        return step(loss, TX, params, state, x, y, solver="dual")

    places = (EVERYWHERE, EVERYWHERE, SPLIT, SPLIT)
    program = jax.jit(train, in_shardings=places).lower(params, TX.init(params), *batch).compile()
    assert [shape for shape in collectives(program, "all-gather") if EXAMPLES in shape]


@functools.cache
def deep(width, number, spread_over):
    """The compiled step of a network of layers of one width, and its arguments."""
    keys = jax.random.split(jax.random.key(0), number)
    params = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys]
    x = jax.random.normal(jax.random.key(1), (8, width))
    tx = optax.chain(
        cqjax.scale_by_consequentialism(damping=0.1, spread_over=spread_over, relative_damping=0.0),
        optax.sgd(0.1),
    )

    def loss(params, x):
        for weight in params:
            x = jnp.tanh(x @ weight)
        return jnp.mean(x**2)

    def train(params, state, x):
        return step(loss, tx, params, state, x, solver="primal")

    args, places = (params, tx.init(params), x), (EVERYWHERE, EVERYWHERE, SPLIT)
    compiled = jax.jit(train, in_shardings=places).lower(*args).compile()
    return compiled, jax.device_put(args, places)


@pytest.mark.parametrize("number", [9, 1])
def test_inversions_shared_out(number):
    """Each device inverts as many matrices as it must, by the compiled program's own count."""
    width = 96
    alone, shared = (
        deep(width, number, spread_over)[0].cost_analysis()["flops"]
        for spread_over in (None, SPLIT)
    )
    saved = number - -(-number // 8)
    assert (alone - shared > 0.8 * saved * 2 * width**3) if saved else (alone == shared)


def test_shared_inversions_change_nothing():
    """In matrices so large that LAPACK's batched factorisation on all devices once hung."""
    (alone, args), (shared, _) = (deep(96, 9, spread_over) for spread_over in (None, SPLIT))
    assert_close(shared(*args), alone(*args), 1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shared_inversions_of_an_ensemble(kind):
    """Members side by side by `jax.vmap`, one of whose matrices is singular."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    split = NamedSharding(mesh, P("data"))
    params = jax.random.normal(jax.random.key(0), (2, 3, 6, 6)) / 2
    x = jax.random.normal(jax.random.key(1), (16, 6))

    def step(spread_over, weights, x):
        tx = cqjax.scale_by_consequentialism(relative_damping=1e-3, spread_over=spread_over)

        def loss(weights, x):
            for weight in weights:
                x = jnp.tanh(x @ weight)
            return jnp.mean(x**2)

        weights = list(weights)
        _, grads, captures = cqjax.value_and_grad(loss, solver="primal")(weights, x)
        updates, state = tx.update(grads, tx.init(weights), weights, captures=captures)
        return updates, state.fallbacks

    params = params.at[1, 0].set(0)  # then the second layer's inputs are zero
    want = jax.jit(jax.vmap(functools.partial(step, None), (0, None)))(params, x)
    members = jax.vmap(functools.partial(step, split), (0, None))
    got = jax.jit(members)(
        jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(x, split)
    )
    assert_close(got, want, 1e-4)


def test_what_spread_over_may_be():
    for wrong in ("data", EVERYWHERE):
        with pytest.raises(TypeError, match="expected a jax.sharding.NamedSharding that names"):
            cqjax.scale_by_consequentialism(spread_over=wrong)
