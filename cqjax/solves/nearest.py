r"""Weights that a loss makes of parameters, W = f(V): a layer's ridge problem, posed in V.

A layer's own update is the ΔW that minimises ‖X ΔW - N Z̄‖² + λ ‖ΔW‖². But W moves only as f lets
it: to first order by J ΔV, with the Jacobian J of f at V. So the update of V is the ΔV that
minimises

    ‖X J ΔV - N Z̄‖² + λ ‖J ΔV‖² + δ ‖ΔV‖²,

which is, with A = XᵀX + λI and since the gradient of V is G = Jᵀ XᵀZ̄,

    ΔV = N (JᵀAJ + δI)⁻¹ G.

In other words: J ΔV is the nearest to the layer's own solution U = N A⁻¹ XᵀZ̄, in the norm
‖D‖²_A = ‖X D‖² + λ ‖D‖² of what a change does to the outputs. The term δ is small. It keeps V from
long steps along directions that hardly move W, such as the length of V under weight
standardisation: δ = 1e-3 ρ ā, with the mean eigenvalue ā of A and ρ = ‖J G‖² / ‖G‖².

Where f is linear in V (masks, scales, straight-through gradients), the linearisation is exact: this
is the ridge solution among the W that f can make.

Neither J nor JᵀAJ is ever formed: conjugate gradients take products with J and its transpose. They
are preconditioned by K A⁻¹ Kᵀ with K = D⁻² Jᵀ S⁻¹. Here D² is the diagonal of JᵀJ, and S the mean
of that of J D⁻² Jᵀ, for each output. K is an inverse of J where J only scales and selects, and for
weight normalisation.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cqjax.capture.block import Block
from cqjax.linalg import devices
from cqjax.linalg.gram import HIGHEST, accumulator
from cqjax.linalg.products import einsum
from cqjax.program.weight_function import WeightFunction
from cqjax.solves.matrices import Matrices

Arrays = dict[str, jax.Array]

LEAST = 1e-3
"""δ, relative to ρ times the mean eigenvalue of A."""

PROBES = 16
"""How many random signs estimate the preconditioner's scales."""

TOLERANCE = 2e-3
"""The relative residual, in the preconditioner's norm, at which they end; in float64, 1e-8."""

ITERATIONS = 100
"""After how many steps conjugate gradients end in any case."""

UNSOLVED = 0.1
"""The relative residual, in the preconditioner's norm, above which an end is a failure."""


class Image:
    """The linear map J from changes of a block's parameters to those of [W; b], and Jᵀ."""

    def __init__(self, block: Block, function: WeightFunction, has_bias: bool):
        """The map at the parameters at which the loss was evaluated."""
        self._block = block
        self._forth, self._back = function.linearized()
        self._parameters = function.parameters
        self._made = jax.eval_shape(function, function.parameters)
        shapes = dict(block.shapes)
        self._of_bias = None
        if has_bias and block.bias is not None:
            paths = block.bias.view.paths
            dtype = accumulator(next(iter(function.parameters.values())).dtype)
            self._of_bias = {p: jax.ShapeDtypeStruct(shapes[p], dtype) for p in paths}

    def __call__(self, change: Mapping[str, jax.Array]) -> Matrices:
        """J ΔV: how W, (B, d, o), and b, (B, o), change; in at least float32."""
        own = {p: change[p].astype(v.dtype) for p, v in self._parameters.items()}
        weight = self._weight(self._forth(own))
        bias = None
        if self._of_bias is not None:
            bias = self._block.bias_matrix({p: change[p] for p in self._of_bias})
        return Matrices(weight.astype(accumulator(weight.dtype)), bias)

    def transpose(self, gradient: Matrices) -> Arrays:
        """Jᵀ applied to gradients with respect to W and b, in at least float32."""
        (array,) = jax.linear_transpose(self._weight, self._made)(
            gradient.weight.astype(self._made.dtype)
        )
        own = {p: a.astype(accumulator(a.dtype)) for p, a in self._back(array).items()}
        if self._of_bias is not None:
            (bias,) = jax.linear_transpose(self._block.bias_matrix, self._of_bias)(gradient.bias)
            own |= bias
        return own

    @property
    def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Types of V and the bias."""
        own = {
            p: jax.ShapeDtypeStruct(v.shape, accumulator(v.dtype))
            for p, v in self._parameters.items()
        }
        return own | (self._of_bias or {})

    @property
    def sources(self) -> tuple[str, ...]:
        """The paths of V."""
        return tuple(self._parameters)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of V and the bias."""
        return (*self.sources, *(self._of_bias or ()))

    def parted(self, joined: jax.Array) -> Matrices:
        """[W; b] as the two."""
        return Matrices.parted(joined, self._of_bias is not None)

    def identity(self) -> jax.Array:
        """That of [W; b], for each of the B weights: (B, m, m)."""
        size = self._block.features + (self._of_bias is not None)
        one = jnp.eye(size, dtype=accumulator(self._made.dtype))
        return jnp.broadcast_to(one, (self._block.batch, size, size))

    def _weight(self, array: jax.Array) -> jax.Array:
        """W as matrices, of the array that the function makes."""
        assert self._block.view.made is not None
        return self._block.weight_matrix({self._block.view.made: array})

    @property
    def tolerance(self) -> float:
        """The relative residual at which iterations end."""
        rounding = float(max(jnp.finfo(v.dtype).eps for v in self._parameters.values()))
        return 1e-8 if rounding < 1e-10 else max(rounding, TOLERANCE)


class Solution(NamedTuple):
    """What conjugate gradients ended with.

    Attributes:
      change: ΔV.
      residual: (), relative to the start's, in the preconditioner's norm.
    """

    change: Arrays
    residual: jax.Array


def solved(image: Image, right: Arrays, matrix: jax.Array, inverse: jax.Array) -> Solution:
    """(JᵀAJ + δI)⁻¹ R, with δI for V alone, by preconditioned conjugate gradients.

    Args:
      image: J.
      right: R, an array for each parameter.
      matrix: A, (B, m, m).
      inverse: a multiple of its inverse.
    """
    columns, rows = _scales(image)
    # A change of V along the null space of J needs a step of its own from the preconditioner. It is
    # 1 / ‖A‖ at most, so that it does no harm elsewhere.
    gain = _gain(image, right)
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    delta = LEAST * gain * diagonal.mean()
    largest = jnp.sqrt(jnp.square(matrix).sum((1, 2)).max()) * gain
    own = jnp.trace(_times(matrix, inverse), axis1=1, axis2=2).mean() / matrix.shape[-1]
    least = jnp.where(largest > 0, own / jnp.where(largest > 0, largest, 1), 0)

    def added(change: Arrays, factor: jax.Array, to: Arrays) -> Arrays:
        return {p: a + factor * change[p] if p in image.sources else a for p, a in to.items()}

    def operator(change: Arrays) -> Arrays:
        moved = _times(matrix, image(change).joined)
        return added(change, delta, image.transpose(image.parted(moved)))

    def preconditioned(residual: Arrays) -> Arrays:
        scaled = jax.tree.map(jnp.multiply, columns, residual)
        moved = rows * _times(inverse, rows * image(scaled).joined)
        moved = image.transpose(image.parted(moved))
        return added(residual, least, jax.tree.map(jnp.multiply, columns, moved))

    residual = {p: right[p] for p in image.paths}
    z = preconditioned(residual)
    first = _inner(residual, z)
    limit = image.tolerance**2 * first
    zero = jax.tree.map(jnp.zeros_like, z)
    state = jnp.zeros((), jnp.int32), zero, residual, z, first
    axes = devices.varying(state)

    def unfinished(state: Any) -> jax.Array:
        count, _, _, _, size = state
        return (count < ITERATIONS) & (size > limit)

    def step(state: Any) -> Any:
        count, change, residual, direction, size = state
        slope = operator(direction)
        curvature = _inner(direction, slope)
        length = jnp.where(curvature > 0, size / jnp.where(curvature > 0, curvature, 1), 0)
        change = jax.tree.map(lambda u, p: u + length * p, change, direction)
        residual = jax.tree.map(lambda r, p: r - length * p, residual, slope)
        z = preconditioned(residual)
        new = jnp.where(curvature > 0, _inner(residual, z), 0)
        direction = jax.tree.map(lambda z, p: z + new / size * p, z, direction)
        return devices.vary((count + 1, change, residual, direction, new), axes)

    _, change, _, _, size = lax.while_loop(unfinished, step, devices.vary(state, axes))
    return Solution(change, jnp.sqrt(size / jnp.where(first > 0, first, 1)))


def of_weight(image: Image, gradient: Arrays) -> Matrices:
    """A gradient with respect to [W; b] that gives this one of the parameters: the shortest."""
    one = image.identity()
    return image(solved(image, gradient, one, one).change)


def of_parameters(image: Image, change: Matrices) -> Arrays:
    """The change of the parameters whose J ΔV is nearest to one of [W; b]."""
    one = image.identity()
    return solved(image, image.transpose(change), one, one).change


def _times(matrix: jax.Array, joined: jax.Array) -> jax.Array:
    return einsum("bij,bjo->bio", matrix, joined, precision=HIGHEST)


def _gain(image: Image, change: Arrays) -> jax.Array:
    """ρ: the mean square of what J multiplies a change of V by, along this one."""
    squares = sum((jnp.square(change[p]).sum() for p in image.sources), jnp.zeros(()))
    moved = jnp.square(image(change).weight).sum()
    return jnp.where(squares > 0, moved / jnp.where(squares > 0, squares, 1), 0)


def _scales(image: Image) -> tuple[Arrays, jax.Array]:
    """1 / D² for the parameters and 1 / S, (B, 1, o): see the module; zero where nothing moves.

    Both are estimated by random signs: the mean of (Jᵀy)² is the diagonal of JᵀJ, and likewise that
    of (J D⁻¹ z)². Where J only scales and selects, the two are exact.
    """

    def signs(key: jax.Array, like: Any) -> Any:
        leaves, tree = jax.tree.flatten(like)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(keys, leaves, strict=True)
        return jax.tree.unflatten(
            tree, [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in pairs]
        )

    def mean_square(estimate: Any) -> Any:
        def more(total: Any, key: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(lambda t, e: t + jnp.square(e) / PROBES, total, estimate(key)), None

        keys = jax.random.split(jax.random.key(0), PROBES)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(estimate, keys[0]))
        return lax.scan(more, devices.vary(zeros, devices.varying(estimate(keys[0]))), keys)[0]

    def inverse(squares: jax.Array) -> jax.Array:
        return jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1), 0)

    weight = jax.eval_shape(image, image.parameters)
    columns = mean_square(lambda key: image.transpose(signs(key, weight)))
    shapes = jax.tree.map(inverse, columns)
    roots = jax.tree.map(jnp.sqrt, shapes)

    def moved(key: jax.Array) -> jax.Array:
        return image(jax.tree.map(jnp.multiply, roots, signs(key, roots))).joined

    # For each output the mean over the features that move at all: single ones are too uncertain.
    squares = mean_square(moved)
    number = jnp.maximum((squares > 0).sum(1, keepdims=True), 1)
    return shapes, inverse(squares.sum(1, keepdims=True) / number)


def _inner(a: Arrays, b: Arrays) -> jax.Array:
    return sum((jnp.sum(a[p] * b[p]) for p in b), jnp.zeros(()))
