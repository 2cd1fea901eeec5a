"""A network with products of all kinds, trained on one device and on many."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from across_batches import quickly
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cqjax


def make_mesh(**axes):
    """A mesh with automatic axes of these sizes."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


MESH = make_mesh(data=8)
EVERYWHERE, SPLIT = NamedSharding(MESH, P()), NamedSharding(MESH, P("data"))


def problem(examples=32):
    """(params, batch) of the network."""
    rng = np.random.default_rng(0)
    shapes = {
        "kernel": (2, 2, 2, 4),
        "kernel_bias": (4,),
        "dense": {"w": (36, 6), "b": (6,)},
        "table": (5, 6),
        "stack": {"w": (3, 6, 6), "b": (3, 6)},
        "halves": (6, 12),
        "last": (6, 2),
    }
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 2), shapes, is_leaf=is_shape
    )
    x, y = rng.normal(size=(examples, 4, 4, 2)), rng.normal(size=(examples, 2))
    return params, jax.tree.map(jnp.asarray, (x, np.arange(examples) % 5, y))


def loss_fn(params, x, token, y):
    """A convolution, a lookup, scanned and repeated layers, a branch; half the squared error."""
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, params["kernel"], (1, 1), "VALID", dimension_numbers=numbers)
    h = jnp.tanh(h + params["kernel_bias"]).reshape(len(x), -1)
    h = jnp.tanh(h @ params["dense"]["w"] + params["dense"]["b"] + params["table"][token])

    @jax.checkpoint
    def layer(h, own):
        return jnp.tanh(h @ own["w"] + own["b"]), None

    h, _ = lax.scan(layer, h, params["stack"])
    left, right = jnp.split(params["halves"], 2, 1)
    h = lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ left), h)
    always = jnp.sum(params["last"] ** 2) >= 0
    h = lax.cond(always, lambda h: h @ right, lambda h: h, h)
    return 0.5 * jnp.mean(jnp.sum((h @ params["last"] - y) ** 2, -1))


def mean_loss(*args):
    """The mean over the devices along "data"."""
    return lax.pmean(loss_fn(*args), "data")


def step(loss, tx, params, state, *batch, **options):
    """One step: the new parameters, the new state, and the loss."""
    value, grads, captures = cqjax.value_and_grad(loss, **options)(params, *batch)
    updates, state = tx.update(grads, state, params, captures=captures)
    return optax.apply_updates(params, updates), state, value


def mapped(function, batch=3, mesh=MESH):
    """Within `jax.shard_map`: the parameters and state on all devices, the batch split."""
    specs = (P(), P(), *[P("data")] * batch)
    return quickly(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P()))


def trained(step, tx, params, batch, steps=4):
    """Parameters, state and loss after some steps."""
    state, value = tx.init(params), None
    for _ in range(steps):
        params, state, value = step(params, state, *batch)
    return params, state, value


def steps_of(loss, tx, **options):
    """The step as a function of parameters, state and batch."""
    return functools.partial(step, loss, tx, **options)


def collectives(program, kind):
    """Shapes of the results of a compiled program's collectives of a kind, each as a tuple."""
    found = re.findall(rf"= (\S.*?) {kind}(?:-start)?\(", program.as_text())
    shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(found))
    return [tuple(int(n) for n in shape.split(",") if n) for shape in shapes]


def assert_close(got, want, tolerance=1e-8):
    """Each leaf within `tolerance` of the largest entry of what it should be."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(np.abs(b).max(initial=0), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)
