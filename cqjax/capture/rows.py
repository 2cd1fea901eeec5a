"""Which rows of the products of a loss are examples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cqjax.program import reach, row_weights
from cqjax.program.sites import Site
from cqjax.program.steps import Position, Program
from cqjax.program.terms import Count
from cqjax.program.values import Values


class Rows:
    """The rows that count: those that reach a term of the loss whose coefficient is not zero.

    Rows of padding, and what a mask leaves out, are no examples: the update is that of the rows
    that are left. An example whose error is zero is one, and asks to stay where it is.
    """

    def __init__(self, program: Program, found: Sequence[Count], values: Values):
        """Prepares what is known of a loss by the divisors of its sums."""
        self._program = program
        self._masks = tuple(dict.fromkeys(mask for count in found for mask in count.masks))
        self._values = values

    def weights(self, sites: Iterable[Site]) -> dict[Position, jax.Array]:
        """For each product of which some rows do not count, 1 for those that do, else 0."""
        positions = {site.position: site for site in sites}
        outputs = {
            n: positions[step.position]
            for step in self._program.steps
            if step.position in positions
            for n in step.writes
        }
        live = reach.live(self._program, self._masks, self._of_masks(), set(outputs))
        weights = {}
        for number, entries in live.items():
            site = outputs[number]
            of_rows = row_weights.of_rows(site.form, entries)
            if isinstance(of_rows, jax.Array) or not of_rows.all():
                weights[site.position] = jnp.asarray(of_rows, site.z[1])
        return weights

    def _of_masks(self) -> Mapping[int, Any]:
        return self._values.of(mask.mask for mask in self._masks)

    def examples(self, number: int | None) -> Any:
        """How many examples are left, of so many."""
        for mask in self._masks:
            value = jnp.asarray(self._of_masks()[mask.mask])
            if number and value.ndim and len(value) == number:
                counts = value != 0 if mask.case is None else value == mask.case
                return counts.reshape(number, -1).any(1).sum()
        return number
