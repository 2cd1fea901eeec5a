"""U = N A G with inverses A of different rows: what `experiments.kept` compares.

Exact is A = (XᵀX + λI)⁻¹, of the batch's own rows X. Others take other rows, or add something.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import cqjax

OF_OTHERS = ("another batch",)
"""Methods that take the rows of a second batch, at the same weights."""


class State(NamedTuple):
    """What a layer keeps.

    Attributes:
      inverse: the inverse, (d, d), of the last step whose turn it was.
      moment: a moving average of XᵀX, (d, d).
      weight: the sum of that average's weights, ().
    """

    inverse: jax.Array
    moment: jax.Array
    weight: jax.Array


class Batch(NamedTuple):
    """What a layer has of a step.

    Attributes:
      x: its rows X, (n, d).
      others: those of a second batch, (n, d); None where the method needs none.
      due: () bool, whether it is the turn of a kept inverse.
      first: () bool, whether it is the first step.
      key: for what is random.
    """

    x: jax.Array
    others: jax.Array | None
    due: jax.Array
    first: jax.Array
    key: jax.Array


Method = Callable[[Any, State, Batch], tuple[jax.Array, State]]
"""Takes settings, a state and a batch to an inverse and the next state."""


def inverse(moment: jax.Array, settings: Any) -> jax.Array:
    """(XᵀX + λI)⁻¹, with λ in units of the mean eigenvalue."""
    one = jnp.eye(len(moment))
    factor = jax.scipy.linalg.cho_factor(moment + settings.damping * _mean(moment) * one)
    return jax.scipy.linalg.cho_solve(factor, one)


def sketch(x: jax.Array, rows: int, key: jax.Array) -> jax.Array:
    """So many sums of rows with random signs, each row in one of them: SᵀS is XᵀX in the mean."""
    order, signs = jax.random.split(key)
    x = jax.random.rademacher(signs, (len(x), 1), x.dtype) * x
    x = jax.random.permutation(order, x)
    x = jnp.pad(x, ((0, -len(x) % rows), (0, 0)))
    return x.reshape(rows, -1, x.shape[1]).sum(1)


def with_rows(inverse: jax.Array, rows: jax.Array, weight: float) -> jax.Array:
    """(1 + w) (A⁻¹ + w SᵀS)⁻¹ of an inverse A and rows S, by Woodbury's identity."""
    image = rows @ inverse
    inner = jnp.eye(len(rows)) / weight + image @ rows.T
    solved = jax.scipy.linalg.solve(inner, image, assume_a="pos")
    return (1 + weight) * (inverse - image.T @ solved)


def _exact(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    return inverse(batch.x.T @ batch.x, settings), state


def _another(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    assert batch.others is not None
    return inverse(batch.others.T @ batch.others, settings), state


def _kept(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    new = lax.cond(batch.due, lambda: inverse(batch.x.T @ batch.x, settings), lambda: state.inverse)
    return new, state._replace(inverse=new)


def _average(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    state = _entered(settings, state, batch.x)
    return inverse(state.moment / state.weight, settings), state


def _average_before(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    new = _entered(settings, state, batch.x)
    before = jax.tree.map(lambda a, b: jnp.where(batch.first, a, b), new, state)
    return inverse(before.moment / before.weight, settings), new


def _kept_with_sketch(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    old, state = _kept(settings, state, batch)
    rows = sketch(batch.x, settings.sketch, batch.key)
    return jnp.where(batch.due, old, with_rows(old, rows, 1.0)), state


def _average_of_sketches(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    rows = sketch(batch.x, min(batch.x.shape), batch.key)
    state = _entered(settings, state, rows)
    return inverse(state.moment / state.weight, settings), state


def _own_sketch(settings: Any, state: State, batch: Batch) -> tuple[jax.Array, State]:
    n, d = batch.x.shape
    rows = sketch(batch.x, min(n, 2 * d), batch.key)
    return inverse(rows.T @ rows, settings), state


def _entered(settings: Any, state: State, x: jax.Array) -> State:
    moment = settings.decay * state.moment + (1 - settings.decay) * (x.T @ x)
    weight = settings.decay * state.weight + (1 - settings.decay)
    return state._replace(moment=moment, weight=weight)


METHODS: Mapping[str, Method] = {
    "exact": _exact,
    "another batch": _another,
    "kept": _kept,
    "kept, scaled": _kept,
    "kept, rows weighed": _kept,
    "kept + sketch": _kept_with_sketch,
    "average before": _average_before,
    "average": _average,
    "average of sketches": _average_of_sketches,
    "own sketch": _own_sketch,
}


def _mean(matrix: jax.Array) -> jax.Array:
    return jnp.trace(matrix) / len(matrix)


class MethodState(NamedTuple):
    """State of `scale_by_method`.

    Attributes:
      updates: () int32, how many there were.
      layers: each weight's own.
      measured: of each weight, what its inverse did to this batch: `measure`.
    """

    updates: jax.Array
    layers: dict[str, State]
    measured: dict[str, jax.Array]


def scale_by_method(name: str, settings: Any, plan: cqjax.Plan) -> Any:
    """Replaces each gradient G by N A G. `captures` are those of the batch, and of another or None.

    Args:
      name: The method's.
      settings: `experiments.kept.Kept`.
      plan: Of a loss whose weights have no bias, with `capture=cqjax.Rows`.
    """
    sizes = {b.name: b.features for b in plan.blocks if not b.statistic.diagonal}

    def init(params: Any) -> MethodState:
        del params
        layers = {
            label: State(jnp.eye(size), jnp.zeros((size, size)), jnp.zeros(()))
            for label, size in sizes.items()
        }
        return MethodState(jnp.zeros((), jnp.int32), layers, {x: jnp.zeros(3) for x in sizes})

    def update(
        updates: Any, state: Any, params: Any = None, *, captures: Any = None, **extra_args: Any
    ) -> tuple[Any, MethodState]:
        del params, extra_args
        own, other = captures
        layers = cqjax.Layers(updates, own, "scale_by_method")
        others = None if other is None else cqjax.Layers(updates, other, "scale_by_method")
        due, first = state.updates % settings.every == 0, state.updates == 0
        last = state.updates % settings.every == settings.every - 1
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.updates), len(layers))
        results, kept, measured = {}, {}, {}
        for (label, layer), key in zip(layers.items(), keys, strict=True):
            if label not in sizes:
                results[label] = _of_lookup(layer, settings)
                continue
            rows = layer.rows()
            x, dz = rows.x[0], rows.dz[0]
            second = None if others is None else others[label].rows().x[0]
            batch = Batch(x, second, due, first, key)
            a, kept[label] = METHODS[name](settings, state.layers[label], batch)
            if name == "kept, rows weighed":  # what adding this one row to A⁻¹ makes of its signal
                leverages = jnp.sum((x @ a) * x, 1, keepdims=True)
                dz /= jnp.where(due, 1, 1 + leverages)
            signal = layer.terms * dz
            u = a @ (x.T @ signal)
            if name == "kept, scaled":  # an exact solve has ⟨U, G⟩ ≤ N‖Z̄‖²
                u *= jnp.minimum(1, jnp.sum(signal * dz) / jnp.sum(u * layer.update.weight[0]))
            results[label] = cqjax.Matrices.parted(u[None], has_bias=False)
            before = state.measured[label]
            measured[label] = lax.cond(last, measure, lambda *_, old=before: old, x, a, u, signal)
        new = MethodState(state.updates + 1, kept, measured)
        return layers.replaced(results), new

    return optax.GradientTransformationExtraArgs(init, update)


def measure(x: jax.Array, a: jax.Array, u: jax.Array, signal: jax.Array) -> jax.Array:
    """What an exact solve bounds by one.

    Returns:
      The largest eigenvalue of the hat matrix XAXᵀ; the largest leverage of a row, on its diagonal;
      and ‖XU‖ / ‖N Z̄‖, how far the outputs move, (3,).
    """
    factor = jnp.linalg.cholesky(a)
    eigenvalues = jnp.linalg.eigvalsh(factor.T @ (x.T @ x) @ factor)
    leverages = jnp.sum((x @ a) * x, 1)
    moved = jnp.linalg.norm(x @ u) / jnp.linalg.norm(signal)
    return jnp.stack([eigenvalues[-1], leverages.max(), moved])


def _of_lookup(layer: cqjax.Layer, settings: Any) -> cqjax.Matrices:
    """A lookup's exact update, for all methods: a division by counts."""
    counts = layer.second_moment()
    damping = settings.damping * counts.sum(-1) / min(layer.block.rows, layer.block.features)
    weight = layer.terms * layer.update.weight / (counts + damping[:, None])[..., None]
    return cqjax.Matrices.parted(weight, has_bias=False)


def flops(method: str, settings: Any, n: int, d: int, o: int) -> float:
    """What a step costs for a layer of d inputs, o outputs and n rows, in operations.

    As in docs/speed.md: 2nd² for XᵀX, 2d³ for an inverse, 2d²o for its product with the gradient.
    """
    product, exact, k = 2 * d**2 * o, 2 * n * d**2 + 2 * d**3, settings.every
    m = min(n, settings.sketch)
    sums = n * d
    of_sketches = {"average of sketches": min(n, d), "own sketch": min(n, 2 * d)}
    if rows := of_sketches.get(method):
        return sums + 2 * rows * d**2 + 2 * d**3 + product
    if not method.startswith("kept"):
        return exact + product
    added = {
        "kept": 0,
        "kept, scaled": (n + d) * o,
        "kept, rows weighed": 2 * n * d**2 + 2 * n * d * o,
        # SA, SASᵀ and its factor, and these by the gradient
        "kept + sketch": sums
        + 2 * m * d**2
        + 2 * m**2 * d
        + m**3 / 3
        + 4 * m * d * o
        + 2 * m**2 * o,
    }
    return exact / k + product + added[method]
