"""Damped inverses: matrices of one shape are inverted together, failed inverses are repaired."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cqjax.linalg import devices, triangular
from cqjax.linalg.products import einsum

REPAIR_DAMPING = 1e-2
"""What the second attempt adds to the damping, relative to the mean eigenvalue."""

SINGULAR = 1 / 8
"""The bound on ε Σ M_ii (M⁻¹)_ii beyond which a matrix M is singular to working precision.

Measured in float32: of 128 equal rows in 128 features, updates had errors of 12 to 55 % at .18, and
were ten times too long at 1.8. Repaired, their error is .4 %. Rows with a common mean had 6 % at
.38, and have 11 % repaired. Random square matrices without damping are at .03 to .05, with errors
below 2 %."""


class System(NamedTuple):
    """B matrices to be inverted: c (A + λI)⁻¹, with A symmetric and positive semi-definite.

    Attributes:
      matrix: A, (B, m, m).
      damping: λ, (B,) or ().
      rank: the number of A's eigenvalues that may differ from zero.
      gain: c, ().
      solvable: (B,) or () bool, whether to attempt the inverse with this λ. Where it is false, the
        first attempt counts as failed, and only the second, with a larger λ, is used.
    """

    matrix: jax.Array
    damping: jax.Array | float
    rank: jax.Array | int
    gain: jax.Array | float = 1.0
    solvable: jax.Array | bool = True


class Inverse(NamedTuple):
    """The inverses of a `System`.

    Attributes:
      value: c (A + λI)⁻¹, (B, m, m). Where both attempts failed, it is the identity instead; or
        zero, where A is not finite.
      damping: (B,), the λ of the last attempt.
      repaired: (B,) bool, whether the first attempt failed.
      failed: (B,) bool, whether both attempts failed.
    """

    value: jax.Array
    damping: jax.Array
    repaired: jax.Array
    failed: jax.Array


def mean_eigenvalue(diagonal: jax.Array, rank: jax.Array | int) -> jax.Array:
    """The mean of those eigenvalues of XXᵀ or XᵀX that may differ from zero.

    The two matrices share these eigenvalues. So a damping relative to their mean is the same in the
    dual solution, which inverts XXᵀ, as in the primal, which inverts XᵀX.

    Args:
      diagonal: the diagonals of B matrices, (B, m). Their sum is the sum of the eigenvalues.
      rank: the number of eigenvalues in the mean, (B,) or (): X's rows or features, whichever is
        less.

    Returns:
      The means, (B,).
    """
    rank = jnp.broadcast_to(jnp.asarray(rank, diagonal.dtype), diagonal.shape[:1])
    # Divided before they are summed: the sum may overflow where the mean does not.
    return (diagonal / rank[:, None]).sum(-1)


def inverses(systems: Sequence[System], spread_over: NamedSharding | None = None) -> list[Inverse]:
    """Inverts systems by Cholesky factorisation. Matrices of the same shape form one batch.

    An inverse fails where it is not finite, or where its matrix M = A + λI is singular to working
    precision: where ε Σ M_ii (M⁻¹)_ii exceeds `SINGULAR`. Of equal rows, this is so where λ is less
    than 8 ε times the trace of A. Such a matrix is inverted again, with λ raised by
    `REPAIR_DAMPING` times the mean eigenvalue of A. This second attempt costs nothing unless it is
    needed. (Under `jax.vmap` it always runs, since a condition becomes a selection.)

    Args:
      systems: the systems.
      spread_over: a sharding whose mesh axes name devices. They divide the matrices of a batch
        among themselves, and then exchange the inverses. None if each device inverts all matrices.

    Returns:
      The inverses of each system.
    """
    function = _inverse
    if spread_over is not None:
        function = functools.partial(_inverse_shared_out, spread_over)
    arguments = list(map(_with_own_numbers, systems))
    return [Inverse(*parts) for parts in batched_by_shape(function, arguments)]


def all_finite(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """For each of these arrays, (B, o), whether each of its rows is finite: (B,) bool."""
    found = batched_by_shape(lambda x: (jnp.isfinite(x).all(-1),), [(row,) for row in rows])
    return [finite for (finite,) in found]


def batched_by_shape(
    function: Callable[..., Sequence[jax.Array]], arguments: Sequence[Sequence[jax.Array]]
) -> list[list[jax.Array]]:
    """Calls a function of arrays (B, ...) once for all argument lists of the same shapes.

    Each call is compiled anew, so fewer calls compile faster.

    Returns:
      For each list of arguments its own results.
    """
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


def _with_own_numbers(system: System) -> tuple[jax.Array, ...]:
    """The fields of the system, all of them with a number for each of its matrices, (B,)."""
    matrix = system.matrix

    def repeated(value: jax.Array | float, dtype: jnp.dtype) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(value).astype(dtype), matrix.shape[:1])

    numbers = (repeated(value, matrix.dtype) for value in system[1:-1])
    parts = matrix, *numbers, repeated(system.solvable, jnp.dtype(bool))
    return devices.vary(parts, devices.varying(parts))


def _inverse_shared_out(sharding: NamedSharding, *stack: jax.Array) -> Inverse:
    """`_inverse`, with the matrices divided among the sharding's devices."""
    axes = devices.axes_of(sharding)
    # Where the devices have different matrices already, each must invert its own.
    if len(stack[0]) == 1 or devices.varying(stack) & set(axes):
        return _inverse(*stack)

    def share(*stack: jax.Array) -> Inverse:
        number = len(stack[0])
        each = -(-number // devices.number(axes))
        # If they do not come out even, the last devices begin again with the first matrices.
        mine = (lax.axis_index(axes) * each + jnp.arange(each)) % number
        found = _inverse(*(part[mine] for part in stack))
        return jax.tree.map(lambda a: a[:number], devices.gathered(found, axes, 0))

    around = jax.sharding.get_abstract_mesh()
    if set(axes) <= set(around.manual_axes):
        return share(*stack)
    every = PartitionSpec()
    mesh = None if set(axes) <= set(around.axis_names) else sharding.mesh
    return jax.shard_map(share, mesh=mesh, in_specs=every, out_specs=every)(*stack)


@functools.partial(jax.jit, inline=True)
def _inverse(
    matrix: jax.Array, damping: jax.Array, rank: jax.Array, gain: jax.Array, solvable: jax.Array
) -> Inverse:
    """The inverses of a system whose numbers are all (B,)."""
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    increase = REPAIR_DAMPING * mean_eigenvalue(diagonal, rank)
    # Under `jax.vmap` the branch below becomes a selection. What it reads then varies over the axes
    # of `jax.shard_map` over which the condition does, so we say at once that it does.
    axes = devices.varying(matrix)
    one = devices.vary(jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None], axes)
    # What takes the place of an inverse if both attempts fail. The identity gives the plain
    # gradient. But where A overflows, the inverse tends to zero, and the plain gradient is huge.
    # And where it is NaN, that gradient is of inputs that nobody can use.
    substitute = jnp.where(jnp.isfinite(diagonal).all(-1), one[0, 0, 0], 0)

    def attempt(previous: Inverse, number: jax.Array) -> Inverse:
        raised = damping + jnp.where(number > 0, increase, 0)
        value = triangular.inverse(matrix + _per_matrix(raised) * one)
        # M_ii (M⁻¹)_ii is M_ii divided by what remains of it once the other rows and columns are
        # eliminated: in statistics, the variance inflation factor. It does not depend on the scales
        # of features. Their sum is the trace of M⁻¹ if M has ones on its diagonal, and so at least
        # one over the smallest eigenvalue, which rounding changes by about ε. The largest factor
        # alone does not do: of m equal rows, each is but an m-th of the sum. It takes O(m).
        inflation = (diagonal + raised[:, None]) * jnp.diagonal(value, axis1=1, axis2=2)
        value = _per_matrix(gain) * value
        good = inflation.sum(-1) * jnp.finfo(matrix.dtype).eps <= SINGULAR
        good &= jnp.isfinite(value).all((1, 2)) & (solvable | (number > 0))
        value = jnp.where(_per_matrix(good), value, _per_matrix(substitute) * one)
        repaired = jnp.broadcast_to(number > 0, good.shape)
        return Inverse(
            jnp.where(_per_matrix(previous.failed), value, previous.value),
            jnp.where(previous.failed, raised, previous.damping),
            jnp.where(previous.failed, repaired, previous.repaired),
            previous.failed & ~good,
        )

    def attempt_if_needed(previous: Inverse, number: jax.Array) -> tuple[Inverse, None]:
        needed = previous.failed.any()
        return lax.cond(needed, attempt, lambda previous, _: previous, previous, number), None

    never, always = jnp.zeros(len(matrix), bool), jnp.ones(len(matrix), bool)
    none_yet = Inverse(jnp.zeros_like(matrix), damping, never, always)
    none_yet = devices.vary(none_yet, axes)
    # A scan of two trips compiles `attempt` once. A branch for repairs would be a second copy of
    # the inversion, which is over half of the compile time that the optimizer adds to an MLP's.
    return lax.scan(attempt_if_needed, none_yet, devices.vary(jnp.arange(2), axes))[0]


def _per_matrix(numbers: jax.Array) -> jax.Array:
    """Numbers (B,) as (B, 1, 1), to go with B matrices."""
    return numbers[:, None, None]


def solve(inverse: jax.Array, right: jax.Array) -> jax.Array:
    """Applies inverses, (B, m, m), to right-hand sides, (B, m, o).

    If an entry of a right-hand side is not finite, no entry of the result's column is finite. So
    any one row of the result shows whether the right-hand side was finite.
    """
    # One product with an inverse takes the place of two triangular solves: R ↦ (L⁻ᵀL⁻¹) R has the
    # same error bound as R ↦ L⁻ᵀ (L⁻¹R). Inverses need no right-hand sides. So all of them can be
    # computed together, before the backward pass. Each layer's product follows when its signal is
    # there, and no layer waits for the others.
    return einsum("bij,bjo->bio", inverse, right, precision=lax.Precision.HIGHEST)
