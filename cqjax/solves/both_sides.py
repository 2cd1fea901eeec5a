"""Updates of weights that a loss uses both ways: Z = XW and, elsewhere, Y = DWᵀ.

So it is with second derivatives in the loss (gradients with respect to inputs go back along the
weights), with tied embeddings and tied autoencoders. The update is the least-squares solution of
both demands on ΔW at once,

  ½‖XΔW + N Z̄‖² + ½‖DΔWᵀ + N Ȳ‖² + ½λ‖ΔW‖²,

which is that of the Sylvester equation (XᵀX) ΔW + ΔW (DᵀD) + λΔW = -N G, with the whole gradient
G = XᵀZ̄ + ȲᵀD.

A bias b of Z is a further feature of X, and takes no part in Y. With a = Xᵀh and α = hᵀh, its row
of the equations is aᵀΔW + (α + λ) Δb = -N g. That gives Δb, and once it is put into the others, XᵀX
becomes XᵀX - aaᵀ / (α + λ), and G becomes G - a gᵀ / (α + λ). So it is with a bias of Y.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cqjax.linalg import sylvester
from cqjax.linalg.products import einsum
from cqjax.solves.layer import Layer
from cqjax.solves.matrices import Matrices, along
from cqjax.solves.solve import Damping


class Updates(NamedTuple):
    """What the solves make.

    Attributes:
      results: of the weights and the biases of Z, by label.
      others: of the biases of Y, by their parameters' paths.
      failures: (B,) bool by label, whether a solve failed.
    """

    results: dict[str, Matrices]
    others: dict[str, jax.Array]
    failures: dict[str, jax.Array]


class Side(NamedTuple):
    """One side's equations, once its bias is eliminated.

    Attributes:
      moment: (B, m, m), or (B, m) if it is diagonal.
      feature: a, the products of the features with that of the bias, (B, m); None without one.
      bias: g, its gradient, (B, k).
      divisor: α + λ, (B,).
    """

    moment: jax.Array
    feature: jax.Array | None
    bias: jax.Array | None
    divisor: jax.Array

    def spread(self) -> jax.Array:
        """What the bias takes of the gradient, a gᵀ / (α + λ): (B, m, k); zero without one."""
        if self.feature is None or self.bias is None:
            return jnp.zeros((1, 1, 1), self.moment.dtype)
        return self.feature[:, :, None] * (self.bias / along(self.divisor, self.bias))[:, None]

    def of_bias(self, weight: jax.Array, terms: float | jax.Array) -> jax.Array | None:
        """The bias's update, (B, k), beside the weight's, (B, m, k)."""
        if self.feature is None or self.bias is None:
            return None
        moved = einsum("bm,bmk->bk", self.feature, weight, precision=jax.lax.Precision.HIGHEST)
        return (terms * self.bias - moved) / along(self.divisor, moved)


class System(NamedTuple):
    """The Sylvester equation of a layer: A U + U B + λU = H.

    Attributes:
      left: A.
      right: B.
      damping: λ, (B,).
    """

    left: Side
    right: Side
    damping: jax.Array


def system(layer: Layer, damping: Damping) -> System:
    """The equation of a layer that has an `other` side."""
    other = layer.other
    assert other is not None
    moments = [side.cropped(side.capture.second_moment()) for side in (layer, other)]
    added = _damping(layer, other, moments, damping)
    return System(_side(layer, moments[0], added), _side(other, moments[1], added), added)


def solved(layers: Mapping[str, Layer], damping: Damping) -> Updates:
    """The updates of layers that have an `other` side.

    Args:
      layers: the layers.
      damping: λ. Its relative part is in units of the mean of the equation's eigenvalues, aᵢ + bⱼ,
        that may differ from zero.
    """
    systems = {label: system(layer, damping) for label, layer in layers.items()}
    equations = {label: _equation(layer, systems[label]) for label, layer in layers.items()}
    without = [label for label, layer in layers.items() if not layer.block.windows]
    found = sylvester.solve([equations[label] for label in without])
    solutions = dict(zip(without, found, strict=True))
    updates = Updates({}, {}, {})
    for label, layer in layers.items():
        (left, right, _), other, n = systems[label], layer.other, layer.terms
        assert other is not None
        plain = (*layer.update, other.update.bias)
        turned, back = layer.block.of_other, other.block.of_other
        if label not in solutions:
            solutions[label] = sylvester.solve_with_windows(equations[label], turned, back)
        solution = solutions[label]
        weight = solution.value
        new = (weight, left.of_bias(weight, n), right.of_bias(back(weight), n))
        new, good = _usable(new, plain, solution.known)
        updates.results[label] = Matrices(new[0], new[1])
        if new[2] is not None:
            updates.others.update(other.block.scatter_bias(new[2]))
        lost = ~good | layer.overflows(updates.results[label])
        updates.failures[label] = solution.repaired | lost
    return updates


def _equation(layer: Layer, system: System) -> sylvester.Equation:
    """A U + U B + λU = N H, once the biases are eliminated."""
    h = layer.update.weight - system.left.spread()
    if system.right.bias is not None:
        h -= layer.block.of_other(system.right.spread())
    return sylvester.Equation(
        system.left.moment, system.right.moment, system.damping, layer.terms * h
    )


def _usable(
    new: Sequence[jax.Array | None], plain: Sequence[jax.Array | None], known: jax.Array
) -> tuple[list[Any], jax.Array]:
    """New updates, (B, ...), where they are finite, and whether they are: (B,).

    Else the plain ones; and zero where nobody knows the second moments.
    """
    finite = [jnp.isfinite(a).all(tuple(range(1, a.ndim))) for a in new if a is not None]
    good = functools.reduce(jnp.logical_and, finite) & known

    def chosen(new: jax.Array | None, plain: jax.Array | None) -> jax.Array | None:
        if new is None or plain is None:
            return plain
        otherwise = jnp.where(along(known, plain), plain, 0)
        return jnp.where(along(good, new), new, otherwise)

    return [chosen(*pair) for pair in zip(new, plain, strict=True)], good


def _side(layer: Layer, moment: jax.Array, damping: jax.Array) -> Side:
    if not layer.joint_bias:
        return Side(moment, None, None, damping)
    moment, feature, square = moment[:, :-1, :-1], moment[:, :-1, -1], moment[:, -1, -1]
    divisor = square + damping
    divisor = jnp.where(divisor > 0, divisor, 1)  # no rows: then a and g are zero
    outer = feature[:, :, None] * (feature / along(divisor, feature))[:, None]
    return Side(moment - outer, feature, layer.update.bias, divisor)


def _damping(layer: Layer, other: Layer, moments: list[jax.Array], damping: Damping) -> jax.Array:
    """λ, (B,).

    With the biases among them there are d of the aᵢ and o of the bⱼ. The trace of the equation's
    matrix is o Σaᵢ + d Σbⱼ. Of its eigenvalues as many are zero as there are pairs in which both
    are. The two biases have none with one another. With windows, where bⱼ are those of e features
    and c outputs, the trace is o Σaᵢ + c Σbⱼ, and those are zero that neither side's rows reach.
    """
    sizes, ranks = (layer.size, other.size), (layer.rank(), other.rank())
    block, beside = layer.block, other.block
    traces = [m.sum(-1) if m.ndim == 2 else jnp.trace(m, axis1=1, axis2=2) for m in moments]
    total = block.outputs * traces[0] + beside.outputs * traces[1]
    if block.windows:
        number = block.features * block.outputs
        number += layer.joint_bias * block.outputs + other.joint_bias * beside.outputs
        reached = ranks[0] * block.outputs + ranks[1] * beside.outputs
        number = jnp.minimum(number, reached)
    else:
        zeros = (sizes[0] - ranks[0]) * (sizes[1] - ranks[1])
        number = sizes[0] * sizes[1] - zeros - (layer.joint_bias and other.joint_bias)
    return damping.absolute + damping.relative * total / number
