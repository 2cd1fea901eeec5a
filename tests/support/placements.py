"""Cases of training on a mesh: which mesh, what is split along it, which network and optimizer."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cqjax

E, A = AxisType.Explicit, AxisType.Auto
MESHES = {
    "explicit": ((8,), ("data",), (E,)),
    "explicit 4 × 2": ((4, 2), ("data", "model"), (E, E)),
    "explicit 4 × automatic 2": ((4, 2), ("data", "model"), (E, A)),
    "automatic": ((8,), ("data",), (A,)),
    "automatic 4 × 2": ((4, 2), ("data", "model"), (A, A)),
}
ROWS, COLUMNS, BATCH = P("model"), P(None, "model"), P("data")


class Network(NamedTuple):
    """A network whose loss is written for any mesh.

    Attributes:
      loss: the loss, of `at`, parameters and batch; `at(...)` is an output's sharding, or None.
      params: shapes of the parameters.
      batch: shapes of the batch's arrays; an integer for token numbers below it.
    """

    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]


class Case(NamedTuple):
    """One row of the table in docs/devices.md."""

    mesh: str
    network: str
    split: str
    optimizer: str = "C-Adam"
    params: Any = P()
    batch: Any = BATCH
    within: bool = True  # jax.set_mesh


def error(z, y):
    return jnp.mean(jnp.sum((z - y) ** 2, -1))


def dense(at, p, x, y):
    hidden = jnp.tanh(x @ p["w1"] + p["b1"])
    return error(jnp.dot(hidden, p["w2"], out_sharding=at("data")) + p["b2"], y)


def gathered(at, p, x, y):
    place = (lambda a: a) if at() is None else (lambda a: jax.sharding.reshard(a, at()))
    return dense(at, jax.tree.map(place, p), x, y)


def convolution(at, p, x, y):
    numbers = ("NHWC", "HWIO", "NHWC")
    z = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    return error(jnp.tanh(z + p["bias"]).mean((1, 2)) @ p["w"], y)


def lookup(at, p, tokens, y):
    rows = p["table"].at[tokens].get(out_sharding=at("data"))
    return error(jnp.tanh(rows) @ p["w"], y)


def attention(at, p, x, y):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), -1)
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
    return error(jnp.einsum("bthk,hkd->btd", mixed, p["o"], out_sharding=at("data")), y)


def scanned(at, p, x, y):
    layer = jax.checkpoint(lambda h, own: (jnp.tanh(h @ own["w"] + own["b"]), None))
    return error(lax.scan(layer, x, p)[0], y)


def scanned_pairs(at, p, x, y):
    def layer(h, own):
        hidden = jnp.tanh(h @ own["up"])
        return h + jnp.dot(hidden, own["down"], out_sharding=at("data")), None

    return error(lax.scan(layer, x, p)[0], y)


def microbatches(at, p, x, y):
    def add(total, batch):
        z = jnp.tanh(batch[0] @ p["w"] + p["b"]) @ p["v"]
        return total + jnp.sum((z - batch[1]) ** 2), None

    return lax.scan(add, jnp.zeros(()), (x, y))[0] / (x.shape[0] * x.shape[1])


def masked(at, p, x, y, counts):
    errors = jnp.sum((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2, -1)
    return jnp.sum(errors * (counts > 2)) / jnp.sum(counts > 2)


def ensemble(at, p, x, y):
    return jnp.sum(jax.vmap(lambda own: error(jnp.tanh(x @ own["w"]) @ own["v"], y))(p))


def tied(at, p, x, y):
    hidden = jnp.tanh(x @ p["w"] + p["b"])
    return error(jnp.dot(hidden, p["w"].T, out_sharding=at("data")) + p["c"], y)


def slopes(at, p, x, y):
    def network(x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]))

    return error(jax.grad(network)(x), y)


def automatic_part(at, p, x, y):
    def part(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    part = part if at() is None else jax.sharding.auto_axes(part, out_sharding=at("data"))
    return error(part(p, x) @ p["v"], y)


MLP = {"w1": (6, 8), "b1": (8,), "w2": (8, 4), "b2": (4,)}
NETWORKS = {
    "MLP": Network(dense, MLP, ((32, 6), (32, 4))),
    "MLP, wide": Network(
        dense, {"w1": (48, 64), "b1": (64,), "w2": (64, 4), "b2": (4,)}, ((16, 48), (16, 4))
    ),
    "MLP, weights gathered by `jax.sharding.reshard`": Network(
        gathered, {"w1": (8, 8), "b1": (8,), "w2": (8, 8), "b2": (8,)}, ((32, 8), (32, 8))
    ),
    "convolution": Network(
        convolution, {"kernel": (3, 3, 2, 4), "bias": (4,), "w": (4, 3)}, ((16, 5, 5, 2), (16, 3))
    ),
    "lookup with `out_sharding`": Network(lookup, {"table": (10, 6), "w": (6, 3)}, (7, (32, 3))),
    "attention": Network(
        attention,
        {"q": (6, 2, 3), "k": (6, 2, 3), "v": (6, 2, 3), "o": (2, 3, 6)},
        ((8, 5, 6), (8, 5, 6)),
    ),
    "scanned layers, `jax.checkpoint`": Network(
        scanned, {"w": (3, 6, 6), "b": (3, 6)}, ((32, 6), (32, 6))
    ),
    "scanned residual pairs": Network(
        scanned_pairs, {"up": (3, 6, 8), "down": (3, 8, 6)}, ((32, 6), (32, 6))
    ),
    "microbatches in a scan": Network(
        microbatches, {"w": (4, 6), "b": (6,), "v": (6, 3)}, ((2, 16, 4), (2, 16, 3))
    ),
    "padded and masked": Network(masked, {"w": (6, 8), "v": (8, 3)}, ((32, 6), (32, 3), 7)),
    "tied weights": Network(tied, {"w": (6, 10), "b": (10,), "c": (6,)}, ((32, 6), (32, 6))),
    "gradients in the loss": Network(
        slopes, {"w": (6, 10), "b": (10,), "v": (10, 9)}, ((32, 6), (32, 6))
    ),
    "ensemble by `jax.vmap`": Network(
        ensemble, {"w": (8, 4, 6), "v": (8, 6, 3)}, ((32, 4), (32, 3))
    ),
    "`jax.sharding.auto_axes` in the loss": Network(
        automatic_part, {"w": (4, 6), "b": (6,), "v": (6, 3)}, ((32, 4), (32, 3))
    ),
}
TENSOR = {"w1": COLUMNS, "b1": ROWS, "w2": ROWS, "b2": P()}
HEADS = {"q": COLUMNS, "k": COLUMNS, "v": COLUMNS, "o": ROWS}
PAIRS = {"up": P(None, None, "model"), "down": COLUMNS}


def optimizers(plan, half):
    """Optimizers by name, and options of `value_and_grad` for each."""
    c = cqjax.scale_by_consequentialism
    down = optax.scale(-0.1)
    return {
        "C-SGD": (cqjax.csgd(0.3), {}),
        "C-Adam": (cqjax.cadam(0.03), {}),
        "C-Nesterov": (cqjax.cnesterov(0.05), {}),
        "C-SGD, dual": (cqjax.csgd(0.3), {"solver": "dual"}),
        "C-SGD, primal": (cqjax.csgd(0.3), {"solver": "primal"}),
        "`clip_by_global_norm`, C-SGD": (
            optax.chain(optax.clip_by_global_norm(0.1), cqjax.csgd(0.3)),
            {},
        ),
        "`update_every`, `ema_decay`": (
            optax.chain(c(plan=plan, update_every=2, ema_decay=0.9), down),
            {},
        ),
        "conjugate gradients": (optax.chain(c(), cqjax.scale_by_conjugate_gradient(), down), {}),
        "NLMS": (cqjax.nlms(0.05), {"capture": cqjax.Rows}),
        "back-matching": (cqjax.back_matching_sgd(0.01), {}),
        "back-matching, exact signal": (cqjax.csgd(0.1), {"signal": "matched"}),
        "LSALR": (cqjax.lsalr(0.01), {}),
        "`multi_steps`": (cqjax.multi_steps(cqjax.csgd(0.3), 2, plan=half), {}),
    }


CASES = [
    Case("explicit", "MLP", "batch"),
    Case("explicit", "MLP", "batch", within=False),
    Case("explicit", "MLP, wide", "batch", "C-SGD, dual"),
    Case("explicit", "MLP, wide", "batch", "`clip_by_global_norm`, C-SGD"),
    Case("explicit", "MLP, weights gathered by `jax.sharding.reshard`", "FSDP", params=BATCH),
    Case("explicit", "convolution", "batch"),
    Case("explicit", "convolution", "batch", "back-matching"),
    Case("explicit", "convolution", "batch", "back-matching, exact signal"),
    Case("explicit", "lookup with `out_sharding`", "batch"),
    Case("explicit", "lookup with `out_sharding`", "batch", within=False),
    Case("explicit", "attention", "batch"),
    Case("explicit", "scanned layers, `jax.checkpoint`", "batch"),
    Case("explicit", "scanned layers, `jax.checkpoint`", "batch", "C-SGD, dual"),
    Case("explicit", "microbatches in a scan", "batch", batch=P(None, "data")),
    Case("explicit", "padded and masked", "batch"),
    Case("explicit", "padded and masked", "batch", "C-SGD, dual"),
    Case("explicit", "tied weights", "batch"),
    Case("explicit", "gradients in the loss", "batch"),
    Case("explicit", "ensemble by `jax.vmap`", "members", params=BATCH, batch=P()),
    Case("explicit", "`jax.sharding.auto_axes` in the loss", "batch"),
    Case("explicit", "`jax.sharding.auto_axes` in the loss", "batch", within=False),
    *(
        Case("explicit 4 × 2", "MLP", "batch, weights by outputs and features", tx, TENSOR)
        for tx in (
            "C-SGD",
            "C-Adam",
            "C-Nesterov",
            "C-SGD, dual",
            "C-SGD, primal",
            "`update_every`, `ema_decay`",
            "conjugate gradients",
            "NLMS",
            "back-matching",
            "back-matching, exact signal",
            "LSALR",
            "`multi_steps`",
        )
    ),
    Case("explicit 4 × 2", "attention", "batch, heads", params=HEADS),
    Case("explicit 4 × 2", "attention", "batch, heads", params=HEADS, within=False),
    Case("explicit 4 × 2", "scanned residual pairs", "batch, weights", params=PAIRS),
    Case("explicit 4 × 2", "scanned residual pairs", "batch, weights", "C-SGD, dual", PAIRS),
    Case(
        "explicit 4 × 2",
        "tied weights",
        "batch, weights by outputs",
        params={"w": COLUMNS, "b": ROWS, "c": P()},
    ),
    Case("explicit 4 × automatic 2", "MLP", "batch"),
    Case("explicit 4 × automatic 2", "attention", "batch"),
    Case(
        "automatic",
        "MLP",
        "batch, weights by features",
        params={**TENSOR, "w1": P(), "b1": P(), "w2": BATCH},
    ),
    Case("automatic", "convolution", "batch"),
    Case("automatic", "gradients in the loss", "batch"),
    Case("automatic", "padded and masked", "batch"),
    Case("automatic 4 × 2", "MLP", "batch, weights by outputs and features", params=TENSOR),
    Case("automatic 4 × 2", "attention", "batch, heads", params=HEADS),
]


@functools.cache
def problem(name):
    """The network's parameters and batch, as arrays."""
    rng = np.random.default_rng(0)
    network = NETWORKS[name]

    def array(shape):
        if isinstance(shape, int):
            return jnp.arange(32) % shape
        return jnp.asarray(rng.normal(size=shape) / 2)

    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    params = jax.tree.map(array, network.params, is_leaf=is_shape)
    return params, tuple(map(array, network.batch))


def trained(name, optimizer, at, params, batch, steps=2):
    """Parameters and loss after some steps."""
    loss = functools.partial(NETWORKS[name].loss, at)
    alone = functools.partial(NETWORKS[name].loss, lambda *_: None)
    plan = cqjax.plan(alone)(*[problem(name)[0]], *problem(name)[1])
    tx, options = optimizers(plan, plan)[optimizer]

    @jax.jit
    def step(params, state, *batch):
        value, grads, captures = cqjax.value_and_grad(loss, **options)(params, *batch)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state, *batch)
    return params, value


@functools.cache
def on_one_device(name, optimizer):
    """What training on one device gives."""
    params, batch = problem(name)
    return trained(name, optimizer, lambda *_: None, params, batch)


def on_mesh(case):
    """Training on the case's mesh: its result, and the parameters that it started from."""
    sizes, names, kinds = MESHES[case.mesh]
    mesh = jax.make_mesh(sizes, names, axis_types=kinds)

    def at(*spec):
        return NamedSharding(mesh, P(*spec)) if E in kinds else None

    def placed(tree, specs):
        is_spec = lambda node: isinstance(node, P)  # noqa: E731
        return jax.tree.map(
            lambda spec, part: jax.device_put(part, NamedSharding(mesh, spec)),
            specs,
            tree,
            is_leaf=is_spec,
        )

    params, batch = problem(case.network)
    with jax.set_mesh(mesh) if case.within else contextlib.nullcontext():
        params = placed(params, case.params)
        return trained(case.network, case.optimizer, at, params, placed(batch, case.batch)), params


def table():
    """The cases as a table."""
    rows = ["| mesh | network | what is split | optimizer | `jax.set_mesh` |", "| --- " * 5 + "|"]
    for case in CASES:
        within = "yes" if case.within else "no"
        cells = (case.mesh, case.network, case.split, case.optimizer, within)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
