"""NNX models, each with the same model in Linen or as a plain function of the same parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

X = jax.random.normal(jax.random.key(0), (6, 4))
IMAGES = jax.random.normal(jax.random.key(1), (6, 5, 5, 2))
TOKENS = jnp.arange(18).reshape(6, 3) % 5
Y = jax.random.normal(jax.random.key(2), (6, 2))


class Case(NamedTuple):
    """A model in NNX and elsewhere.

    Attributes:
      model: makes the NNX module.
      apply: `apply(params, rest, x)`, the same model of its pure state: results only.
      x: the input.
      layers: classes of the layers of some parameters, by path.
    """

    model: Callable[[], nnx.Module]
    apply: Callable[[Any, Any, Any], jax.Array]
    x: jax.Array
    layers: dict[str, type]


def linen(model: nn.Module) -> Callable[[Any, Any, Any], jax.Array]:
    """The `apply` of a Linen module; what it changes of its state is left out."""

    def apply(params, rest, x):
        statistics = {layer: values for layer, values in rest.items() if "mean" in values}
        variables = {"params": params, "batch_stats": statistics}
        return model.apply(variables, x, mutable=["batch_stats"])[0]

    return apply


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.last = nnx.Linear(5, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, use_bias=False, name="last")(jnp.tanh(nn.Dense(5, name="first")(x)))


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.grouped = nnx.Conv(4, 4, (2, 2), feature_group_count=2, rngs=rngs)
        self.scaled = nnx.LayerNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.last(self.scaled(self.grouped(x)).mean((1, 2)))


class LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), 2, "VALID", name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x))
        x = nn.LayerNorm(name="scaled")(
            nn.Conv(4, (2, 2), feature_group_count=2, name="grouped")(x)
        )
        return nn.Dense(2, name="last")(x.mean((1, 2)))


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.last = nnx.LinearGeneral((3, 4), 2, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.last(self.attention(self.embed(x)))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(nn.Embed(5, 4, name="embed")(x))
        return nn.DenseGeneral(2, axis=(-2, -1), name="last")(x)


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(4, 4, rngs=rngs)
        self.other = nnx.List([nnx.Linear(4, 2, rngs=rngs), self.one])

    def __call__(self, x):
        last, again = self.other
        return last(jnp.tanh(again(jnp.tanh(self.one(x)))))


class LinenShared(nn.Module):
    @nn.compact
    def __call__(self, x):
        one = nn.Dense(4, name="one")
        return nn.Dense(2, name="other/0")(jnp.tanh(one(jnp.tanh(one(x)))))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.norm(self.dense(x)))


class Scanned(nnx.Module):
    """Three layers made by one vmap and run by one scan, each rematerialised."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.blocks = make(rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block, x):
            return block(x)

        return nnx.jit(lambda last, x: last(x))(self.last, run(self.blocks, x))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x_ = nn.RMSNorm(name="norm")(nn.Dense(4, name="dense")(x))
        return x + jnp.tanh(x_), None


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="last")(stack(name="blocks")(x, None)[0])


class Bridged(nnx.Module):
    def __init__(self, rngs):
        self.linen = nnx.bridge.ToNNX(LinenMLP(), rngs=rngs).lazy_init(X)
        self.last = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.linen(x))


def bridged(params, rest, x):
    last = params["last"]
    return LinenMLP().apply({"params": params["linen"]}, x) @ last["kernel"] + last["bias"]


class HandWritten(nnx.Module):
    def __init__(self, rngs):
        self.weights = nnx.List([nnx.Param(rngs.normal((4, 3))), nnx.Param(rngs.normal((3, 2)))])
        self.bias = nnx.Param(jnp.zeros(3))
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        first, last = self.weights
        return jnp.tanh(x @ first + self.bias) @ last[...] * self.gain


def hand_written(params, rest, x):
    first, last = params["weights"].values()
    return jnp.tanh(x @ first + params["bias"]) @ last * params["gain"]


class Ensemble(nnx.Module):
    def __init__(self, rngs):
        self.members = nnx.split_rngs(splits=3)(nnx.vmap(MLP, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x).mean(0)


def ensemble(params, rest, x):
    first, last = params["members"]["first"], params["members"]["last"]["kernel"]
    hidden = jnp.tanh(jnp.einsum("nd,kdo->kno", x, first["kernel"]) + first["bias"][:, None])
    return jnp.einsum("kno,kop->knp", hidden, last).mean(0)


CASES = {
    "mlp": Case(
        lambda: MLP(nnx.Rngs(0)),
        linen(LinenMLP()),
        X,
        {"first/kernel": nnx.Linear, "first/bias": nnx.Linear},
    ),
    "conv": Case(
        lambda: ConvNet(nnx.Rngs(0)),
        linen(LinenConvNet()),
        IMAGES,
        {"conv/kernel": nnx.Conv, "norm/scale": nnx.BatchNorm, "scaled/bias": nnx.LayerNorm},
    ),
    "attention": Case(
        lambda: Attention(nnx.Rngs(0)),
        linen(LinenAttention()),
        TOKENS,
        {"attention/query/kernel": nnx.LinearGeneral, "embed/embedding": nnx.Embed},
    ),
    "shared": Case(
        lambda: Shared(nnx.Rngs(0)),
        linen(LinenShared()),
        X,
        {"one/kernel": nnx.Linear, "other/0/bias": nnx.Linear},
    ),
    "scanned": Case(
        lambda: Scanned(nnx.Rngs(0)),
        linen(LinenScanned()),
        X,
        {"blocks/dense/kernel": nnx.Linear, "blocks/norm/scale": nnx.RMSNorm},
    ),
    "bridged": Case(
        lambda: Bridged(nnx.Rngs(0)),
        bridged,
        X,
        {"linen/first/kernel": nn.Dense, "last/kernel": nnx.Linear},
    ),
    "hand-written": Case(
        lambda: HandWritten(nnx.Rngs(0)),
        hand_written,
        X,
        {"weights/0": HandWritten, "gain": HandWritten},
    ),
    "ensemble": Case(
        lambda: Ensemble(nnx.Rngs(0)), ensemble, X, {"members/last/kernel": nnx.Linear}
    ),
}
