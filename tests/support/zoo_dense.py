"""Zoo: fully connected layers of Flax."""

import flax.linen as nn
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
    squared_error,
    squared_reference,
)

BOTH = "Dense_0 Dense_1"
MLP_SITES = {"covered": kernels(BOTH), "biases": biases(BOTH)}


def _mlp_case(name, model, x_shape, activation=np.tanh, **options):
    return Case(
        name=name,
        make=flax_regression(model, x_shape),
        reference=squared_reference(dense_stack("Dense_0", "Dense_1", activation=activation)),
        **(MLP_SITES | options),
    )


class Setup(nn.Module):
    """Layers defined in setup(), one of them in a list."""

    def setup(self):
        self.first = nn.Dense(4)
        self.rest = [nn.Dense(3), nn.Dense(2)]

    def __call__(self, x):
        x = self.first(x)
        for layer in self.rest:
            x = layer(nn.tanh(x))
        return x


class Shared(nn.Module):
    """One layer called twice."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(x.shape[-1], name="shared")
        return nn.Dense(2, name="last")(nn.tanh(shared(nn.tanh(shared(x)))))


def _shared(params, x, linear):
    p = params["params"]
    for _ in range(2):
        x = np.tanh(ref.dense(linear, "params/shared", x, p["shared"]))
    return ref.dense(linear, "params/last", x, p["last"])


class General(nn.Module):
    """DenseGeneral over several axes, inside and outside."""

    @nn.compact
    def __call__(self, x):
        h = nn.DenseGeneral((3, 2), axis=(-2, -1), name="first")(x)
        return nn.DenseGeneral(2, axis=(1, 2), name="last")(nn.tanh(h))


def _general(params, x, linear):
    p = params["params"]
    h = ref.dense(linear, "params/first", x, p["first"], axes=2)
    return ref.dense(linear, "params/last", np.tanh(h), p["last"], axes=2)


class Einsums(nn.Module):
    """A separate kernel for each group, then one that contracts the groups too."""

    @nn.compact
    def __call__(self, x):
        h = nn.Einsum((2, 3, 4), "ngi,gio->ngo", name="grouped")(x)
        return nn.Einsum((2, 4, 2), "ngo,gop->np", name="joint")(nn.tanh(h))


def _einsums(params, x, linear):
    p = params["params"]
    h = ref.grouped_dense(linear, "params/grouped", x.transpose(1, 0, 2), p["grouped"])
    h = np.tanh(h.transpose(1, 0, 2))
    return ref.dense(linear, "params/joint", h, p["joint"], axes=2)


L2 = 0.01


def _with_l2(apply):
    data_loss = squared_error(apply)

    def loss(params, x, y):
        layers = params["params"].values()
        return data_loss(params, x, y) + L2 * sum(jnp.sum(p["kernel"] ** 2) for p in layers)

    return loss


def _l2_reference(params, args, linear):
    data = squared_reference(dense_stack("Dense_0", "Dense_1"))(params, args, linear)
    return data + L2 * sum(np.sum(p["kernel"] ** 2) for p in params["params"].values())


CASES = [
    _mlp_case("mlp", Mlp(activation=nn.relu), (5, 3), ref.relu),
    _mlp_case("mlp_no_bias", Mlp(use_bias=False), (5, 3), biases=frozenset()),
    _mlp_case("dense_leading_dims", Mlp(), (2, 3, 4)),
    _mlp_case("bfloat16", Mlp(dtype=jnp.bfloat16), (5, 3), rtol=3e-2, low_precision=True),
    Case(
        name="dense_general",
        make=flax_regression(General(), (3, 4, 2)),
        reference=squared_reference(_general),
        covered=kernels("first last"),
        biases=biases("first last"),
    ),
    Case(
        name="einsum",
        make=flax_regression(Einsums(), (3, 2, 3)),
        reference=squared_reference(_einsums),
        covered=kernels("grouped joint"),
        biases=biases("grouped joint"),
    ),
    Case(
        name="setup_module",
        make=flax_regression(Setup(), (4, 3)),
        reference=squared_reference(dense_stack("first", "rest_0", "rest_1")),
        covered=kernels("first rest_0 rest_1"),
        biases=biases("first rest_0 rest_1"),
    ),
    Case(
        name="shared_module",
        make=flax_regression(Shared(), (4, 3)),
        reference=squared_reference(_shared),
        covered=kernels("shared last"),
        biases=biases("shared last"),
    ),
    Case(
        name="l2_term",
        make=flax_regression(Mlp(), (5, 3), loss=_with_l2),
        reference=_l2_reference,
        direct={path: lambda w: 2 * L2 * w for path in kernels(BOTH)},
        **MLP_SITES,
    ),
]
