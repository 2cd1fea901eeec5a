"""Damped inverses: all are inverted together, and those that fail are repaired."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cqjax.linalg import definite, devices
from cqjax.linalg.products import diagonal, einsum

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
      damping: the absolute part of λ, (B,) or ().
      rank: the number of A's eigenvalues that may differ from zero.
      relative: the part of λ that is relative to the mean of these eigenvalues, (B,) or ().
      gain: c, ().
      column: h, (B, m), where A is to be `matrix` + hhᵀ; None where it is `matrix`.
      solvable: (B,) or () bool, whether to attempt the inverse with this λ. Where it is false, the
        first attempt counts as failed, and only the second, with a larger λ, is used.
    """

    matrix: jax.Array
    damping: jax.Array | float
    rank: jax.Array | int
    relative: jax.Array | float = 0.0
    gain: jax.Array | float = 1.0
    column: jax.Array | None = None
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
    """Inverts systems. Matrices of about the same shape form one batch.

    An inverse fails where it is not finite, or where its matrix M = A + λI is singular to working
    precision: where ε Σ M_ii (M⁻¹)_ii exceeds `SINGULAR`. Of equal rows, this is so where λ is less
    than 8 ε times the trace of A. Such a matrix is inverted again, with λ raised by
    `REPAIR_DAMPING` times the mean eigenvalue of A. This second attempt costs nothing unless it is
    needed; then all systems take part in it. (Under `jax.vmap` it always runs, since a condition
    becomes a selection.)

    Args:
      systems: the systems.
      spread_over: a sharding whose mesh axes name devices. They divide the matrices of a batch
        among themselves, and then exchange the inverses. None if each device inverts all matrices.

    Returns:
      The inverses of each system.
    """
    function = _inverses
    if spread_over is not None:
        function = functools.partial(_inverses_shared_out, spread_over)
    arguments = list(map(_full, systems))
    together: dict[object, list[int]] = {}
    for i, (matrix, *_) in enumerate(arguments):
        together.setdefault((matrix.dtype, devices.varying(matrix)), []).append(i)
    results: dict[int, Inverse] = {}
    for members in together.values():
        sizes = _common_sizes({arguments[i][0].shape[-1] for i in members})
        batches: dict[int, list[int]] = {}
        for i in members:
            batches.setdefault(sizes[arguments[i][0].shape[-1]], []).append(i)
        stacks = [
            tuple(
                map(
                    jnp.concatenate, zip(*(_padded(arguments[i], size) for i in batch), strict=True)
                )
            )
            for size, batch in batches.items()
        ]
        for batch, found in zip(batches.values(), function(stacks), strict=True):
            ends = np.cumsum([len(arguments[i][0]) for i in batch])[:-1]
            each = zip(*(jnp.split(part, ends) for part in found), strict=True)
            for i, (value, *rest) in zip(batch, each, strict=True):
                size = arguments[i][0].shape[-1]
                results[i] = Inverse(value[:, :size, :size], *rest)
    return [results[i] for i in range(len(systems))]


def _common_sizes(sizes: set[int]) -> dict[int, int]:
    """For each size the one that it is padded to: the largest within 5 % of it.

    Each size is compiled anew. The biases of some layers make one out of two.
    """
    common: dict[int, int] = {}
    largest = 0
    for size in sorted(sizes, reverse=True):
        if largest > 1.05 * size or not largest:
            largest = size
        common[size] = largest
    return common


_Full = tuple[jax.Array, ...]
"""The fields of a `System`: numbers are (B,), one for each of B matrices, and there is a column."""


def _full(system: System) -> _Full:
    matrix = system.matrix

    def repeated(value: jax.Array | float, dtype: jnp.dtype) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(value).astype(dtype), matrix.shape[:1])

    numbers = (repeated(value, matrix.dtype) for value in system[1:-2])
    column = jnp.zeros(()) if system.column is None else system.column
    column = jnp.broadcast_to(column.astype(matrix.dtype), matrix.shape[:2])
    parts = matrix, *numbers, column, repeated(system.solvable, jnp.dtype(bool))
    return devices.vary(parts, devices.varying(parts))


def _padded(full: _Full, size: int) -> _Full:
    """The same with matrices in the corners of identities of so many rows."""
    matrix, *numbers, column, solvable = full
    column = jnp.pad(column, ((0, 0), (0, size - column.shape[1])))
    return definite.padded(matrix, size), *numbers, column, solvable


def _inverses_shared_out(sharding: NamedSharding, stacks: Sequence[_Full]) -> list[Inverse]:
    """`_inverses`, with the matrices divided among the sharding's devices."""
    axes = devices.axes_of(sharding)
    # Where the devices have different matrices already, each must invert its own.
    if all(len(stack[0]) == 1 for stack in stacks) or devices.varying(stacks) & set(axes):
        return _inverses(stacks)

    def mine(stack: _Full) -> _Full:
        number = len(stack[0])
        each = -(-number // devices.number(axes))
        # If they do not come out even, the last devices begin again with the first matrices.
        some = (lax.axis_index(axes) * each + jnp.arange(each)) % number
        return tuple(part[some] for part in stack)

    def share(stacks: Sequence[_Full]) -> list[Inverse]:
        found = devices.gathered(_inverses(list(map(mine, stacks))), axes, 0)
        numbers = [len(stack[0]) for stack in stacks]
        return [
            Inverse(*(part[:number] for part in inverse))
            for number, inverse in zip(numbers, found, strict=True)
        ]

    around = jax.sharding.get_abstract_mesh()
    if set(axes) <= set(around.manual_axes):
        return share(stacks)
    every = PartitionSpec()
    mesh = None if set(axes) <= set(around.axis_names) else sharding.mesh
    return jax.shard_map(share, mesh=mesh, in_specs=every, out_specs=every)(stacks)


@jax.jit(inline=True)
def _inverses(stacks: Sequence[_Full]) -> list[Inverse]:
    """The inverses of systems."""
    matrices = [matrix + h[:, :, None] * h[:, None] for matrix, *_, h, _ in stacks]
    ends = np.cumsum([len(matrix) for matrix in matrices])[:-1]
    # The numbers of all systems are one array: an operation on each would have to be compiled.
    damping, rank, relative, gain, solvable = map(
        jnp.concatenate, zip(*((*numbers, ok) for _, *numbers, _, ok in stacks), strict=True)
    )
    dtype = matrices[0].dtype
    diagonals = list(map(diagonal, matrices))
    each = zip(diagonals, jnp.split(rank, ends), strict=True)
    mean = jnp.concatenate([mean_eigenvalue(*pair) for pair in each])
    damping, increase = damping + relative * mean, REPAIR_DAMPING * mean
    # Under `jax.vmap` the branch below becomes a selection. What it reads then varies over the axes
    # of `jax.shard_map` over which the condition does, so we say at once that it does.
    axes = devices.varying(matrices)
    # What takes the place of an inverse if both attempts fail. The identity gives the plain
    # gradient. But where A overflows, the inverse tends to zero, and the plain gradient is huge.
    # And where it is NaN, that gradient is of inputs that nobody can use.
    substitute = jnp.where(jnp.isfinite(mean), devices.vary(jnp.ones((), dtype), axes), 0)

    def attempt(previous: _Attempt, number: jax.Array) -> _Attempt:
        raised = damping + jnp.where(number > 0, increase, 0)
        found, inflations, lengths = [], [], []
        for matrix, before, added, factor in zip(
            matrices, diagonals, jnp.split(raised, ends), jnp.split(gain, ends), strict=True
        ):
            one = jnp.eye(matrix.shape[-1], dtype=dtype)[None]
            value = definite.inverse(matrix + _per_matrix(added) * one)
            own = diagonal(value)
            # M_ii (M⁻¹)_ii is M_ii divided by what remains of it once the other rows and columns
            # are eliminated: in statistics, the variance inflation factor. It does not depend on
            # the scales of features. Their sum is the trace of M⁻¹ if M has ones on its diagonal,
            # and so at least one over the smallest eigenvalue, which rounding changes by about ε.
            # The largest factor alone does not do: of m equal rows, each is but an m-th of the sum.
            # It takes O(m).
            inflations.append(((before + added[:, None]) * own).sum(-1))
            # No entry of a positive definite matrix is larger than the largest on its diagonal.
            lengths.append((factor[:, None] * own).sum(-1))
            found.append(_per_matrix(factor) * value)
        inflation, length = jnp.concatenate(inflations), jnp.concatenate(lengths)
        good = (inflation * jnp.finfo(dtype).eps <= SINGULAR) & jnp.isfinite(length)
        good &= solvable | (number > 0)
        values = [
            jnp.where(
                _per_matrix(failed),
                jnp.where(
                    _per_matrix(well),
                    new,
                    _per_matrix(plain) * jnp.eye(new.shape[-1], dtype=dtype)[None],
                ),
                old,
            ).astype(dtype)
            for old, new, failed, well, plain in zip(
                previous.values,
                found,
                *(jnp.split(each, ends) for each in (previous.failed, good, substitute)),
                strict=True,
            )
        ]
        return _Attempt(
            values,
            jnp.where(previous.failed, raised, previous.damping),
            jnp.where(previous.failed, number > 0, previous.repaired),
            previous.failed & ~good,
        )

    def attempt_if_needed(previous: _Attempt, number: jax.Array) -> tuple[_Attempt, None]:
        needed = previous.failed.any()
        return lax.cond(needed, attempt, lambda previous, _: previous, previous, number), None

    never, always = jnp.zeros(damping.shape, bool), jnp.ones(damping.shape, bool)
    none_yet = _Attempt(list(map(jnp.zeros_like, matrices)), damping, never, always)
    none_yet = devices.vary(none_yet, axes)
    # A scan of two trips compiles `attempt` once. A branch for repairs would be a second copy of
    # the inversion, which is most of what the optimizer adds to the compile time of an MLP.
    last = lax.scan(attempt_if_needed, none_yet, devices.vary(jnp.arange(2), axes))[0]
    numbers = zip(*(jnp.split(each, ends) for each in last[1:]), strict=True)
    return [Inverse(value, *rest) for value, rest in zip(last.values, numbers, strict=True)]


class _Attempt(NamedTuple):
    """What `Inverse` has, of all systems: the values of each stack, and numbers of all."""

    values: list[jax.Array]
    damping: jax.Array
    repaired: jax.Array
    failed: jax.Array


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
