"""Damped inverses: factorised together where shapes are equal, repaired where that fails."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cqjax.linalg import devices, triangular

REPAIR_DAMPING = 1e-2
"""Damping of the second attempt, relative to the mean eigenvalue."""


class System(NamedTuple):
    """c (A + λI)⁻¹, for A symmetric and positive semi-definite.

    Attributes:
      matrix: A, (B, m, m).
      damping: λ, (B,) or ().
      rank: how many of A's eigenvalues may differ from zero.
      gain: c, ().
      solvable: (B,) or () bool, whether the inverse with this λ is of use; else λ is raised at
        once.
    """

    matrix: jax.Array
    damping: jax.Array | float
    rank: jax.Array | int
    gain: jax.Array | float = 1.0
    solvable: jax.Array | bool = True


class Inverse(NamedTuple):
    """What came of a system.

    Attributes:
      value: c (A + λI)⁻¹, (B, m, m).
      damping: the λ of this inverse, (B,).
      repaired: (B,) bool, whether the first attempt failed.
      failed: (B,) bool, whether the second did too; the value is I then, or 0, which is its limit,
        where A has overflowed.
    """

    value: jax.Array
    damping: jax.Array
    repaired: jax.Array
    failed: jax.Array


def mean_eigenvalue(diagonal: jax.Array, rank: jax.Array | int) -> jax.Array:
    """Mean of those eigenvalues of XXᵀ or XᵀX that may differ from zero: the two share them.

    So a damping relative to it is the same in both. Their number is that of X's rows or features,
    whichever is less. Of diagonals (B, m), whose sums may overflow where the means do not: (B,).
    """
    rank = jnp.broadcast_to(jnp.asarray(rank, diagonal.dtype), diagonal.shape[:1])
    return (diagonal / rank[:, None]).sum(-1)


def inverses(systems: Sequence[System], spread_over: NamedSharding | None = None) -> list[Inverse]:
    """Inverts the systems by Cholesky factorisation, matrices of the same shape as one batch.

    One whose inverse is not finite is tried again with its damping raised by `REPAIR_DAMPING` times
    its mean eigenvalue. So is one that is singular to working precision: where for some i
    A_ii (A⁻¹)_ii exceeds 1/ε. That is how many times the diagonal entry is what the other rows and
    columns leave of it (in statistics, the variance inflation factor); whether the factorisation
    then failed, or made something huge of rounding errors, would be chance. The second attempt
    costs nothing unless it is needed (under `vmap`, where a condition becomes a selection, it
    always runs).

    Args:
      systems: the systems.
      spread_over: a sharding whose axes name the devices that share the matrices of a batch out
        among them, and then all get all inverses; None where each inverts all.
    """
    function = _inverse
    if spread_over is not None:
        function = functools.partial(_spread, spread_over)
    return [Inverse(*parts) for parts in _together(function, list(map(_each_own, systems)))]


def all_finite(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """For each of these arrays, (B, o), which of its rows are finite: (B,) bool."""
    found = _together(lambda x: (jnp.isfinite(x).all(-1),), [(row,) for row in rows])
    return [finite for (finite,) in found]


def _together(
    function: Callable[..., Sequence[jax.Array]], arguments: Sequence[Sequence[jax.Array]]
) -> list[list[jax.Array]]:
    """A function's results for each of these arrays, (B, ...): equal shapes in one call."""
    groups: dict[object, list[int]] = {}
    for i, (first, *_) in enumerate(arguments):
        key = first.shape[1:], first.dtype, devices.varying(first)
        groups.setdefault(key, []).append(i)
    results: dict[int, list[jax.Array]] = {}
    for members in groups.values():
        stacks = map(jnp.concatenate, zip(*(arguments[i] for i in members), strict=True))
        ends = np.cumsum([len(arguments[i][0]) for i in members])[:-1]
        parts = zip(*(jnp.split(result, ends) for result in function(*stacks)), strict=True)
        results |= dict(zip(members, map(list, parts), strict=True))
    return [results[i] for i in range(len(arguments))]


def _each_own(system: System) -> tuple[jax.Array, ...]:
    """The system with numbers (B,), one for each of its matrices."""
    matrix = system.matrix

    def own(value: jax.Array | float, dtype: jnp.dtype) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(value).astype(dtype), matrix.shape[:1])

    numbers = (own(value, matrix.dtype) for value in system[1:-1])
    parts = matrix, *numbers, own(system.solvable, jnp.dtype(bool))
    return devices.vary(parts, devices.varying(parts))


def _spread(sharding: NamedSharding, *stack: jax.Array) -> Inverse:
    """`_inverse`, with the matrices of the stack shared out among the sharding's devices."""
    axes = devices.axes_of(sharding)
    if len(stack[0]) == 1 or devices.varying(stack) & set(axes):
        return _inverse(*stack)

    def share(*stack: jax.Array) -> Inverse:
        number = len(stack[0])
        each = -(-number // devices.number(axes))
        mine = (lax.axis_index(axes) * each + jnp.arange(each)) % number
        found = _inverse(*(part[mine] for part in stack))
        return jax.tree.map(lambda a: a[:number], devices.gathered(found, axes, 0))

    if set(axes) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        return share(*stack)
    every = PartitionSpec()
    return jax.shard_map(share, mesh=sharding.mesh, in_specs=every, out_specs=every)(*stack)


@functools.partial(jax.jit, inline=True)
def _inverse(
    matrix: jax.Array, damping: jax.Array, rank: jax.Array, gain: jax.Array, solvable: jax.Array
) -> Inverse:
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    more = REPAIR_DAMPING * mean_eigenvalue(diagonal, rank)
    one = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]
    limit = jnp.where(diagonal.max(-1) == jnp.inf, 0, one[0, 0, 0])

    def attempt(last: Inverse, number: jax.Array) -> Inverse:
        raised = damping + jnp.where(number > 0, more, 0)
        value = triangular.inverse(matrix + _wide(raised) * one)
        inflation = (diagonal + raised[:, None]) * jnp.diagonal(value, axis1=1, axis2=2)
        value = _wide(gain) * value
        good = (inflation * jnp.finfo(matrix.dtype).eps <= 1).all(-1)
        good &= jnp.isfinite(value).all((1, 2)) & (solvable | (number > 0))
        value = jnp.where(_wide(good), value, _wide(limit) * one)
        repaired = jnp.broadcast_to(number > 0, good.shape)
        return Inverse(
            jnp.where(_wide(last.failed), value, last.value),
            jnp.where(last.failed, raised, last.damping),
            jnp.where(last.failed, repaired, last.repaired),
            last.failed & ~good,
        )

    def trip(last: Inverse, number: jax.Array) -> tuple[Inverse, None]:
        return lax.cond(last.failed.any(), attempt, lambda last, _: last, last, number), None

    never, always = jnp.zeros(len(matrix), bool), jnp.ones(len(matrix), bool)
    none_yet = Inverse(jnp.zeros_like(matrix), damping, never, always)
    none_yet = devices.vary(none_yet, devices.varying(matrix))
    return lax.scan(trip, none_yet, jnp.arange(2))[0]


def _wide(numbers: jax.Array) -> jax.Array:
    return numbers[:, None, None]


def solve(inverse: jax.Array, right: jax.Array) -> jax.Array:
    """Applies inverses, (B, m, m), to right-hand sides, (B, m, o).

    What is not finite in a column of a right-hand side leaves no entry of the result's finite: any
    row of it shows that.
    """
    return jnp.einsum("bij,bjo->bio", inverse, right, precision=lax.Precision.HIGHEST)
