"""The flow of layers is found when somebody asks for it, and outlives the trace."""

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
