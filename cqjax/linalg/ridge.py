"""Damped symmetric solves: factorised together where shapes are equal, repaired where they fail."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.linalg.triangular import inverse_lower

REPAIR_DAMPING = 1e-2
"""Damping of the second attempt, relative to the mean eigenvalue."""


class System(NamedTuple):
    """(A + λI) S = R, for A symmetric and positive semi-definite.

    Attributes:
      matrix: A, (B, m, m).
      damping: λ, (B,).
      scale: A's mean eigenvalue, (B,): what a failed solve measures its second damping by.
      right: R, (B, m, o).
      solvable: () bool, whether a solution with this λ is of use; else λ is raised at once.
    """

    matrix: jax.Array
    damping: jax.Array
    scale: jax.Array
    right: jax.Array
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


def mean_eigenvalue(trace: jax.Array, rows: int, features: int) -> jax.Array:
    """Mean of the eigenvalues of XXᵀ and XᵀX that may differ from zero, X being (rows, features).

    The two have these eigenvalues in common, so that a damping relative to it is the same in both.
    """
    return trace / min(rows, features)


@functools.partial(jax.jit, inline=True)
def solve(systems: Sequence[System]) -> tuple[list[Solution], jax.Array]:
    """Solves the systems by Cholesky factorisation.

    A system whose solution is not finite is tried again with its damping raised by
    `REPAIR_DAMPING` times its mean eigenvalue. The second attempt costs nothing unless it is
    needed (under `vmap`, where a condition becomes a selection, it always runs).

    Returns:
      The solutions, and how many systems failed the first attempt, () int32.
    """
    if not systems:
        return [], jnp.zeros((), jnp.int32)
    first = _attempt(systems)
    good = jnp.stack(
        [_finite(s, system) & system.solvable for s, system in zip(first, systems, strict=True)]
    )

    def accept() -> list[Solution]:
        return [
            Solution(value, system.damping, jnp.zeros((), bool))
            for value, system in zip(first, systems, strict=True)
        ]

    def repair() -> list[Solution]:
        raised = [s._replace(damping=s.damping + REPAIR_DAMPING * s.scale) for s in systems]
        repaired = []
        for i, (system, old, new) in enumerate(zip(raised, first, _attempt(raised), strict=True)):
            failed = ~_finite(new, system)
            right = jnp.where(jnp.isfinite(system.right), system.right, 0)
            again = Solution(jnp.where(failed, right, new), system.damping, failed)
            kept = Solution(old, systems[i].damping, jnp.zeros((), bool))
            repaired.append(jax.tree.map(lambda k, a, i=i: jnp.where(good[i], k, a), kept, again))
        return repaired

    return lax.cond(good.all(), accept, repair), jnp.sum(~good, dtype=jnp.int32)


def _finite(solution: jax.Array, system: System) -> jax.Array:
    arrays = (solution, system.matrix, system.right)
    return jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()


def _attempt(systems: Sequence[System]) -> list[jax.Array]:
    """Solutions, from one batched factorisation for all matrices of the same shape."""
    groups: dict[object, list[int]] = {}
    for i, system in enumerate(systems):
        groups.setdefault((system.matrix.shape[1:], system.matrix.dtype), []).append(i)
    solutions: dict[int, jax.Array] = {}
    for members in groups.values():
        damped = [_damped(systems[i]) for i in members]
        factors = jnp.linalg.cholesky(jnp.concatenate(damped), symmetrize_input=True)
        inverses, at = inverse_lower(factors), 0
        for i in members:
            size = systems[i].matrix.shape[0]
            solutions[i] = _substitute(inverses[at : at + size], systems[i].right)
            at += size
    return [solutions[i] for i in range(len(systems))]


def _substitute(inverse: jax.Array, right: jax.Array) -> jax.Array:
    """(LLᵀ)⁻¹ R, given L⁻¹."""
    forward = jnp.einsum("bij,bjo->bio", inverse, right, precision=lax.Precision.HIGHEST)
    return jnp.einsum("bji,bjo->bio", inverse, forward, precision=lax.Precision.HIGHEST)


def _damped(system: System) -> jax.Array:
    identity = jnp.eye(system.matrix.shape[-1], dtype=system.matrix.dtype)
    return system.matrix + system.damping[:, None, None] * identity[None]
