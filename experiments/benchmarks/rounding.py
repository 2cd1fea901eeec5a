"""Products of float32 as accelerators take them, emulated where `precision` says nothing: on a CPU.

There the operands are rounded to a shorter format; products and sums are in float32. For this,
cqjax's functions that take the products are replaced, while a program is traced, by ones that round
first: there is no argument that would do it on a CPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from cqjax.linalg import conv_gram, gram, ridge, triangular
from cqjax.transforms import solves

FLOAT32, PATCHES = "float32", "float32, by patches"
FRACTION = {"bf16 ×3": 7, "TF32": 10, "bf16": 7}
"""Bits of the formats' fractions (their exponents have 8). In "bf16 ×3", a TPU's "high", an operand
is the sum of two such numbers, and the product of the smaller ones is left out."""

_GRAM = ((gram, "outer", (0,)), (gram, "inner", (0,)), (conv_gram, "_correlation", (0, 1)))
_WITH_X = (*_GRAM, (solves, "product", (0, 1)))
_ALL = (*_WITH_X, (ridge, "solve", (0, 1)), (triangular, "_product", (0, 1)))
SCOPES = {"a": _GRAM, "b": _WITH_X, "c": _ALL}
"""Which functions round which of their arguments: (a) the Gram matrices', (b) also those of Xᵀ and
the solution (together, what cqjax's argument `precision` is for), (c) also the solves'. Of
convolutions only those along one or two axes are meant."""


def settings(scopes: str, exact: Sequence[str] = (FLOAT32,)) -> list[tuple[str, str]]:
    """What `emulated` is to be called with: first without rounding, then each format and scope."""
    return [(name, "a") for name in exact] + [(name, s) for name in FRACTION for s in scopes]


@contextmanager
def emulated(name: str, scope: str) -> Iterator[None]:
    """Within, cqjax is traced with the products of a scope as of a format.

    Or, for `PATCHES`, with every convolution's Gram matrix by way of its patches. A function that
    is jitted must be so anew. The solves are by cqjax itself; if they change, JAX's caches are
    emptied.
    """
    with ExitStack() as stack:
        if scope == "c":
            jax.clear_caches()
            stack.callback(jax.clear_caches)
        if name == PATCHES:
            dear = mock.patch.object(conv_gram, "correlation_cost", lambda *_, **__: math.inf)
            stack.enter_context(dear)
        for module, function, operands in SCOPES[scope] if name in FRACTION else ():
            replaced = _rounding(getattr(module, function), operands, name)
            stack.enter_context(mock.patch.object(module, function, replaced))
        yield


def _rounding(
    function: Callable[..., Any], operands: tuple[int, ...], name: str
) -> Callable[..., Any]:
    """A bilinear function, up to terms of its other arrays, of rounded operands."""

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, 8, FRACTION[name])

    def rest(x: jax.Array) -> jax.Array:
        return rounded(x - rounded(x))

    def call(*args: Any, **options: Any) -> Any:
        def of(operand: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
            values = ((operand if i in operands else other)(arg) for i, arg in enumerate(args))
            return function(*values, **options)

        if not name.endswith("×3"):
            return of(rounded, _same)
        whole, left_out = of(lambda x: rounded(x) + rest(x), _same), of(rest, _zero)
        return jax.tree.map(jnp.subtract, whole, left_out)

    return call


def _same(arg: Any) -> Any:
    return arg


def _zero(arg: Any) -> Any:
    return jnp.zeros_like(arg) if isinstance(arg, jax.Array) else arg
