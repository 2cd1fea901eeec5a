"""The zoo: small models in many styles, each with an independent NumPy reference.

`CASES` lists them all; `by_name` finds one, `made` is what it makes. See `Case` for what a case
holds, and `numpy_inputs`, `reference_captures` and `site_gradients` for its captures in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import zoo_attention
import zoo_conv
import zoo_dense
import zoo_lifted
import zoo_norm
import zoo_plain
import zoo_recurrent
from zoo_base import (
    Case,
    flatten,
    numpy_inputs,
    numpy_tree,
    path_of,
    reference_captures,
    site_gradients,
)

__all__ = [
    "CASES",
    "Case",
    "by_name",
    "flatten",
    "made",
    "numpy_inputs",
    "numpy_tree",
    "path_of",
    "reference_captures",
    "site_gradients",
]

CASES = [
    *zoo_dense.CASES,
    *zoo_conv.CASES,
    *zoo_plain.CASES,
    *zoo_attention.CASES,
    *zoo_norm.CASES,
    *zoo_lifted.CASES,
    *zoo_recurrent.CASES,
]

_BY_NAME = {case.name: case for case in CASES}


def by_name(name):
    """The case of this name."""
    return _BY_NAME[name]


@functools.cache
def made(name, dtype=jnp.float32):
    """What the case of this name makes, once."""
    with jax.enable_x64(dtype == jnp.float64):
        return by_name(name).make(dtype)
