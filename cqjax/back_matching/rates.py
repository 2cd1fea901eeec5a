"""Back-matching's layer-wise rates: for chains of layers by Algorithm 1, for any graph measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cqjax.back_matching import chain
from cqjax.back_matching.chain import ChainLayer
from cqjax.back_matching.signals import Signals, signals
from cqjax.back_matching.units import Unit, back_matching_units
from cqjax.capture.block import Block
from cqjax.capture.captures import Captures
from cqjax.capture.plan import Plan
from cqjax.linalg.gram import accumulator
from cqjax.program.paths import by_path

PyTree = Any
ValueFn = Callable[[PyTree], jax.Array]


def back_matching_rates(
    plan: Plan | Captures | Sequence[ChainLayer],
    params: PyTree,
    *,
    value_fn: ValueFn | None = None,
) -> PyTree:
    r"""The rate 1/(m s) of each parameter: how many times its gradient back-matching takes.

    Algorithm 1 goes through a chain of layers from the top down. m = 1 at the output, and

    - passing below a layer with a weight, :math:`m \leftarrow m \lVert W \rVert_F^2 / (d c)`, where
      d is the number of its input features or channels;
    - passing below a normalisation, :math:`m \leftarrow m\, \overline{\gamma^2} / (\lVert W
      \rVert_F^2 / o)`, with the weight of the layer that it follows, that layer's o outputs, and
      the learned scale γ, if there is one.

    s = rows / N is the number of positions of an example at which the weight acts and whose outputs
    receive a gradient; s = 1 for a fully connected layer. Positions are counted after the pooling
    that follows. Pooling is done by windows, or before the next layer by a maximum, a mean or a
    choice among the positions. c is the number of positions of the layer's input for each of those.
    Activations and pooling leave m.

    Where layers branch, m is measured, with `value_fn`. Let δb be the gradient with respect to a
    layer's output, and δ'b the matched signal (`back_matching_value_and_grad`). Then :math:`1/m =
    \langle \delta b, \delta' b \rangle / \lVert \delta b \rVert^2`. Each weight of a stack that is
    scanned over has its own; the stack's normalisations share one, and so do the members of an
    ensemble. Here s counts all positions, pooled or not, as the exact propagation does (Eq. 23).

    On a chain without pooling the two agree where the assumptions of Algorithm 1 hold: the rows of
    a weight have equal norms, its outputs vary independently, and layer inputs have
    :math:`\mathrm{E}[a a^T] = I`.

    Args:
      plan: `cqjax.plan(loss_fn)(params, ...)`, the captures of `cqjax.value_and_grad`, or the
        layers from the bottom to the top.
      params: the parameters.
      value_fn: the loss of a batch, as a function of the parameters alone; measures m.

    Returns:
      A tree like `params`, of scalars; of arrays of the parameter's shape where its parts have
      different rates. Measured ones may be negative, or 0 where a layer receives no gradient.
      Parameters that were skipped, or belong to no layer that is known, have the rate 1.

    Raises:
      ValueError: the layers form no chain and there is no `value_fn`; the batch size is unknown;
        a parameter is missing; the plan is of another loss.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     z = jax.nn.relu(x @ params["w1"]) @ params["w2"]
      ...     return jnp.mean(jnp.sum(z**2, -1))
      >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.full((8, 2), 0.25)}
      >>> plan = cqjax.plan(loss_fn)(params, jnp.ones((5, 3)))
      >>> rates = cqjax.back_matching_rates(plan, params)
      >>> print(rates["w1"], rates["w2"])  # ||w2||² = 1, 8 inputs
      8.0 1.0

    References:
      Zhang, Chen and Liu, Train feedforward neural network with layer-wise adaptive rate via
      approximating back-matching propagation, Algorithm 1, Eqs. 34 to 37, supplement.
    """
    if value_fn is None:
        return like(params, chain_rates(plan, params))
    if not isinstance(plan, Plan | Captures):
        raise ValueError(
            f"plan is a {type(plan).__name__}: value_fn measures the layers of a loss; expected "
            "cqjax.plan(loss_fn)(params, ...), not a description of them"
        )
    of_layers = signals(value_fn, params, plan.flow)
    inverse = [measured_factor(unit, of_layers) for unit in back_matching_units(plan)]
    return like(params, unit_rates(plan, inverse, measured=True))


def measured_factor(unit: Unit, of_layers: Sequence[Signals]) -> jax.Array:
    """1/m = ⟨δb, δ'b⟩ / ‖δb‖² of a unit: (), or (L,) for L weights that are scanned over."""
    stacked = [] if unit.block is None else [level for level, _ in unit.block.view.loops]
    matching, received = jnp.zeros(()), jnp.zeros(())
    for gradient, matched in (of_layers[i] for i in unit.nodes):
        dtype = accumulator(gradient.dtype)
        summed = [axis for axis in range(gradient.ndim) if axis not in stacked]
        gradient = gradient.astype(dtype)
        matching += jnp.sum(gradient * matched.astype(dtype), summed)
        received += jnp.sum(jnp.square(gradient), summed)
    return jnp.where(received > 0, matching / jnp.where(received > 0, received, 1), 0)


def chain_rates(
    source: Plan | Captures | Sequence[ChainLayer], params: PyTree
) -> dict[str, jax.Array]:
    """1/(m s) of the layers of a chain.

    Raises:
      ValueError: as for `back_matching_rates`.
    """
    arrays = by_path(params)
    if isinstance(source, Plan | Captures):
        inverse = chain.unit_factors(source.flow, back_matching_units(source), arrays)
        return unit_rates(source, inverse, measured=False)
    return chain.rates(source, arrays)


def unit_rates(
    source: Plan | Captures, inverse: Sequence[jax.Array], *, measured: bool
) -> dict[str, jax.Array]:
    """1/(m s) of each parameter that belongs to a unit, from the units' 1/m.

    Algorithm 1 counts positions after pooling. The exact propagation counts all positions that an
    input reaches (Eq. 22), so measured factors go with all. Mixing the two would give the last
    convolution before a global mean 64 times the rate of its neighbours in a residual stage.

    Raises:
      ValueError: the batch size is unknown.
    """
    if source.batch_size is None:
        why = "the loss computes it of its arguments"
        if source.unknown:
            why = (
                "the loss is no sum or mean over its terms, and its arguments do not share "
                f"one leading dimension ({source.unknown})"
            )
        raise ValueError(
            f"the batch size could not be inferred: {why}. Pass batch_size= to cqjax.plan or "
            "cqjax.value_and_grad: the number of terms that the loss averages over (or "
            'loss_reduction="sum")'
        )
    own_units = back_matching_units(source)
    owners = [path for unit in own_units for path in unit.paths]
    rates: dict[str, Any] = {}
    covered: dict[str, Any] = {}
    for unit, factor in zip(own_units, inverse, strict=True):
        block, size = unit.block, source.batch_size
        terms = size if block is None else block.terms(size, source.examples)
        rate = factor * terms / (unit.rows if measured else unit.pooled)
        if block is None or (
            block.view.whole
            and not (block.view.scaled or factor.ndim)
            and all(owners.count(p) == 1 for p in unit.paths)
        ):
            rates |= dict.fromkeys(unit.paths, rate)
            continue
        # Parts of a parameter have rates of their own: an array of its shape. A parameter that is
        # multiplied by c has 1 / c² times the rate of the product's weight.
        each = jnp.repeat(rate.reshape(-1), block.batch // factor.size)
        per_weight, one = _scattered(block, each), _scattered(block, jnp.ones_like(each))
        for path, scale in one.items():
            rates[path] = rates.get(path, 0) + per_weight[path] * scale
            covered[path] = covered.get(path, False) | (scale != 0)
    return rates | {path: jnp.where(mask, rates[path], 1) for path, mask in covered.items()}


def _scattered(block: Block, values: jax.Array) -> dict[str, jax.Array]:
    """The change of the parameters that adds a number, one of B, to all entries of a weight."""
    weight = jnp.tile(values[:, None, None], (1, block.features, block.outputs))
    # A bias has none of the parts that its weight's features may be in.
    bias = None if block.bias is None else weight[:: block.parts or 1, 0]
    return block.scatter(weight, bias)


def like(params: PyTree, rates: Mapping[str, jax.Array]) -> PyTree:
    """A tree like the parameters', of their rates; 1 where there is none."""
    one = jnp.ones(())
    found = [rates.get(path, one) for path in by_path(params)]
    return jax.tree.unflatten(jax.tree.structure(params), found)
