"""Zoo: lifted transformations and transformations inside the loss."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import references as ref
from zoo_base import (
    Case,
    Mlp,
    biases,
    dense_stack,
    flax_regression,
    kernels,
    squared_reference,
)

# Stacks of layers.


class Residual(nn.Module):
    """x + tanh(Dense(x)), as the body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(x.shape[-1], name="dense")(x)), None


def _scan(module, length):
    return nn.scan(module, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)


class Scanned(nn.Module):
    """Three layers in one scan, then a Dense."""

    @nn.compact
    def __call__(self, x):
        x, _ = _scan(Residual, 3)(name="layers")(x, None)
        return nn.Dense(2, name="last")(x)


class Group(nn.Module):
    """Two rematerialised layers, as the body of the outer scan."""

    @nn.compact
    def __call__(self, x, _):
        return _scan(nn.remat(Residual, prevent_cse=False), 2)(name="inner")(x, None)


class Nested(nn.Module):
    """A scan over three groups, each a scan over two layers."""

    @nn.compact
    def __call__(self, x):
        x, _ = _scan(nn.remat(Group, prevent_cse=False), 3)(name="outer")(x, None)
        return nn.Dense(2, name="last")(x)


def _residual_stack(path, layer_of, count):
    def forward(params, x, linear):
        stacked = layer_of(params["params"])["dense"]
        weights = stacked["kernel"].reshape(count, *stacked["kernel"].shape[-2:])
        shifts = stacked["bias"].reshape(count, -1)
        for w, b in zip(weights, shifts, strict=True):
            x = x + np.tanh(ref.dense(linear, f"params/{path}", x, {"kernel": w, "bias": b}))
        return ref.dense(linear, "params/last", x, params["params"]["last"])

    return forward


def _stack_case(name, model, path, layer_of, count):
    return Case(
        name=name,
        make=flax_regression(model, (4, 3)),
        reference=squared_reference(_residual_stack(path, layer_of, count)),
        covered=kernels(path, "last"),
        biases=biases(path, "last"),
        stacked={f"params/{path}/kernel": count},
    )


# Ensembles.


class Ensemble(nn.Module):
    """Three networks with their own parameters."""

    in_axes: int | None

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            Mlp,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=self.in_axes,
            out_axes=1,
            axis_size=3,
        )
        return members((4, 2), name="members")(x)


def _ensemble(params, x, linear):
    p = params["params"]["members"]
    x = np.stack([x] * 3) if x.ndim == 2 else x.transpose(1, 0, 2)
    h = np.tanh(ref.grouped_dense(linear, "params/members/Dense_0", x, p["Dense_0"]))
    return ref.grouped_dense(linear, "params/members/Dense_1", h, p["Dense_1"]).transpose(1, 0, 2)


def _ensemble_case(name, in_axes, x_shape):
    return Case(
        name=name,
        make=flax_regression(Ensemble(in_axes), x_shape),
        reference=squared_reference(_ensemble),
        covered=kernels("members/Dense_0 members/Dense_1"),
        biases=biases("members/Dense_0 members/Dense_1"),
    )


# One module wrapped in remat or jit.


class Wrapped(nn.Module):
    """A lifted network, then a Dense."""

    lift: Callable

    @nn.compact
    def __call__(self, x):
        h = self.lift(Mlp)((4, 3), name="inner")(x)
        return nn.Dense(2, name="last")(nn.tanh(h))


WRAPPED = ("inner/Dense_0", "inner/Dense_1", "last")


def _wrapped(params, x, linear):
    p = params["params"]
    layers = [p["inner"]["Dense_0"], p["inner"]["Dense_1"], p["last"]]
    for i, (path, layer) in enumerate(zip(WRAPPED, layers, strict=True)):
        x = np.tanh(x) if i else x
        x = ref.dense(linear, f"params/{path}", x, layer)
    return x


def _wrapped_case(name, lift):
    return Case(
        name=name,
        make=flax_regression(Wrapped(lift), (4, 3)),
        reference=squared_reference(_wrapped),
        covered=kernels(*WRAPPED),
        biases=biases(*WRAPPED),
    )


# Branches: the data chooses; the other branch's parameters have zero gradients.


class Branches(nn.Module):
    """A layer, one of two layers by the sign of a sum of inputs, a layer."""

    sign: float

    def setup(self):
        self.first, self.last = nn.Dense(4), nn.Dense(2)
        self.yes, self.no = nn.Dense(3), nn.Dense(3)

    def __call__(self, x):
        h = nn.tanh(self.first(x))
        if self.is_initializing():
            self.yes(h), self.no(h)
        positive = self.sign * jnp.sum(x) > 0
        h = nn.cond(positive, lambda m, h: m.yes(h), lambda m, h: m.no(h), self, h)
        return self.last(nn.tanh(h))


def _branches(sign):
    def forward(params, x, linear):
        branch = "yes" if sign * np.sum(x) > 0 else "no"
        return dense_stack("first", branch, "last")(params, x, linear)

    return forward


def _branch_case(name, sign):
    return Case(
        name=name,
        make=flax_regression(Branches(sign), (4, 3)),
        reference=squared_reference(_branches(sign)),
        covered=kernels("first yes no last"),
        biases=biases("first yes no last"),
    )


# Transformations in the loss.

MICROBATCHES = 3


def _per_example(apply):
    def loss(params, x, y):
        def one(x, y):
            return jnp.sum((apply(params, x) - y) ** 2)

        return jnp.mean(jax.vmap(one)(x, y))

    return loss


def _microbatched(apply):
    def loss(params, x, y):
        def add(total, batch):
            x, y = batch
            return total + jnp.sum((apply(params, x) - y) ** 2) / len(x) / MICROBATCHES, None

        batches = [a.reshape(MICROBATCHES, -1, a.shape[-1]) for a in (x, y)]
        return jax.lax.scan(add, jnp.zeros((), y.dtype), tuple(batches))[0]

    return loss


def _microbatched_reference(params, args, linear):
    parts = (np.split(a, MICROBATCHES) for a in args)
    one = squared_reference(dense_stack("Dense_0", "Dense_1"))
    return sum(one(params, batch, linear) / MICROBATCHES for batch in zip(*parts, strict=True))


def _loss_case(name, loss, reference):
    return Case(
        name=name,
        make=flax_regression(Mlp(), (6, 3), loss=loss),
        reference=reference,
        covered=kernels("Dense_0 Dense_1"),
        biases=biases("Dense_0 Dense_1"),
    )


CASES = [
    _stack_case("scan_layers", Scanned(), "layers/dense", lambda p: p["layers"], 3),
    _stack_case(
        "scan_in_scan_remat", Nested(), "outer/inner/dense", lambda p: p["outer"]["inner"], 6
    ),
    _ensemble_case("ensemble_shared_inputs", None, (4, 3)),
    _ensemble_case("ensemble_own_inputs", 1, (4, 3, 3)),
    _wrapped_case("remat", nn.remat),
    _wrapped_case("jit", nn.jit),
    _branch_case("cond", 1.0),
    _branch_case("cond_other_branch", -1.0),
    _loss_case(
        "vmap_per_example",
        _per_example,
        squared_reference(dense_stack("Dense_0", "Dense_1")),
    ),
    _loss_case("microbatch_scan", _microbatched, _microbatched_reference),
]
