"""`value_and_grad` and the transformations within `jax.shard_map`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly
from jax import lax
from jax.sharding import PartitionSpec as P
from many_devices import (
    MESH,
    SPLIT,
    assert_close,
    collectives,
    loss_fn,
    make_mesh,
    mapped,
    mean_loss,
    problem,
    step,
    steps_of,
    trained,
)

import cqjax

pytestmark = pytest.mark.usefixtures("float64")

TX = cqjax.csgd(0.5, damping=0.1, relative_damping=0.0, max_change=None)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_network_of_all_kinds(solver):
    """Each product gets the single device's update; the loss may be the devices' mean, or own."""
    params, batch = problem()

    def own_loss(*args):
        params, state, value = step(loss_fn, TX, *args, solver="primal")
        return params, state, lax.pmean(value, "data")

    sharded = steps_of(mean_loss, TX, solver="dual") if solver == "dual" else own_loss
    want = trained(quickly(steps_of(loss_fn, TX, solver=solver)), TX, params, batch, 1)
    assert_close(trained(mapped(sharded), TX, params, batch, 1), want)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_bound_on_the_change_of_outputs(solver):
    """It is for the rows of all devices together, and so is the count."""
    params, batch = problem()
    tx = cqjax.csgd(0.5, max_change=0.05)
    want = trained(quickly(steps_of(loss_fn, tx, solver=solver)), tx, params, batch, 2)
    got = trained(mapped(steps_of(mean_loss, tx, solver=solver)), tx, params, batch, 2)
    assert_close(got, want)
    assert want[1][1].clipped.sum() > 2


def dense_loss(params, x, y):
    for layer in params:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x - y) ** 2)


def dense_mean(*args):
    return lax.pmean(dense_loss(*args), "data")


def dense(width=6, layers=3, examples=32):
    keys = jax.random.split(jax.random.key(1), layers + 2)
    params = [{"w": jax.random.normal(k, (width, width)), "b": jnp.zeros(width)} for k in keys[2:]]
    return params, tuple(jax.random.normal(k, (examples, width)) for k in keys[:2])


def plan_of(loss, params, batch, mesh=MESH, **options):
    """The plan that is made within `jax.shard_map`."""
    specs = (P(), *[P("data")] * len(batch))
    made = jax.shard_map(cqjax.plan(loss, **options), mesh=mesh, in_specs=specs, out_specs=P())
    return jax.eval_shape(made, params, *batch)


ACROSS = [
    {},
    {"spread_over": SPLIT},
    {"update_every": 3},
    {"ema_decay": 0.9, "capture_every": 2, "update_every": 2, "spread_over": SPLIT},
]


@pytest.mark.parametrize("options", ACROSS, ids=lambda options: "-".join(options))
def test_consequentialism_across_batches(options):
    params, batch = dense()
    kept = {"update_every", "ema_decay"} & set(options)
    here = {"plan": plan_of(dense_mean, params, batch)} if kept else {}
    alone = {"plan": cqjax.plan(dense_loss)(params, *batch)} if kept else {}
    txs = [
        optax.chain(
            cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0, **options | own),
            optax.sgd(0.5),
        )
        for own in (here, alone)
    ]
    got = trained(mapped(steps_of(dense_mean, txs[0]), 2), txs[0], params, batch)
    want = trained(quickly(steps_of(dense_loss, txs[1])), txs[1], params, batch)
    assert_close(got, want)


def test_a_plan_counts_the_rows_of_all_devices():
    params, batch = dense(examples=32)
    plan = plan_of(dense_mean, params, batch)
    assert plan.batch_size == 32 * 6  # examples of all devices, times outputs
    assert [(block.rows, block.rows_with_bias) for block in plan.blocks] == [(32, 32)] * 3
    assert plan_of(dense_loss, params, batch).batch_size == 4 * 6
    assert {block.solver for block in plan.blocks} == {"primal"}  # 32 rows, though 4 on each
    assert plan.blocks[0].flops("primal") < cqjax.plan(dense_loss)(params, *batch).blocks[0].flops(
        "primal"
    )


def convolved_loss(params, x, y):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel, *dense = params
    z = lax.conv_general_dilated(
        x.reshape(-1, 6, 1, 1), kernel, (1, 1), "SAME", dimension_numbers=numbers
    )
    return dense_loss(dense, jnp.tanh(z).reshape(x.shape), y)


def both_ways(params, x, token, y):
    """A table that is looked up and makes logits, and slopes of a network with a kernel."""
    numbers = ("NHWC", "HWIO", "NHWC")

    def score(x):
        z = lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        hidden = jnp.tanh(jnp.tanh(z).reshape(len(x), -1) @ params["w"] + params["b"])
        return jnp.sum(jnp.tanh(hidden @ params["v"]))

    logits = jnp.tanh(params["table"][token]) @ params["table"].T
    slopes = jax.grad(score)(x)
    return jnp.mean(jnp.sum(slopes**2, (1, 2, 3)) + jnp.sum((logits - y) ** 2, -1))


def test_weights_used_both_ways():
    rng = np.random.default_rng(0)
    sizes = {"kernel": (3, 3, 2, 4), "w": (64, 12), "b": (12,), "v": (12, 10), "table": (11, 6)}
    params = {name: jnp.asarray(rng.normal(size=size) / 3) for name, size in sizes.items()}
    batch = rng.normal(size=(16, 4, 4, 2)), np.arange(16) % 11, rng.normal(size=(16, 11))
    batch = jax.tree.map(jnp.asarray, batch)
    assert not cqjax.plan(both_ways)(params, *batch).uncovered()

    def mean(*args):
        return lax.pmean(both_ways(*args), "data")

    tx = cqjax.csgd(0.1, max_change=0.05)
    want = trained(quickly(steps_of(both_ways, tx)), tx, params, batch, 2)
    got = trained(mapped(steps_of(mean, tx)), tx, params, batch, 2)
    assert_close(got, want, 1e-7)  # conjugate gradients end at 1e-11
    assert want[1][1].clipped.sum() > 0


def test_nlms_and_the_matched_signal():
    params, batch = dense(layers=2)
    params = [jnp.ones((3, 1, 1, 1)), *params]

    def mean(*args):
        return lax.pmean(convolved_loss(*args), "data")

    nlms = optax.chain(cqjax.scale_by_nlms(), optax.sgd(0.1))
    for tx, options in ((nlms, {"solver": "dual"}), (TX, {"signal": "matched"})):
        got = trained(mapped(steps_of(mean, tx, **options), 2), tx, params, batch, 1)
        want = trained(quickly(steps_of(convolved_loss, tx, **options)), tx, params, batch, 1)
        assert_close(got, want)


def test_a_changed_gradient():
    """The dual compares updates and gradients, and solves for the rest."""
    params, batch = dense(examples=8)
    tx = optax.chain(optax.add_decayed_weights(0.1), TX)
    got = trained(mapped(steps_of(dense_mean, tx, solver="dual"), 2), tx, params, batch, 2)
    want = trained(quickly(steps_of(dense_loss, tx, solver="dual")), tx, params, batch, 2)
    assert_close(got, want)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_weights_that_differ_between_devices(solver):
    """Networks side by side on another axis, with failed solves in one: as each for itself."""
    mesh = make_mesh(model=2, data=4)
    params, (x, y) = dense(examples=16)
    both = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
    both[0]["w"] = both[0]["w"].at[1].set(jnp.inf)

    def own(params, x, y):
        mine = jax.tree.map(lambda a: a[0], params)
        new, state, value = step(dense_mean, TX, mine, TX.init(mine), x, y, solver=solver)
        return jax.tree.map(lambda a: a[None], (new, value)), state[0].fallbacks

    specs = (P("model"), P("data"), P("data"))
    run = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(P("model"), P()))
    (got, value), fallbacks = quickly(run)(both, x, y)
    alone = quickly(steps_of(dense_loss, TX, solver=solver))
    total = 0
    for i in range(2):
        mine = jax.tree.map(lambda a, i=i: a[i], both)
        want, state, loss = alone(mine, TX.init(mine), x, y)
        assert_close(jax.tree.map(lambda a, i=i: a[i], got), want)
        assert_close(value[i], loss)
        total += state[0].fallbacks
    assert total.sum() > 0
    assert (fallbacks == total).all()


def test_parameters_that_vary_differently_are_not_solved_for_together():
    def loss(params, x):
        z = x @ jnp.concatenate([params["own"], params["shared"]], 1) @ params["w"] + params["b"]
        return lax.pmean(jnp.mean(z**2), "data")

    params = {"own": jnp.ones((8, 3)), "shared": jnp.ones((1, 2)), "w": jnp.ones((40, 2))}
    specs = {"own": P("data"), "shared": P(), "w": P("data"), "b": P()}
    make = cqjax.plan(loss)
    made = jax.shard_map(make, mesh=MESH, in_specs=(specs, P("data")), out_specs=P())
    plan = jax.eval_shape(made, params | {"b": jnp.ones(2)}, jnp.ones((16, 1)))
    assert [block.paths for block in plan.blocks] == [("w",)]
    uncovered = plan.uncovered()
    assert uncovered["own"] == ("is joined with one that varies over other mesh axes",)
    assert set(uncovered) == {"own", "shared", "b"}


def test_collectives():
    """By the primal route no rows are gathered; what is not used is not communicated."""
    params, batch = dense(examples=64)

    def gradient(params, state, *batch, **options):
        return cqjax.value_and_grad(dense_mean, **options)(params, *batch)[:2]

    def compiled(function):
        return mapped(function, 2).lower(params, TX.init(params), *batch).compile()

    plain = compiled(lambda params, state, *batch: jax.value_and_grad(dense_mean)(params, *batch))
    for solver in ("primal", "dual"):
        unused = compiled(functools.partial(gradient, solver=solver))
        used = compiled(steps_of(dense_mean, TX, solver=solver))
        for kind in ("all-gather", "all-reduce"):
            assert sorted(collectives(unused, kind)) == sorted(collectives(plain, kind))
        rows = [shape for shape in collectives(used, "all-gather") if 64 in shape]
        assert bool(rows) == (solver == "dual")
        assert ((1, 7, 7) in collectives(used, "all-reduce")) == (solver == "primal")


def test_measured_factors_are_refused():
    params, batch = dense()
    plan = cqjax.plan(dense_loss)(params, *batch)
    tx = cqjax.scale_by_back_matching(plan, factors="measured")

    def update(params, state, *batch):
        return tx.update(params, state, params, value_fn=lambda p: dense_mean(p, *batch))

    with pytest.raises(ValueError, match="measured factors within jax.shard_map over data"):
        mapped(update, 2)(params, tx.init(params), *batch)


def test_a_batch_size_that_differs_between_devices():
    params, batch = dense()

    def update(params, state, x, y):
        count = jnp.sum(x[:, 0] > 0)
        return step(dense_mean, TX, params, state, x, y, batch_size=count)

    with pytest.raises(ValueError, match="batch_size varies over data.*lax.psum"):
        mapped(update, 2)(params, TX.init(params), *batch)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.LayerNorm()(nn.Dense(6)(x))))


def test_rates_of_normalisations():
    """By Algorithm 1: the updates are those of one device, for every parameter."""
    model, x = Normalised(), jax.random.normal(jax.random.key(0), (16, 4))
    params = model.init(jax.random.key(1), x)

    def updates(reduce, params, x):
        def loss(params, x):
            return reduce(jnp.mean(model.apply(params, x) ** 2))

        _, grads, captures = cqjax.value_and_grad(loss)(params, x)
        rates = cqjax.back_matching_rates(captures, params)
        return jax.tree.map(jnp.multiply, rates, grads)

    own = functools.partial(updates, lambda loss: loss)
    mean = functools.partial(updates, lambda loss: lax.pmean(loss, "data"))
    specs = {"mesh": MESH, "in_specs": (P(), P("data")), "out_specs": P()}
    expected = own(params, x)
    for sharded in (own, mean):
        assert_close(jax.jit(jax.shard_map(sharded, **specs))(params, x), expected, 1e-5)
