"""The update of all layers at once: each by its own kind of solve, and inverses in common."""

import functools
import operator
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from cqjax.linalg import devices, joined, ridge
from cqjax.solves import both_sides, kept, solve
from cqjax.solves.kept import Moment
from cqjax.solves.layer import Layer
from cqjax.solves.layers import Layers
from cqjax.solves.matrices import Matrices
from cqjax.solves.solve import Damping


def preconditioned(
    layers: Layers,
    damping: Damping,
    moments: Mapping[str, Moment],
    inverses: Mapping[str, jax.Array],
    before: Sequence[Mapping[str, jax.Array]],
    spread_over: NamedSharding | None,
) -> tuple[optax.Updates, jax.Array]:
    """N (XᵀX + λI)⁻¹ H for every layer, and how many solves failed at each leaf, (P,).

    What failed `before`, (B,) bool by label, is counted with them: once for each update.
    """

    def by_rows(layer: Layer) -> bool:
        return layer.block.solver == "dual" and layer.label not in {**moments, **inverses}

    def solved(changed: bool) -> tuple[optax.Updates, jax.Array]:
        results: dict[str, Matrices] = {}
        waiting: dict[str, solve.Solve | solve.SolveOfMade] = {}
        made: dict[str, jax.Array] = {}
        sums: dict[str, jax.Array] = {}
        failures: dict[str, jax.Array] = {}
        both = {label: layer for label, layer in layers.items() if layer.other is not None}
        of_both = both_sides.solved(both, damping)
        results |= of_both.results
        failures |= of_both.failures
        for label, layer in layers.items():
            if label in both:
                continue
            if label in inverses:
                results[label], sums[label] = solve.preconditioned(layer, damping, inverses[label])
            elif by_rows(layer):
                exact = layer.block.exact and not changed
                dual = solve.dual if exact else solve.dual_of_changed
                waiting[label] = dual(layer, damping)
            else:
                xx = kept.second_moment(moments, layer)
                if layer.block.statistic.diagonal:
                    results[label], failures[label] = solve.diagonal(layer, damping, xx)
                else:
                    kind = solve.nearest_of_made if layer.made else solve.primal
                    waiting[label] = kind(layer, damping, xx, label in moments)
        # All matrices of a size are inverted together, and each layer's product with its inverse
        # comes when its signal is there. Whether an inverse failed is known before the backward
        # pass, so no layer waits for the others. With one stacked solve after it, XLA on a CPU
        # wrote all updates first and read them back from outside the cache: a step of 8 x 1600 took
        # 1.33 of SGD's, and takes 1.03 now.
        # Layers that read the same inputs, as queries, keys and values do, have one inverse.
        keys = {label: label if changed else _inputs(layers[label], moments) for label in waiting}
        systems: dict[Hashable, ridge.System] = {}
        for label, each in waiting.items():
            systems.setdefault(keys[label], each.system)
        found = dict(zip(systems, ridge.inverses(list(systems.values()), spread_over), strict=True))
        repaired: dict[str, jax.Array] = {}
        for label, each in waiting.items():
            inverse = found[keys[label]]
            result, sums[label] = each.update(inverse)
            if isinstance(result, Matrices):
                results[label] = result
            else:
                made |= result
            repaired[label] = inverse.repaired
        attempts = {
            label: (total, repaired.get(label, jnp.zeros(total.shape, bool)))
            for label, total in sums.items()
        }
        events = joined.calls(_lost_or_repaired, attempts)
        for label, event in joined.split(events).items():
            more = [failed[label] for failed in before if label in failed]
            overflows = layers[label].overflows(results[label]) if label in results else False
            if more or overflows is not False:  # one event for all reasons, in place of `events`
                failures[label] = functools.reduce(operator.or_, more, event | overflows)
        new = layers.replaced(results, of_both.others | made)
        counts = layers.counted(events, without=failures) + layers.counts(failures)
        return new, counts + layers.lost()

    # The dual starts from the rows, and so from the gradient. Within one trace it is known without
    # computing anything that the updates still are the gradient. Across a `jit` they are compared.
    exact = [layer for layer in layers.values() if by_rows(layer) and layer.block.exact]
    if all(layer.is_gradient for layer in exact):
        return solved(False)
    changed = devices.anywhere(jnp.stack([layer.differs() for layer in exact]).any())
    return lax.cond(changed, lambda: solved(True), lambda: solved(False))


def _inputs(layer: Layer, moments: Mapping[str, Moment]) -> Hashable:
    """What the matrix that is inverted for a layer is made of: a label, if of nothing shared."""
    block = layer.block
    averaged, made = layer.label in moments, block.grouped or layer.made
    if averaged or made or layer.capture.number is not None:
        return layer.label
    every = tuple(site.rows_of for site in block.sites)
    how = block.solver, block.statistic, block.parts, block.precision
    return every, how, block.shared, layer.joint_bias


def _lost_or_repaired(attempt: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Whether a solution's sum is not finite, or its inverse took a second attempt."""
    total, repaired = attempt
    return ~jnp.isfinite(total) | repaired
