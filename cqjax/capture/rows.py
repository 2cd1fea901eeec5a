"""Which rows of the products of a loss are examples."""

import functools
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp

from cqjax.linalg import devices
from cqjax.program import reach, row_weights
from cqjax.program.divisors import Count
from cqjax.program.sites import Site
from cqjax.program.steps import Position, Program
from cqjax.program.values import Values


class Rows:
    """The rows that count: those that reach a term of the loss whose coefficient is not zero.

    Rows of padding, and what a mask leaves out, are no examples: the update is that of the rows
    that are left. An example whose error is zero is one, and asks to stay where it is.
    """

    def __init__(
        self,
        program: Program,
        found: Sequence[Count],
        values: Values,
        twins: Mapping[Position, Position],
    ):
        """Prepares what is known of a loss by the divisors of its sums, and its `twins`."""
        self.twins = twins
        self._program = program
        self._masks = tuple(dict.fromkeys(mask for count in found for mask in count.masks))
        self._values = values

    def weights(self, sites: Sequence[Site]) -> dict[Position, jax.Array]:
        """For each product of which some rows do not count, 1 for those that do, else 0."""
        outputs: dict[Position, list[int]] = {site.position: [] for site in sites}
        for step in self._program.steps:
            first = self.twins.get(step.position, step.position)
            if first in outputs:
                outputs[first] += step.writes
        wanted = {number for numbers in outputs.values() for number in numbers}
        return devices.automatic(
            lambda masks: self._weights(sites, outputs, masks, wanted), self._of_masks()
        )

    def _weights(
        self,
        sites: Sequence[Site],
        outputs: Mapping[Position, Sequence[int]],
        masks: Mapping[int, Any],
        wanted: Set[int],
    ) -> dict[Position, jax.Array]:
        live = reach.live(self._program, self._masks, masks, wanted)
        weights = {}
        for site in sites:
            numbers = outputs[site.position]
            if not live.keys() >= set(numbers):
                continue  # of one evaluation all rows count
            rows = [row_weights.of_rows(site.form, live[number]) for number in numbers]
            of_rows = functools.reduce(operator.or_, rows)
            if isinstance(of_rows, jax.Array) or not of_rows.all():
                weights[site.position] = jnp.asarray(of_rows, site.z.dtype)
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
