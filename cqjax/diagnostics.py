"""How well each layer's inputs determine its update, and what the update does to its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cqjax.capture.block import Block
from cqjax.capture.captures import Captures
from cqjax.capture.table import lines
from cqjax.linalg import devices, ridge
from cqjax.linalg.gram import HIGHEST
from cqjax.linalg.products import einsum
from cqjax.solves import both_sides
from cqjax.solves.layer import Layer
from cqjax.solves.layers import Layers
from cqjax.solves.matrices import along
from cqjax.solves.solve import Damping
from cqjax.solves.spectrum import Spectrum, eigenvalues, inputs, spectrum_of

_NAME = "cqjax.diagnostics.report"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The numbers for one weight, or for B weights that are solved for side by side.

    X (n, d) are the input rows that meet the weight, with a bias as a further feature. σ are the
    singular values of X; those within rounding error of zero count as zero.

    Attributes:
      condition: (B,), the condition number of the matrix that the solver inverts, XᵀX + λI or
        XXᵀ + λI: its largest eigenvalue divided by the smallest, infinite if that is zero.
      restricted_condition: (B,), the same for XᵀX without its zero eigenvalues: the squared ratio
        of the largest and the smallest σ that is not zero.
      rank: (B,) int32, the numerical rank of X: the number of σ that are not zero.
      effective_rank: (B,), exp(−Σ p log p) with p = σ / Σσ (Roy and Vetterli, 2007). It equals the
        rank if all σ are equal, and is less if a few of them dominate.
      effective_dimension: (B,), tr XᵀX (XᵀX + λI)⁻¹ = Σ σ² / (σ² + λ), the degrees of freedom of
        ridge regression: roughly the number of directions with σ² above λ.
      residual: (B,), ‖XΔW + μNZ̄‖ / ‖μNZ̄‖: the outputs' distance from their targets, relative to
        the move that the targets ask for. NaN where rows were not captured. None without a
        learning rate.
      reachable_residual: (B,), the same for the parts of the outputs that some ΔW could move, which
        are their projections on the columns of X. XᵀX and the gradient suffice for it.
      fallbacks: () int32, the number of failed solves; None without a state.
      foreign: () int32, how often the layer's update came to the solve with another direction than
        the gradient that was captured; None without a state.
      clipped: () int32, how often `clip_by_output_change` shortened the update; None without a
        state of it.
      block: the block: the uses of the weight in the loss, which share one solve.
    """

    condition: jax.Array
    restricted_condition: jax.Array
    rank: jax.Array
    effective_rank: jax.Array
    effective_dimension: jax.Array
    residual: jax.Array | None
    reachable_residual: jax.Array | None
    fallbacks: jax.Array | None
    foreign: jax.Array | None
    clipped: jax.Array | None
    block: Block = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """A `LayerReport` for each weight. It is a pytree, and prints as a table.

    Attributes:
      layers: the reports, by the weight's path. Where parameters are concatenated to one weight,
        it has all their paths, joined by +. Where slices of one parameter are separate weights,
        they are numbered.
    """

    layers: dict[str, LayerReport]

    def __str__(self) -> str:
        """The report as a table, with a line for each of a stack's weights."""
        header = ("weight", "solver", "n", "d", *_NUMBERS.values())
        rows = [row for label, layer in self.layers.items() for row in _table_rows(label, layer)]
        return "\n".join(lines(header, set(header[2:]), rows))


def report(
    captures: Captures,
    updates: optax.Updates | None = None,
    learning_rate: Any = None,
    *,
    damping: Any = 0.0,
    relative_damping: Any = 0.1,
    opt_state: optax.OptState | None = None,
) -> Report:
    r"""Reports for each captured weight how well its solve can do, and how well its update did.

    For each row of a layer's output, N times the loss's gradient with respect to it is the row's
    *virtual error*: what that example's own loss asks the output to move by. N is the number of
    terms that the loss averages over. The method means to move the outputs Z = XW of a batch by
    :math:`-\mu N \bar Z`. An update ΔW moves them by XΔW. The *residual* compares the two:

    .. math:: \frac{\lVert X \Delta W + \mu N \bar Z \rVert_F}{\lVert \mu N \bar Z \rVert_F}.

    It is 0 for C-SGD with independent rows of X and λ = 0. It is 1 if nothing moves. The inputs X
    are those of this batch; the next forward pass has others, since the layers below change too.

    No ΔW can move the part of Z̄ that is orthogonal to the columns of X. With more rows than
    features, that may be most of Z̄. The `reachable_residual` leaves this part out. It needs only
    XᵀX = QΣ²Qᵀ and the gradient G = XᵀZ̄:

    .. math::
      \frac{\lVert \Sigma Q^T \Delta W + \mu N \Sigma^{-1} Q^T G \rVert_F}
           {\lVert \mu N \Sigma^{-1} Q^T G \rVert_F}.

    Singular values come from the rows if these were captured. Then those up to max(n, d) ε of the
    largest count as zero. Otherwise they come from the eigenvalues of XᵀX, and those up to the root
    of d ε count as zero. A decomposition takes several times as long as a solve, so report on a
    batch now and then only. This works under `jax.jit`.

    Args:
      captures: the last result of `cqjax.value_and_grad`.
      updates: the result of the whole optimizer, as it is added to the parameters.
      learning_rate: μ, which says how far the updates were meant to move the outputs.
      damping: λ of the solves.
      relative_damping: as in `cqjax.scale_by_consequentialism`.
      opt_state: the optimizer's state for the same parameters, which counts failed solves, foreign
        and shortened updates.

    Returns:
      A `Report`. Residuals are NaN for a weight that is solved for in diagonal blocks. They are NaN
      also if rows were not captured and the loss uses the weight elsewhere too. For a weight that
      the loss uses both ways, as XW and as DWᵀ, the numbers are of the eigenvalues aᵢ + bⱼ, of
      which aᵢ are those of XᵀX and bⱼ those of DᵀD, and residuals are NaN. Kernels of convolutions
      that are used both ways have no such eigenvalues: NaN, and a rank of -1.

    Raises:
      ValueError: a rate or a state was passed without updates; or updates, state and captures
        belong to different parameters; or the batch size is unknown.
      TypeError: `captures` are not the last result of `cqjax.value_and_grad`.

    Examples:
      >>> import cqjax, jax.numpy as jnp
      >>> def loss_fn(params, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> x, y = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([[6.0], [8.0]])
      >>> _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
      >>> for damping in (0.0, 1.0):
      ...     given = {"damping": damping, "relative_damping": 0.0}
      ...     tx = cqjax.csgd(0.5, **given, max_change=None)
      ...     updates, _ = tx.update(grads, tx.init(params), params, captures=captures)
      ...     report = cqjax.diagnostics.report(captures, updates, 0.5, **given)
      ...     layer = report.layers["w"]
      ...     print(layer.condition, layer.effective_dimension, layer.residual.round(3))
      [4.] [2.] [0.]
      [2.5] [1.3] [0.418]

    References:
      Paeedeh and Ghiasi-Shirazi (2020), Eqs. 58 to 63. Roy and Vetterli, The effective rank: a
      measure of effective dimensionality (EUSIPCO 2007). Hastie, Tibshirani and Friedman, The
      elements of statistical learning (2009), Eq. 3.50.
    """
    if updates is None and (learning_rate is not None or opt_state is not None):
        raise ValueError(
            f"{_NAME}: learning_rate= or opt_state= without updates, for which the residuals "
            "and the counts are reported; expected updates=, as they are added to the "
            "parameters"
        )
    if updates is None:
        blocks = captures.blocks if isinstance(captures, Captures) else ()
        updates = {path: g for capture in blocks for path, g in capture.gradients.items()}
    return devices.automatic(
        lambda batch, new, state: _report(
            batch, new, state, learning_rate, damping, relative_damping
        ),
        captures,
        updates,
        opt_state,
    )


def _report(
    captures: Captures,
    updates: optax.Updates,
    opt_state: optax.OptState | None,
    learning_rate: Any,
    damping: Any,
    relative_damping: Any,
) -> Report:
    """The report, of arguments that go together.

    Raises:
      ValueError: they do not.
    """
    layers = Layers(updates, captures, _NAME)
    failed, foreign, clipped = (
        {} if opt_state is None else _counts(layers, opt_state, name)
        for name in ("fallbacks", "foreign", "clipped")
    )
    if opt_state is not None and not failed:
        raise ValueError(
            f"{_NAME}: the opt_state counts no failed solves; expected that of an optimizer with "
            "cqjax.scale_by_consequentialism in it"
        )
    reports = {}
    for label, layer in layers.items():
        residual = reachable = None
        if layer.other is not None:
            both = both_sides.system(layer, Damping(damping, relative_damping))
            values, added = eigenvalues(layer, both), both.damping
            if learning_rate is not None:
                residual = reachable = jnp.full(len(values), jnp.nan, values.dtype)
        else:
            spectrum = spectrum_of(layer)
            values = spectrum.values
            mean = ridge.mean_eigenvalue(jnp.square(values), layer.rank())
            added = damping + relative_damping * mean
            if learning_rate is not None:
                residual, reachable = _residuals(layer, spectrum, learning_rate)
        reports[label] = LayerReport(
            **_of_spectrum(layer, values, jnp.broadcast_to(added, values.shape[:1])),
            residual=residual,
            reachable_residual=reachable,
            fallbacks=failed.get(layer.block.view.paths[0]),
            foreign=foreign.get(layer.block.view.paths[0]),
            clipped=clipped.get(layer.block.view.paths[0]),
            block=layer.block,
        )
    return Report(reports)


def _of_spectrum(layer: Layer, values: jax.Array, damping: jax.Array) -> dict[str, jax.Array]:
    """Both condition numbers, the rank, the effective rank and the effective dimension: (B,)."""
    inverted = layer.block.rows if layer.block.solver == "dual" else layer.size
    if layer.other is not None:
        inverted = values.shape[-1]
    values = -jnp.sort(-values, -1)
    squares, rank = jnp.square(values), jnp.sum(values > 0, -1, dtype=jnp.int32)
    least = squares[:, inverted - 1] if inverted <= values.shape[-1] else jnp.zeros_like(damping)
    last = jnp.take_along_axis(values, jnp.maximum(rank - 1, 0)[:, None], -1)[:, 0]
    shares = values / jnp.where(rank > 0, values.sum(-1), 1)[:, None]
    entropy = jax.scipy.special.entr(shares).sum(-1)
    dimension = jnp.where(squares > 0, squares / (squares + damping[:, None]), 0)
    unknown = jnp.isnan(values[:, 0])
    numbers = {
        "condition": (squares[:, 0] + damping) / (least + damping),
        "restricted_condition": jnp.square(values[:, 0] / last),
        "rank": rank,
        "effective_rank": jnp.where(rank > 0, jnp.exp(entropy), 0),
        "effective_dimension": dimension.sum(-1),
    }
    return {name: jnp.where(unknown, _UNKNOWN.get(name, jnp.nan), n) for name, n in numbers.items()}


def _residuals(layer: Layer, spectrum: Spectrum, learning_rate: Any) -> tuple[jax.Array, jax.Array]:
    """The residual and the reachable residual, (B,); NaN if it is not known."""
    block, factor = layer.block, learning_rate * layer.terms
    unknown = jnp.full(len(spectrum.values), jnp.nan, spectrum.values.dtype)
    if block.parts is not None or (spectrum.left is None and not block.exact):
        return unknown, unknown
    update = layer.change.joined
    change = spectrum.values[..., None] * _rotated(spectrum.right, update)
    if spectrum.left is None:
        gradient = _rotated(spectrum.right, layer.gradient.joined)
        values = spectrum.values[..., None]
        wanted = -factor * jnp.where(values > 0, gradient / jnp.where(values > 0, values, 1), 0)
        return unknown, _relative(change, wanted)
    targets = -factor * layer.rows().dz.astype(update.dtype)
    reached = (spectrum.values > 0)[..., None]
    wanted = jnp.where(reached, _rotated(spectrum.left, targets), 0)
    outputs = einsum("bnd,bdo->bno", inputs(layer), update, precision=HIGHEST)
    return _relative(outputs, targets), _relative(change, wanted)


def _rotated(basis: jax.Array | None, matrix: jax.Array) -> jax.Array:
    """QᵀA, (B, k, o); a basis Q of None is the identity."""
    if basis is None:
        return matrix
    return einsum("bmk,bmo->bko", basis, matrix, precision=HIGHEST)


def _relative(change: jax.Array, wanted: jax.Array) -> jax.Array:
    """‖change − wanted‖ / ‖wanted‖, (B,), without overflow; 0 if both are zero."""
    # Divided by the largest entry first, since squares of entries above 1e19 overflow in float32.
    largest = jnp.maximum(jnp.abs(wanted).max((1, 2)), jnp.abs(change).max((1, 2)))
    scale = along(jnp.where(largest > 0, largest, 1), wanted)
    difference, size = (
        jnp.sqrt(jnp.sum(jnp.square(a / scale), (1, 2))) for a in (change - wanted, wanted)
    )
    return jnp.where(difference > 0, difference / size, 0 * size)


def _counts(layers: Layers, opt_state: optax.OptState, name: str) -> dict[str, jax.Array]:
    """The events of this name of each parameter, by path, summed over the members of a chain.

    Raises:
      ValueError: the state has counts for other parameters.
    """
    found = [counts for _, counts in optax.tree.get_all_with_path(opt_state, name)]
    if not found:
        return {}
    for counts in found:
        layers.check_counts(counts)
    return dict(zip(layers.paths, jnp.sum(jnp.stack(found), 0), strict=True))


_UNKNOWN = {"rank": -1}
"""What stands for numbers that are not known, where they are integers."""

_NUMBERS = {
    "condition": "condition",
    "restricted_condition": "of XᵀX",
    "rank": "rank",
    "effective_rank": "eff. rank",
    "effective_dimension": "eff. dim.",
    "fallbacks": "fallbacks",
    "foreign": "foreign",
    "clipped": "clipped",
    "residual": "residual",
    "reachable_residual": "reachable",
}
"""The headings of the table's columns, by the fields of a `LayerReport`."""


def _table_rows(label: str, layer: LayerReport) -> Iterator[tuple[str, ...]]:
    """The table's rows for one label: one for each of its B weights."""
    block, members = layer.block, len(layer.condition)
    for i in range(members):
        name = label if members == 1 else f"{label} ({i})"
        numbers = (_cell(getattr(layer, field), i) for field in _NUMBERS)
        rows = " + ".join(str(side.rows) for side in block.sides)
        yield name, block.solver, rows, str(block.features), *numbers


def _cell(values: jax.Array | None, i: int) -> str:
    """The i-th of these numbers, as text. A single number goes in the first row."""
    numbers = [] if values is None else np.atleast_1d(values)[i : i + 1]
    known = len(numbers) > 0 and not np.isnan(numbers[0]) and numbers[0] >= 0
    return f"{numbers[0]:.3g}" if known else "-"
