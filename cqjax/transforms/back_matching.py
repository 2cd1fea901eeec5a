"""Back-matching's layer-wise rates (seed 004, Algorithm 1), for chains of layers and any graph."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cqjax.capture.captures import Captures, path_of
from cqjax.capture.layers import Layers, Unit
from cqjax.capture.plan import Plan
from cqjax.capture.signals import Signals, signals
from cqjax.linalg.gram import accumulator
from cqjax.transforms import chain
from cqjax.transforms.chain import ChainLayer
from cqjax.transforms.incoming import finite, is_masked

PyTree = Any
ValueFn = Callable[[PyTree], jax.Array]
Factors = Literal["chain", "measured"]


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

    s = rows / N is at how many positions of an example the weight acts whose outputs receive a
    gradient, counted after the pooling that follows: by windows, or before the next layer by a
    maximum, a mean or a choice among the positions (s = 1 for a fully connected layer). c is how
    many positions of its input there are for each of those. Activations and pooling leave m.

    Where layers branch, m is measured: with `value_fn`, :math:`1/m = \langle \delta b, \delta' b
    \rangle / \lVert \delta b \rVert^2` from the gradient δb with respect to a layer's output and
    the matched signal δ'b (`back_matching_value_and_grad`), for each weight of a stack that is
    scanned over on its own (its normalisations, and the members of an ensemble, share one). s
    counts all positions then, pooled or not, as the exact propagation does (Eq. 23). So on a chain
    without pooling the two agree where Algorithm 1's assumptions hold: weights whose rows have
    equal norms and whose outputs vary independently, layer inputs with :math:`\mathrm{E}[a a^T] =
    I`.

    Args:
      plan: `cqjax.plan(loss_fn)(params, ...)`, the captures of `cqjax.value_and_grad`, or the
        layers from the bottom to the top.
      params: the parameters.
      value_fn: the loss of a batch, as a function of the parameters alone; measures m.

    Returns:
      A tree like `params`, of scalars; of arrays of the parameter's shape where its parts have
      different rates. Measured ones may be negative, or 0 where a layer receives no gradient.
      Parameters that were skipped, or belong to no layer that is known, have the
      rate 1.

    Raises:
      ValueError: the layers form no chain and there is no `value_fn`; the batch size is unknown;
        a parameter is missing; the plan is of another loss.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     return jnp.mean((jax.nn.relu(x @ params["w1"]) @ params["w2"]) ** 2)
      >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.full((8, 2), 0.25)}
      >>> plan = cqjax.plan(loss_fn)(params, jnp.ones((5, 3)))
      >>> rates = cqjax.back_matching_rates(plan, params)
      >>> print(rates["w1"], rates["w2"])  # ||w2||² = 1, 8 inputs
      8.0 1.0

    References:
      Zhang, Chen and Liu, Train feedforward neural network with layer-wise adaptive rate via
      approximating back-matching propagation (seed 004), Algorithm 1, Eqs. 34 to 37, supplement.
    """
    if value_fn is None:
        return _like(params, _chain_rates(plan, params))
    if not isinstance(plan, Plan | Captures):
        raise ValueError(
            f"plan is a {type(plan).__name__}: value_fn measures the layers of a loss; expected "
            "cqjax.plan(loss_fn)(params, ...), not a description of them"
        )
    inverse = _measured(plan.layers, signals(value_fn, params, plan.layers.flow))
    return _like(params, _rates(plan, inverse, measured=True))


class ScaleByBackMatchingState(NamedTuple):
    """State of `scale_by_back_matching`.

    Attributes:
      count: () int32, the number of updates so far.
      average: moving averages of the measured 1/m, for each layer with parameters: (), or (L,) for
        L layers that are scanned over. Empty for chains, as is the next.
      weight: what the averages are divided by, to make up for their start from zero; the same
        shapes.
      ignored: () int32, how many measurements were left out: not positive, or not finite.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]
    average: tuple[jax.Array, ...]
    weight: tuple[jax.Array, ...]
    ignored: jax.Array


def scale_by_back_matching(
    plan: Plan | Sequence[ChainLayer] | None = None,
    *,
    factors: Factors = "chain",
    refresh_every: int = 100,
    decay: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each layer the rate 1/(m s) that approximates back-matching propagation.

    Each update of a layer is multiplied by its rate: see `back_matching_rates`. Entries of the
    result that are not finite become zero. The paper found
    best to decay the weights before, and to apply momentum after it: `back_matching_sgd`.

    Args:
      plan: `cqjax.plan(loss_fn)(params, ...)`, for which shapes of arguments are enough; or the
        layers of a chain from the bottom to the top. Without it, `update` takes the keyword
        argument `captures`.
      factors: "chain" computes m from the weights, at each update, where each layer feeds one
        other. "measured" measures it, for any graph: `update` then takes the keyword argument
        `value_fn`, the loss of the batch as a function of the parameters alone. It is called, for
        two backward passes, in one of `refresh_every` updates.
      refresh_every: updates from one measurement to the next.
      decay: of the moving average of measurements of 1/m. One that is not positive and finite is
        left out, and counted. Before a layer's first one its m is 1.

    Returns:
      A transformation whose `update` takes `params`.

    Raises:
      ValueError: an argument is out of its range; in `update`, something is missing, or as
        `back_matching_rates`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp, optax
      >>> def loss_fn(params, x):
      ...     hidden = jax.nn.relu(x @ params["w1"])
      ...     return jnp.mean(((x + hidden) @ params["w2"]) ** 2)
      >>> params = {"w1": jnp.eye(3), "w2": jnp.full((3, 1), 0.5)}
      >>> x = jnp.ones((5, 3))
      >>> plan = cqjax.plan(loss_fn)(params, x)
      >>> tx = cqjax.scale_by_back_matching(plan, factors="measured")
      >>> state, grads = tx.init(params), jax.grad(loss_fn)(params, x)
      >>> updates, state = tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, x))
      >>> print(updates["w1"][0] / grads["w1"][0], updates["w2"][0] / grads["w2"][0])
      [4. 4. 4.] [1.]

    References:
      Seed 004, Algorithm 1 and section 3.2.
    """
    if factors not in ("chain", "measured"):
        raise ValueError(f"factors={factors!r}: expected 'chain' or 'measured'")
    if isinstance(refresh_every, int | float) and (refresh_every < 1 or refresh_every % 1):
        raise ValueError(f"refresh_every={refresh_every}: expected a whole number, one or more")
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: expected a number from 0 to below 1")
    if factors == "measured" and not isinstance(plan, Plan):
        raise ValueError(
            f'plan is a {type(plan).__name__}: factors="measured" needs plan=, made by '
            "cqjax.plan(loss_fn)(params, ...)"
        )
    measured = plan if factors == "measured" and isinstance(plan, Plan) else None

    def init(params: optax.Params) -> ScaleByBackMatchingState:
        units = () if measured is None else measured.layers.units
        dtype = accumulator(jnp.result_type(jnp.float32, *jax.tree.leaves(params)))

        def zeros() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(_stacked(unit), dtype) for unit in units)

        return ScaleByBackMatchingState(
            jnp.zeros((), jnp.int32), zeros(), zeros(), jnp.zeros((), jnp.int32)
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        captures: Captures | None = None,
        value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        source = plan if plan is not None else captures
        if source is None:
            raise ValueError(
                "scale_by_back_matching: no plan. Pass plan=cqjax.plan(loss_fn)(params, ...) to "
                "it, or captures= to update"
            )
        if params is None:
            raise ValueError(
                "scale_by_back_matching: no parameters; call update(grads, state, params)"
            )
        if measured is None:
            rates = _chain_rates(source, params)
        else:
            state = _refreshed(state, measured.layers, params, value_fn, refresh_every, decay)
            inverse = [
                jnp.where(weight > 0, average / jnp.where(weight > 0, weight, 1), 1)
                for average, weight in zip(state.average, state.weight, strict=True)
            ]
            rates = _rates(measured, inverse, measured=True)
        updates = jax.tree.map(
            lambda rate, u: (rate * u).astype(u.dtype), _like(params, rates), updates
        )
        return finite(updates), state._replace(count=jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def _refreshed(
    state: ScaleByBackMatchingState,
    layers: Layers,
    params: PyTree,
    value_fn: ValueFn | None,
    refresh_every: int,
    decay: float,
) -> ScaleByBackMatchingState:
    """The state with averages that a measurement has gone into, if one is due.

    Raises:
      ValueError: there is no loss to measure with, or parameters are masked.
    """
    if value_fn is None:
        raise ValueError(
            'scale_by_back_matching(factors="measured"): no loss to measure with. Call '
            "update(grads, state, params, value_fn=lambda params: loss_fn(params, ...))"
        )
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            'scale_by_back_matching(factors="measured"): some parameters are masked, and the loss '
            "needs all. Place it outside of the mask; skip= of cqjax.plan leaves some alone"
        )

    def measure() -> ScaleByBackMatchingState:
        average, weight, ignored = [], [], state.ignored
        measured = _measured(layers, signals(value_fn, params, layers.flow))
        for new, a, w in zip(measured, state.average, state.weight, strict=True):
            good = jnp.isfinite(new) & (new > 0)
            average.append(jnp.where(good, decay * a + (1 - decay) * new, a).astype(a.dtype))
            weight.append(jnp.where(good, decay * w + (1 - decay), w).astype(w.dtype))
            ignored = ignored + jnp.sum(~good, dtype=jnp.int32)
        return state._replace(average=tuple(average), weight=tuple(weight), ignored=ignored)

    return lax.cond(state.count % refresh_every == 0, measure, lambda: state)


def _measured(layers: Layers, measured: Sequence[Signals]) -> list[jax.Array]:
    """⟨δb, δ'b⟩ / ‖δb‖² of each unit: (), or (L,) for weights that are scanned over."""
    inverse = []
    for unit in layers.units:
        stacked = [] if unit.block is None else [level for level, _ in unit.block.view.loops]
        matching, received = jnp.zeros(()), jnp.zeros(())
        for gradient, matched in (measured[i] for i in unit.nodes):
            dtype = accumulator(gradient.dtype)
            summed = [axis for axis in range(gradient.ndim) if axis not in stacked]
            gradient = gradient.astype(dtype)
            matching += jnp.sum(gradient * matched.astype(dtype), summed)
            received += jnp.sum(jnp.square(gradient), summed)
        inverse.append(jnp.where(received > 0, matching / jnp.where(received > 0, received, 1), 0))
    return inverse


def _chain_rates(
    source: Plan | Captures | Sequence[ChainLayer], params: PyTree
) -> dict[str, jax.Array]:
    """1/(m s) of the layers of a chain."""
    if isinstance(source, Plan | Captures):
        inverse = chain.inverse_factors(source.layers, _arrays(params))
        return _rates(source, inverse, measured=False)
    return chain.rates(source, _arrays(params))


def _rates(
    source: Plan | Captures, inverse: Sequence[jax.Array], *, measured: bool
) -> dict[str, jax.Array]:
    """1/(m s) of each parameter that belongs to a unit, from the units' 1/m."""
    units, batch_size = source.layers.units, _batch_size(source)
    owners = [path for unit in units for path in unit.paths]
    rates: dict[str, Any] = {}
    covered: dict[str, jax.Array] = {}
    for unit, factor in zip(units, inverse, strict=True):
        block = unit.block
        terms = batch_size if block is None else block.terms(batch_size, source.examples)
        rate = factor * terms / (unit.rows if measured else unit.pooled)
        if block is None or (
            block.view.whole and not factor.ndim and all(owners.count(p) == 1 for p in unit.paths)
        ):
            rates |= dict.fromkeys(unit.paths, rate)
            continue
        each = jnp.repeat(rate.reshape(-1), block.batch // factor.size)
        for total, values in ((rates, each), (covered, jnp.ones_like(each))):
            weight = jnp.tile(values[:, None, None], (1, block.features, block.outputs))
            bias = None if block.bias is None else weight[:, 0]
            for path, array in block.scatter(weight, bias).items():
                total[path] = total[path] + array if path in total else array
    return rates | {path: jnp.where(mask > 0, rates[path], 1) for path, mask in covered.items()}


def _stacked(unit: Unit) -> tuple[int, ...]:
    """Shape of a unit's 1/m."""
    loops = () if unit.block is None else unit.block.view.loops
    return tuple(length for _, length in loops)


def _batch_size(source: Plan | Captures) -> Any:
    if source.batch_size is None:
        raise ValueError(
            "the batch size could not be inferred, since the loss's arguments do not share one "
            "leading dimension. Pass batch_size= to cqjax.plan or cqjax.value_and_grad: the number "
            'of terms that the loss averages over (or loss_reduction="sum")'
        )
    return source.batch_size


def _arrays(params: PyTree) -> dict[str, jax.Array]:
    """Parameters by path."""
    return {path_of(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}


def _like(params: PyTree, rates: Mapping[str, jax.Array]) -> PyTree:
    """A tree like the parameters', of their rates; 1 where there is none."""
    one = jnp.ones(())
    return jax.tree.map_with_path(lambda keys, _: rates.get(path_of(keys), one), params)
