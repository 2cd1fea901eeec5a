"""Zoo: normalisation, dropout, and normalised weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import references as ref
from zoo_base import (
    Case,
    biases,
    fill,
    flax_regression,
    kernels,
    normal,
    squared_reference,
)

BATCH = 5


def _data(dtype, outputs=2):
    rng = np.random.default_rng(0)
    return rng, normal(rng, (BATCH, 3), dtype), normal(rng, (BATCH, outputs), dtype)


# Batch normalisation: args are (batch_stats, x, y), aux the new batch_stats.


class Normalised(nn.Module):
    """Dense without bias, batch normalisation in training mode, tanh, Dense."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4, use_bias=False, name="first")(x)
        h = nn.BatchNorm(use_running_average=False, name="norm")(h)
        return nn.Dense(2, name="last")(nn.tanh(h))


def _normalised_loss(params, batch_stats, x, y):
    variables = {**params, "batch_stats": batch_stats}
    out, state = Normalised().apply(variables, x, mutable=["batch_stats"])
    return jnp.sum((out - y) ** 2) / len(y), state["batch_stats"]


def _make_normalised(dtype=jnp.float32):
    rng, x, y = _data(dtype)
    variables = fill(jax.eval_shape(Normalised().init, jax.random.key(0), x), rng, dtype)
    params = {"params": variables["params"]}
    return _normalised_loss, params, (variables["batch_stats"], x, y)


def _normalised_reference(params, args, linear):
    _, x, y = args
    p = params["params"]
    h = ref.batch_norm(ref.dense(linear, "params/first", x, p["first"]), p["norm"])
    return ref.squared_error(ref.dense(linear, "params/last", np.tanh(h), p["last"]), y)


# Dropout: args are (key, x, y); the reference gets the mask in place of the key.

RATE = 0.4


class Dropped(nn.Module):
    """Dense, tanh, dropout, Dense."""

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(6, name="first")(x))
        h = nn.Dropout(RATE, deterministic=False, name="dropout")(h)
        return nn.Dense(2, name="last")(h)


def _dropped_loss(params, key, x, y):
    out = Dropped().apply(params, x, rngs={"dropout": key})
    return jnp.sum((out - y) ** 2) / len(y)


def _make_dropped(dtype=jnp.float32):
    rng, x, y = _data(dtype)
    key = jax.random.key(3)
    shapes = jax.eval_shape(Dropped().init, {"params": key, "dropout": key}, x)
    return _dropped_loss, fill(shapes, rng, dtype), (key, x, y)


def _mask_for_key(params, args):
    """Reads the mask off the model's own dropout, whose inputs (tanh) are not zero."""
    key, x, y = args
    _, state = Dropped().apply(
        params,
        x,
        rngs={"dropout": key},
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
    )
    kept = state["intermediates"]["dropout"]["__call__"][0] != 0
    return kept / (1.0 - RATE), x, y


def _dropped_reference(params, args, linear):
    mask, x, y = args
    p = params["params"]
    h = np.tanh(ref.dense(linear, "params/first", x, p["first"])) * mask
    return ref.squared_error(ref.dense(linear, "params/last", h, p["last"]), y)


# Weight normalisation.


class WeightNormed(nn.Module):
    """Dense, tanh, Dense whose kernel is normalised before it is used."""

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(4, name="first")(x))
        return nn.WeightNorm(nn.Dense(2, name="normed"), name="norm")(h)


def _weight_normed(params, x, linear):
    p = params["params"]
    h = np.tanh(ref.dense(linear, "params/first", x, p["first"]))
    v = p["normed"]["kernel"]
    w = v / np.sqrt(np.sum(v**2, axis=0) + 1e-12) * p["norm"]["normed/kernel/scale"]
    return h @ w + p["normed"]["bias"]


CASES = [
    Case(
        name="batch_norm",
        make=_make_normalised,
        reference=_normalised_reference,
        covered=kernels("first last"),
        biases=biases("last"),
        uncovered={
            "params/norm/scale": "BatchNorm scale enters elementwise",
            "params/norm/bias": "BatchNorm bias is added to no site's output",
        },
        has_aux=True,
        kwargs={"batch_size": BATCH},
    ),
    Case(
        name="dropout",
        make=_make_dropped,
        reference=_dropped_reference,
        covered=kernels("first last"),
        biases=biases("first last"),
        kwargs={"batch_size": BATCH},
        to_numpy=_mask_for_key,
    ),
    Case(
        name="weight_norm",
        make=flax_regression(WeightNormed(), (BATCH, 3)),
        reference=squared_reference(_weight_normed),
        covered=kernels("first"),
        biases=biases("first"),
        uncovered={
            "params/normed/kernel": "normalised and rescaled before its site",
            "params/normed/bias": "its site's weight is uncovered",
            "params/norm/normed/kernel/scale": "multiplies a kernel elementwise",
        },
    ),
]
