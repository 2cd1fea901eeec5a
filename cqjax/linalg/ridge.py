"""Damped symmetric solves: factorised together where shapes are equal, repaired where they fail."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cqjax.linalg.triangular import inverse_factor

REPAIR_DAMPING = 1e-2
"""Damping of the second attempt, relative to the mean eigenvalue."""


class System(NamedTuple):
    """(A + λI) S = c R, for A symmetric and positive semi-definite.

    Attributes:
      matrix: A, (B, m, m).
      damping: λ, (B,) or ().
      right: R, (B, m, o).
      rank: how many of A's eigenvalues may differ from zero.
      gain: c, ().
      solvable: () bool, whether a solution with this λ is of use; else λ is raised at once.
    """

    matrix: jax.Array
    damping: jax.Array | float
    right: jax.Array
    rank: jax.Array | int
    gain: jax.Array | float = 1.0
    solvable: jax.Array | bool = True


class Solution(NamedTuple):
    """What came of a system.

    Attributes:
      value: S, (B, m, o); where both attempts failed R, with zeros for its entries that are not
        finite.
      damping: the λ that S is the solution for, (B,).
      failed: () bool, whether both attempts failed.
    """

    value: jax.Array
    damping: jax.Array
    failed: jax.Array


def mean_eigenvalue(trace: jax.Array, rank: jax.Array | int) -> jax.Array:
    """Mean of those eigenvalues of XXᵀ or XᵀX that may differ from zero: the two share them.

    So a damping relative to it is the same in both. Their number is that of X's rows or features,
    whichever is less.
    """
    return trace / rank


@functools.partial(jax.jit, inline=True)
def solve(systems: Sequence[System]) -> tuple[list[Solution], jax.Array]:
    """Solves the systems by Cholesky factorisation.

    Matrices of the same shape are factorised as one batch, and right-hand sides of the same shape
    substituted as one. A system whose solution is not finite is tried again with its damping raised
    by `REPAIR_DAMPING` times its mean eigenvalue. The second attempt costs nothing unless it is
    needed (under `vmap`, where a condition becomes a selection, it always runs).

    Returns:
      The solutions, and how many systems failed the first attempt, () int32.
    """
    if not systems:
        return [], jnp.zeros((), jnp.int32)
    dampings = [_each(s.damping, s.matrix) for s in systems]
    stacks = _grouped(map(_right_key, systems))
    first = _attempt(systems, dampings, stacks)
    solvable = [jnp.asarray(s.solvable) for s in systems if s.solvable is not True]
    finite = [jnp.isfinite(values).all() for values in first]
    diagonals = [jnp.isfinite(jnp.diagonal(s.matrix, axis1=1, axis2=2)).all() for s in systems]
    never = jnp.zeros(len(systems), bool)

    def accept() -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
        return first, dampings, never, jnp.zeros((), jnp.int32)

    def repair() -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
        return _repaired(systems, dampings, stacks, first)

    good = jnp.stack([*finite, *diagonals, *solvable]).all()
    values, dampings, failed, repaired = lax.cond(good, accept, repair)
    solved = _unstacked(values, stacks, systems)
    solutions = map(Solution, solved, dampings, [failed[i] for i in range(len(systems))])
    return list(solutions), repaired


_Groups = list[list[int]]


def _grouped(keys: Iterable[object]) -> _Groups:
    """The numbers of equal keys, together."""
    groups: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _matrix_key(system: System) -> object:
    return system.matrix.shape[1:], system.matrix.dtype


def _right_key(system: System) -> object:
    return _matrix_key(system), system.right.shape[1:], system.right.dtype


def _attempt(
    systems: Sequence[System], dampings: Sequence[jax.Array], stacks: _Groups
) -> list[jax.Array]:
    """The solutions, a batch for each stack."""
    inverses = _inverse_factors(systems, dampings)
    solutions = []
    for members in stacks:
        inverse = jnp.concatenate([inverses[i] for i in members])
        right = jnp.concatenate([systems[i].right for i in members])
        forward = jnp.einsum("bij,bjo->bio", inverse, right, precision=lax.Precision.HIGHEST)
        gain = jnp.concatenate([_each(systems[i].gain, systems[i].matrix) for i in members])
        scaled = gain[:, None, None] * inverse
        solution = jnp.einsum("bji,bjo->bio", scaled, forward, precision=lax.Precision.HIGHEST)
        solutions.append(solution)
    return solutions


def _inverse_factors(systems: Sequence[System], dampings: Sequence[jax.Array]) -> list[jax.Array]:
    """L⁻¹ of A + λI = LLᵀ for each system: one batch for all matrices of the same shape."""
    groups, inverses = _grouped(map(_matrix_key, systems)), []
    for members in groups:
        matrices = jnp.concatenate([systems[i].matrix for i in members])
        damping = jnp.concatenate([dampings[i] for i in members])[:, None, None]
        damped = matrices + damping * jnp.eye(matrices.shape[-1], dtype=matrices.dtype)[None]
        inverses.append(inverse_factor(damped))
    return _unstacked(inverses, groups, systems)


def _repaired(
    systems: Sequence[System],
    dampings: Sequence[jax.Array],
    stacks: _Groups,
    first: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    """Solutions and dampings, those that failed tried again; which failed then; how many had."""
    raised = []
    for system, damping in zip(systems, dampings, strict=True):
        trace = jnp.trace(system.matrix, axis1=1, axis2=2)
        mean = mean_eigenvalue(trace, system.rank).astype(damping.dtype)
        raised.append(damping + REPAIR_DAMPING * mean)
    old = _unstacked(first, stacks, systems)
    new = _unstacked(_attempt(systems, raised, stacks), stacks, systems)
    values, good, failed = [], [], []
    for i, system in enumerate(systems):
        good.append(_finite(old[i], system) & system.solvable)
        failed.append(~good[i] & ~_finite(new[i], system))
        right = jnp.where(jnp.isfinite(system.right), system.right, 0)
        values.append(jnp.where(good[i], old[i], jnp.where(failed[i], right, new[i])))
    kept = [jnp.where(good[i], dampings[i], raised[i]) for i in range(len(systems))]
    stacked = [jnp.concatenate([values[i] for i in members]) for members in stacks]
    return stacked, kept, jnp.stack(failed), jnp.sum(~jnp.stack(good), dtype=jnp.int32)


def _unstacked(
    values: Sequence[jax.Array], stacks: _Groups, systems: Sequence[System]
) -> list[jax.Array]:
    """Each system's part of the stacks."""
    parts: dict[int, jax.Array] = {}
    for members, value in zip(stacks, values, strict=True):
        sizes = [systems[i].matrix.shape[0] for i in members]
        parts |= dict(zip(members, jnp.split(value, np.cumsum(sizes)[:-1]), strict=True))
    return [parts[i] for i in range(len(systems))]


def _each(value: jax.Array | float, matrix: jax.Array) -> jax.Array:
    """A number for each matrix (B, m, m), in its dtype: (B,)."""
    return jnp.broadcast_to(jnp.asarray(value).astype(matrix.dtype), matrix.shape[:1])


def _finite(solution: jax.Array, system: System) -> jax.Array:
    arrays = (solution, system.matrix, system.right)
    return jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()
