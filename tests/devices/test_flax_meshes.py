"""JAX's page on explicit sharding and Flax's examples, anew at small size, with a solve added."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cqjax
import cqjax.nnx
import cqjax.training

pytestmark = pytest.mark.usefixtures("float64")


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(np.abs(b).max(), 1e-3))


def batch(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def test_fsdp_and_tensor_parallel_layers():
    """As in "Explicit sharding": weights on both axes, gathered along one as each layer is met."""
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    x, y, *weights = batch((16, 8), (16, 8), (8, 12), (12, 8))
    tx = cqjax.cadam(0.05)

    def train(params, x, y, gather):
        def loss_fn(params, x, y):
            up, down = gather(params)
            hidden = jax.nn.gelu(x @ up)
            z = jnp.dot(hidden, down, out_sharding=jax.typeof(x).sharding if gather is at else None)
            return jnp.mean(jnp.sum((z - y) ** 2, -1))

        state = tx.init(params)
        for _ in range(2):
            _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
            updates, state = tx.update(grads, state, params, captures=captures)
            params = optax.apply_updates(params, updates)
        return params

    def at(params):
        up, down = params
        return jax.sharding.reshard(up, P(None, "model")), jax.sharding.reshard(down, P("model"))

    want = jax.jit(lambda *args: train(*args, lambda params: params))(weights, x, y)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, [P("data", "model"), P("model", "data")])
        got = jax.jit(lambda *args: train(*args, at))(placed, *jax.device_put((x, y), P("data")))
    assert [a.sharding.spec for a in got] == [a.sharding.spec for a in placed]
    assert_close(got, want)


class Block(nnx.Module):
    def __init__(self, split, rngs):
        start = nnx.initializers.lecun_normal()
        up, down = (nnx.with_partitioning(start, s) if split else start for s in split or (0, 0))
        self.up = nnx.Linear(6, 8, kernel_init=up, use_bias=False, rngs=rngs, param_dtype=float)
        self.down = nnx.Linear(8, 6, kernel_init=down, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_nnx_with_partitioned_parameters(kind):
    """As in Flax's guide "Scale up on multiple devices": metadata place parameters and state."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    x, y = batch((16, 6), (16, 6))

    def train(split, x, y):
        model = Block(split, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, cqjax.cadam(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, y):
            def loss_fn(model):
                return jnp.mean(jnp.sum((model(x) - y) ** 2, -1))

            _, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model)
            optimizer.update(model, grads, captures=captures)

        for _ in range(2):
            step(model, optimizer, x, y)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    want = train((), x, y)
    with jax.set_mesh(mesh):
        split = ("model", None), (None, "model")  # explicit axes: no contraction of split features
        if kind == AxisType.Auto:
            split = split[::-1]
        got = train(split, *jax.device_put((x, y), NamedSharding(mesh, P("data"))))
    assert len(got["down"]["kernel"].sharding.device_set) == 8
    assert_close(got, want)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), param_dtype=float)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=float)(x)
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(3, param_dtype=float)(x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_linen_with_batch_normalisation(kind):
    """As in Flax's imagenet example: a TrainState with batch statistics, the batch split."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    (x,) = batch((16, 5, 5, 2))
    labels = jnp.arange(16) % 3
    model = CNN()
    variables = model.init(jax.random.key(0), x, True)

    class TrainState(cqjax.training.TrainState):
        batch_stats: dict

    @jax.jit
    def step(state, x, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, x, True, mutable=["batch_stats"])
            one_hot = jax.nn.one_hot(labels, 3, dtype=logits.dtype)
            return optax.losses.softmax_cross_entropy(logits, one_hot).mean(), new["batch_stats"]

        (_, stats), grads, captures = cqjax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, captures=captures, batch_stats=stats)

    def train(place):
        state = TrainState.create(
            apply_fn=model.apply, tx=cqjax.cadam(0.05), **place(P(), variables)
        )
        for _ in range(2):
            state = step(state, *place(P("data"), (x, labels)))
        return state.params, state.batch_stats

    want = train(lambda spec, tree: tree)
    with jax.set_mesh(mesh):
        got = train(lambda spec, tree: jax.device_put(tree, NamedSharding(mesh, spec)))
    assert_close(got, want)
