"""The flow of layers is found when somebody asks for it, and outlives the trace."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

import cqjax
from cqjax.program import flow

X = jnp.ones((8, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(x))


def loss_fn(params, x):
    return jnp.mean(Net().apply(params, x, mutable=["batch_stats"])[0] ** 2)


PARAMS = {"params": Net().init(jax.random.key(0), X)["params"]}


@pytest.fixture
def nobody_asks(monkeypatch):
    def refuse(*args):
        raise AssertionError("the flow is asked for")

    monkeypatch.setattr(flow, "_Following", refuse)


def test_a_step_of_c_sgd_does_not_ask(nobody_asks):
    tx = cqjax.csgd(0.1)

    @jax.jit
    def step(params, state, x):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captures=captures)
        return jax.tree.map(jnp.add, params, updates), state

    step(PARAMS, tx.init(PARAMS), X)
    plan = cqjax.plan(loss_fn)(PARAMS, X)
    assert str(plan)
    with pytest.raises(AssertionError, match="asked for"):
        print(plan.flow.nodes)


def test_a_plan_outlives_its_trace():
    plans = []

    @jax.jit
    def traced(params, x):
        plans.append(cqjax.plan(loss_fn)(params, x))
        return loss_fn(params, x)

    with jax.check_tracer_leaks():
        traced(PARAMS, X)
    outside = cqjax.plan(loss_fn)(PARAMS, X)
    assert [node.name for node in plans[0].flow.nodes] == [
        "params/Dense_0/kernel",
        "BatchNorm_0",
        "params/Dense_1/kernel",
    ]
    assert plans[0].flow == outside.flow and hash(plans[0].flow) == hash(outside.flow)


def test_it_outlives_the_mesh():
    """How many devices have rows of their own is read when the loss is traced."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    plans = []

    def local(params, x):
        plans.append(cqjax.plan(loss_fn)(params, x))
        return jax.lax.pmean(loss_fn(params, x), "data")

    everywhere = PartitionSpec()
    jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(everywhere, PartitionSpec("data")), out_specs=everywhere
        )
    )(PARAMS, X)
    assert [node.devices for node in plans[0].flow.nodes] == [1, 4, 1]


def test_what_is_merely_added_is_known():
    """Also a bias that its layer's output is used without: it passes the signal as it is."""

    def loss_fn(params, x):
        z = x @ params["w"]
        return jnp.mean((z + params["b"]) ** 2 + z) + jnp.mean(x * params["scale"])

    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(3)}
    plan = cqjax.plan(loss_fn, signal="matched")(params, X)
    assert plan.uncovered().keys() == {"b", "scale"}
    assert plan.unmatched == ("scale",)


def pooled_loss(params, x):
    """A convolution, then pooling in another layout, then a dense layer."""
    numbers = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=numbers)
    z = z.transpose(0, 3, 1, 2)
    z = jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return jnp.mean((z.reshape(len(z), -1) @ params["w"]) ** 2)


POOLED = {"k": jnp.ones((3, 3, 1, 2)), "w": jnp.ones((8, 2))}
SQUARES = jnp.ones((5, 4, 4, 1))


def pickled(plan):
    return pickle.loads(pickle.dumps(plan))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_the_same_layers(copied):
    """Though the primitives of a copied program are others."""
    plan = cqjax.plan(pooled_loss)(POOLED, SQUARES)
    flow = copied(plan).flow
    assert [node.pooled for node in flow.nodes] == [0.25, 1.0]
    assert flow == plan.flow and flow.unknown == plan.flow.unknown == ()


def handed_down(params, x):
    """Three carries, of which each trip moves one to the next; the last is read."""
    numbers = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=numbers)
    a = jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    b = z.reshape(-1, 4, 2)[::4].reshape(a.shape)  # where its positions are is lost
    carries = a, b, jnp.zeros_like(a)
    (_, _, last), _ = jax.lax.scan(lambda c, _: ((c[0], c[0] * 1.0, c[1]), None), carries, None, 2)
    return jnp.mean((last.reshape(len(x), -1) @ params["w"]) ** 2)


def test_what_a_pass_sees_before_a_scan_has_settled_does_not_count():
    """b's first value has lost its positions; the other's, that replace it, are a quarter."""
    plan = cqjax.plan(handed_down)(POOLED, SQUARES)
    assert [node.pooled for node in plan.flow.nodes] == [0.25, 1.0]


def test_pooling_in_branches_for_platforms():
    def pool(z):
        return jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def loss_fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=numbers)
        z = jax.lax.platform_dependent(z, cpu=pool, default=pool)
        return jnp.mean((z.reshape(len(z), -1) @ params["w"]) ** 2)

    plan = cqjax.plan(loss_fn)(POOLED, SQUARES)
    assert [node.pooled for node in plan.flow.nodes] == [0.25, 1.0]
