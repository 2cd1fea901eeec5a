"""Networks for the tests of back-matching, each twice: in JAX, and as layers of the reference."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import back_matching_reference as ref
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

# Half of XLA's optimisation is enough for a test that runs once.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def assert_close(got, want, rtol=1e-9):
    """Equal {path: array}, up to rtol of an array's largest entry."""
    assert got.keys() == want.keys()
    for path in want:
        assert got[path].shape == want[path].shape, path
        bound = rtol * max(np.abs(want[path]).max(), 1e-3)
        np.testing.assert_allclose(got[path], want[path], rtol=0, atol=bound, err_msg=path)


class Case(NamedTuple):
    """A network: `shapes()` of its parameters, `apply(params, x)`, and its layers' reference."""

    shapes: Callable[..., Any]
    apply: Callable[..., Any]
    layers: Callable[[], list]
    x_shape: tuple[int, ...]
    loss: str = "squared_error"


MEAN, VAR = np.random.default_rng(7).normal(size=4), np.arange(1.0, 5.0)


def flax(layers, *about):
    """A case of Flax layers in a row; layer i is called layers_i."""

    @functools.cache
    def variables():  # outside of the loss: `problem` asks for the shapes first
        x = jnp.zeros(about[1])
        shapes = jax.eval_shape(nn.Sequential(layers()).init, jax.random.key(0), x)
        stats = traverse_util.flatten_dict(shapes.get("batch_stats", {}))
        running = {"mean": MEAN, "var": VAR}
        fill = {keys: np.resize(running[keys[-1]], s.shape) for keys, s in stats.items()}
        return shapes["params"], traverse_util.unflatten_dict(fill)

    def apply(params, x):
        stats = jax.tree.map(lambda s: jnp.asarray(s, x.dtype), variables()[1])
        full = {"params": params, "batch_stats": stats}
        return nn.Sequential(layers()).apply(full, x, mutable="batch_stats")[0]

    return Case(lambda: variables()[0], apply, *about)


def pure(shapes, apply, *about):
    """A case of a function of {layer: {"kernel": array, ...}}."""
    floats = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, float), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return Case(lambda: floats, apply, *about)


def max_pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def flat(x):
    return x.reshape(len(x), -1)


def batch_norm(running=False, affine=True):
    return nn.BatchNorm(use_running_average=running, use_bias=affine, use_scale=affine)


def lenet():
    plain = functools.partial(batch_norm, affine=False)
    conv = functools.partial(nn.Conv, kernel_size=(5, 5), padding="VALID", use_bias=False)
    dense = functools.partial(nn.Dense, use_bias=False)
    block = [plain(), nn.relu]
    layers = [conv(2), *block, max_pool, conv(3), plain(), nn.relu, max_pool, flat]
    return [*layers, dense(7), plain(), nn.relu, dense(6), plain(), nn.relu, dense(4)]


def lenet_reference():
    def norm(axes):
        return [ref.Norm("-", axes, 1e-5), ref.relu()]

    conv = [ref.Conv("layers_0"), *norm((0, 1, 2)), ref.Pool((2, 2))]
    conv += [ref.Conv("layers_4"), *norm((0, 1, 2)), ref.Pool((2, 2)), ref.Reshape(-1)]
    fc = [ref.Dense("layers_9"), *norm(0), ref.Dense("layers_12"), *norm(0)]
    return [*conv, *fc, ref.Dense("layers_15")]


def convolutions():
    return [
        nn.Conv(4, (3, 2), (2, 1), padding=((2, 0), (0, 1))),
        nn.tanh,
        nn.Conv(6, (2, 3), padding="SAME", kernel_dilation=(2, 1), feature_group_count=2),
        lambda x: nn.avg_pool(nn.relu(x), (2, 2), (2, 2)),
        nn.Conv(2, (1, 1), (2, 2), use_bias=False),
        flat,
        nn.Dense(2),
    ]


CONV_SHAPES = {
    "layers_0": {"kernel": (3, 2, 3, 4), "bias": (4,)},
    "layers_2": {"kernel": (2, 3, 2, 6), "bias": (6,)},
    "layers_4": {"kernel": (1, 1, 6, 2)},
    "layers_6": {"kernel": (4, 2), "bias": (2,)},
}


def convolutions_by_hand(params, x):
    first, second, third, last = (params[name] for name in CONV_SHAPES)
    conv = functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.tanh(conv(x, first["kernel"], (2, 1), [(2, 0), (0, 1)]) + first["bias"])
    x = conv(x, second["kernel"], (1, 1), "SAME", rhs_dilation=(2, 1), feature_group_count=2)
    x = jnp.maximum(x + second["bias"], 0)
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    x = conv(x, third["kernel"], (2, 2), "VALID").reshape(n, -1)
    return x @ last["kernel"] + last["bias"]


def convolutions_reference():
    return [
        ref.Conv("layers_0", (2, 1), [(2, 0), (0, 1)]),
        ref.tanh(),
        ref.Conv("layers_2", padding=[(1, 1), (1, 1)], dilation=(2, 1), groups=2),
        ref.relu(),
        ref.Pool((2, 2), "mean"),
        ref.Conv("layers_4", (2, 2)),
        ref.Reshape(-1),
        ref.Dense("layers_6"),
    ]


def transposed():
    return [
        nn.ConvTranspose(4, (3, 3), (2, 2)),
        batch_norm(running=True),
        nn.tanh,
        nn.Conv(3, (1, 2)),
        nn.GroupNorm(None, group_size=1),
        flat,
        nn.Dense(2),
    ]


def norms():
    layers = [nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(2), nn.InstanceNorm(), batch_norm()]
    body = [layer for norm in layers for layer in (nn.Dense(4), norm, nn.tanh)]
    return [*body, batch_norm(running=True), nn.Dense(2)]


def norms_reference():
    norms = [
        ref.Norm("layers_1", -1, 1e-6),
        ref.Norm("layers_4", -1, 1e-6, centred=False),
        ref.Norm("layers_7", (1, -1), 1e-6, groups=2),
        ref.Norm("layers_10", (1,), 1e-6),
        ref.Norm("layers_13", (0, 1), 1e-5),
    ]
    dense = [ref.Dense(f"layers_{i}") for i in range(0, 15, 3)]
    body = [x for d, norm in zip(dense, norms, strict=True) for x in (d, norm, ref.tanh())]
    running = ref.Norm("layers_15", (0, 1), 1e-5, statistics=(MEAN, VAR))
    return [*body, running, ref.Dense("layers_16")]


class Residual(nn.Module):
    """x + f(x)."""

    layers: list

    @nn.compact
    def __call__(self, x):
        return x + nn.Sequential(self.layers)(x)


def transformer():
    attention = Residual([nn.LayerNorm(), nn.MultiHeadDotProductAttention(2)])
    mlp = Residual([nn.LayerNorm(), nn.Dense(8), nn.relu, nn.Dense(4)])
    return [nn.Dense(4), attention, mlp, nn.LayerNorm(), nn.Dense(2)]


def transformer_reference():
    first, second = "layers_1/layers", "layers_2/layers"
    attention = ref.Norm(f"{first}_0", -1, 1e-6), ref.SelfAttention(f"{first}_1")
    hidden = ref.Dense(f"{second}_1"), ref.relu(), ref.Dense(f"{second}_3")
    mlp = ref.Norm(f"{second}_0", -1, 1e-6), *hidden
    blocks = [ref.Residual(*attention), ref.Residual(*mlp)]
    return [ref.Dense("layers_0"), *blocks, ref.Norm("layers_3", -1, 1e-6), ref.Dense("layers_4")]


def mlp():
    return [nn.Dense(6), nn.tanh, nn.Dense(5), nn.relu, nn.Dense(3)]


MLP_SHAPES = {
    "layers_0": {"kernel": (5, 6), "bias": (6,)},
    "layers_2": {"kernel": (6, 5), "bias": (5,)},
    "layers_4": {"kernel": (5, 3), "bias": (3,)},
}


def mlp_by_hand(params, x):
    first, second, last = params.values()
    x = jnp.tanh(jnp.dot(x, first["kernel"]) + first["bias"])
    x = jnp.maximum(jnp.einsum("ni,io->no", x, second["kernel"]) + second["bias"], 0)
    return jax.lax.dot(x, last["kernel"]) + last["bias"]


def mlp_reference():
    hidden = [ref.Dense("layers_0"), ref.tanh(), ref.Dense("layers_2"), ref.relu()]
    return [*hidden, ref.Dense("layers_4")]


def general():
    return [nn.DenseGeneral((2, 3)), nn.tanh, nn.DenseGeneral(4, axis=(-2, -1)), nn.Dense(2)]


def general_reference():
    inner = [ref.Dense("layers_0"), ref.tanh(), ref.Dense("layers_2", axes=2)]
    return [*inner, ref.Dense("layers_3")]


def norm_by_hand(params, x):
    x = x @ params["a"]["kernel"]
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * params["n"]["scale"]
    return x @ params["c"]["kernel"]


class OrdinaryNorm(ref.Norm):
    """A normalisation that no layer of Flax does, so that nobody knows it for one."""

    def backward(self, db, matched):
        return super().backward(db, matched=False)


NORM_SHAPES = {"a": {"kernel": (3, 4)}, "n": {"scale": (4,)}, "c": {"kernel": (4, 2)}}

CASES = {
    "mlp": flax(mlp, mlp_reference, (4, 5)),
    "mlp_by_hand": pure(MLP_SHAPES, mlp_by_hand, mlp_reference, (4, 5), "cross_entropy"),
    "general": flax(general, general_reference, (3, 4, 5)),
    "lenet": flax(lenet, lenet_reference, (4, 32, 32, 3), "cross_entropy"),
    "conv": flax(convolutions, convolutions_reference, (3, 7, 6, 3)),
    "conv_by_hand": pure(
        CONV_SHAPES, convolutions_by_hand, convolutions_reference, (3, 7, 6, 3), "cross_entropy"
    ),
    "transposed": flax(
        transposed,
        lambda: [
            ref.Conv("layers_0", padding=[(2, 1), (2, 1)], spread=(2, 2)),
            ref.Norm("layers_1", (0, 1, 2), 1e-5, statistics=(MEAN, VAR)),
            ref.tanh(),
            ref.Conv("layers_3", padding=[(0, 0), (0, 1)]),
            ref.Norm("layers_4", (1, 2), 1e-6),
            ref.Reshape(-1),
            ref.Dense("layers_6"),
        ],
        (3, 2, 3, 2),
    ),
    "norms": flax(norms, norms_reference, (3, 4, 4)),
    "norm_by_hand": pure(
        NORM_SHAPES,
        norm_by_hand,
        lambda: [ref.Dense("a"), OrdinaryNorm("n", 0, 1e-5), ref.Dense("c")],
        (5, 3),
    ),
    "transformer": flax(transformer, transformer_reference, (3, 5, 3)),
}


def problem(case, dtype=jnp.float64, seed=0):
    """(loss function, params, x, y)."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=case.x_shape), dtype)

    def values(keys, spec):
        if keys[-1] == "scale":
            return rng.choice([-1, 1], spec.shape) * rng.uniform(0.5, 1.5, spec.shape)
        return (
            rng.normal(size=spec.shape) / (np.prod(spec.shape[:-1]) if spec.ndim > 1 else 1) ** 0.5
        )

    shapes = traverse_util.flatten_dict(case.shapes())
    params = {keys: jnp.asarray(values(keys, spec), dtype) for keys, spec in shapes.items()}
    params = traverse_util.unflatten_dict(params)
    z = jax.eval_shape(case.apply, params, x)
    if case.loss == "cross_entropy":
        y = jnp.asarray(rng.integers(0, z.shape[-1], z.shape[:-1]))
    else:
        y = jnp.asarray(rng.normal(size=z.shape), dtype)

    def loss_fn(params, x, y):
        z = case.apply(params, x)
        if case.loss == "cross_entropy":
            return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
        return 0.5 * jnp.sum((z - y) ** 2) / len(z)

    return loss_fn, params, x, y


@functools.cache
def expected(name, seed=0, matched=True, damping=None):
    """The reference's (value, gradients, signals), from the same numbers rounded to float32."""
    _, params, x, y = problem(CASES[name], jnp.float32, seed)
    params = {k: np.asarray(v, np.float64) for k, v in flatten(params).items()}
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64 if y.dtype.kind == "f" else None)
    loss = getattr(ref, CASES[name].loss)
    layers = CASES[name].layers()
    return ref.differentiate(layers, params, x, y, loss, matched=matched, damping=damping)[:3]


def arrays(name, dtype, seed=0):
    """`problem` with the numbers that the reference has."""
    loss_fn, *inputs = problem(CASES[name], jnp.float32, seed)

    def convert(a):
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return loss_fn, *jax.tree.map(convert, inputs)
