"""Looked-up rows that act on activations: the weights of experts, adapters, and conditioned scales.

An embedding hands its rows on: each is the output that the table's update is to change. But where
a row is a matrix that multiplies an activation x, or a vector that x is multiplied by entry by
entry, the layer's output is that product, and its update needs the x's of each row. To count how
often a row was read would make updates that do not know the size of x, and diverge.

The rule tells the two apart by what looked-up entries, merely moved or scaled, are multiplied by:

- A parameter, a constant, or what is made of these entry by entry (1 + s for a scale s): the rows
  are the activation of another layer.
- Something made of the rows themselves: attention's queries, a normalisation's root mean square, a
  gate. The product is no linear function of the rows. So they are an embedding.
- A factor that is the same for all entries of a row, as a mask of positions is: an embedding, too.
- Any other activation x, in a product or entry by entry: the rows act on x. What they were made of
  in an earlier trip of a loop does not make x their own: a recurrent network's state.

A matrix that is an argument of the loss, as the weights of a layer that is not trained, cannot be
told from an activation. It counts as one only where rows and x are paired: by batch axes, or by the
trips of a loop.
"""

import functools
import operator
from collections.abc import Mapping, Set
from typing import Any

from jax.extend.core import primitives

from cqjax.program.forms import Lookup
from cqjax.program.number_sets import Numbers, members
from cqjax.program.sites import Site
from cqjax.program.steps import Kind, Number, Program, Step
from cqjax.program.tags import Spread
from cqjax.program.views import View

REASON = "is looked up, and then multiplied"

_MOVES = frozenset(
    "broadcast_in_dim concatenate convert_element_type copy dynamic_slice expand_dims gather name "
    "neg pad reduce_precision reshape rev select_n sharding_constraint slice split squeeze stack "
    "stop_gradient transpose unstack".split()
)
_ELEMENTWISE = frozenset({"mul", "div"})
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})


class Operators:
    """Finds the lookups whose rows act on activations. It sees each step of a program once.

    Attributes:
      acting: these lookups' sites, by number.
    """

    def __init__(self, program: Program, parameters: int, batch: Set[int]):
        """Prepares to look at a program's steps.

        Args:
          program: the program.
          parameters: how many of its inputs are parameters.
          batch: the variables that depend on the batch.
        """
        self.acting: Numbers = 0
        self._program = program
        self._parameters = parameters
        self._batch = batch
        self._moved: dict[Number, Numbers] = {}  # sites whose rows' entries a variable has
        self._made: dict[Number, Numbers] = {}  # those that it depends on, within the trip
        self._repeated: dict[Number, tuple[int, ...]] = {}  # axes along which it is the same
        self._scales = set(program.inputs[:parameters])  # made of parameters, entry by entry

    def looked_up(self, site: int, rows: Number) -> None:
        """Takes note of a lookup."""
        self._moved[rows] = self._moved.get(rows, 0) | 1 << site
        self._made[rows] = self._made.get(rows, 0) | 1 << site

    def step(self, step: Step, tags: Mapping[Number, Any]) -> None:
        """Looks at a step, with the tags of the variables that it reads."""
        equation, name = step.equation, step.equation.primitive.name
        if step.kind is Kind.EQUATION and name == "broadcast_in_dim":
            (shape,) = (aval.shape for aval in equation.inputs)
            kept = zip(equation.params["broadcast_dimensions"], shape, strict=True)
            own = {int(axis) for axis, size in kept if size != 1}
            axes = range(len(equation.outputs[0].shape))
            self._repeated[step.writes[0]] = tuple(i for i in axes if i not in own)
        if self._is_scale(step):
            self._scales.update(step.writes)
        if not self._made:
            return
        moved = 0
        if step.kind is Kind.JOIN or (step.kind is Kind.EQUATION and name in _MOVES):
            moved = _union(self._moved, self._values(step))
        elif name in _PRODUCTS or name in _ELEMENTWISE:
            for at, variable in enumerate(step.reads[: 1 if name == "div" else 2]):
                found, partner = self._moved.get(variable, 0), step.reads[1 - at]
                if self._acted_on(step, partner, tags):
                    self.acting |= found & ~self._made.get(partner, 0)
                if name in _ELEMENTWISE:
                    moved |= found
        for i, written in enumerate(step.writes):
            sources = step.reads[:1] if step.kind is Kind.CARRY else step.sources(i)
            self._made[written] = self._made.get(written, 0) | _union(self._made, sources)
            if step.kind not in (Kind.EQUATION, Kind.JOIN):
                moved = _union(self._moved, sources)
            self._moved[written] = self._moved.get(written, 0) | moved

    def _is_scale(self, step: Step) -> bool:
        """Whether a step makes of parameters and constants alone what a layer's scale may be."""
        if step.kind is Kind.EQUATION:
            if not (step.equation.pointwise or step.equation.primitive.name in _MOVES):
                return False
        elif step.kind not in (Kind.ENTER, Kind.SLICE):
            return False
        others = [number for number in step.reads if number not in self._scales]
        fixed = all(n not in self._trained and n not in self._batch for n in others)
        return len(others) < len(step.reads) and fixed

    def _values(self, step: Step) -> tuple[Number, ...]:
        """What a step's results may be made of, without what only says which."""
        if step.kind is Kind.JOIN or step.equation.primitive is primitives.select_n_p:
            return step.reads[1:]
        name = step.equation.primitive.name
        return step.reads[:1] if name in ("gather", "dynamic_slice") else step.reads

    def _acted_on(self, step: Step, partner: Number, tags: Mapping[Number, Any]) -> bool:
        """Whether looked-up rows that multiply the partner act on it."""
        if isinstance(tags.get(partner), View | Spread) or partner in self._scales:
            return False
        equation = step.equation
        if equation.primitive.name in _ELEMENTWISE:
            shape = equation.inputs[step.reads.index(partner)].shape
            if shape[-1:] in ((), (1,)) or len(shape) - 1 in self._repeated.get(partner, ()):
                return False
            return partner in self._trained or partner in self._batch
        paired = True
        if equation.primitive is primitives.dot_general_p:
            _, (batching, _) = equation.params["dimension_numbers"]
            paired = bool(batching) or (bool(step.loops) and partner in self._of_trips)
        return partner in self._trained or (paired and partner in self._batch)

    @functools.cached_property
    def _of_trips(self) -> Set[int]:
        """The variables that each trip of a loop has its own of."""
        own = [s for s in self._program.steps if s.kind in (Kind.SLICE, Kind.CARRY)]
        return self._program.dependent(n for step in own for n in step.writes)

    @functools.cached_property
    def _trained(self) -> Set[int]:
        """The variables that depend on parameters."""
        return self._program.dependent(self._program.inputs[: self._parameters])


def _union(found: Mapping[Number, Numbers], variables: tuple[Number, ...]) -> Numbers:
    return functools.reduce(operator.or_, (found.get(n, 0) for n in variables), 0)


def parted(sites: list[Site], acting: Numbers) -> tuple[list[Site], list[Site]]:
    """The sites, without the lookups of tables whose rows act on something; and these lookups."""
    tables = {sites[i].view for i in members(acting)}
    parts: tuple[list[Site], list[Site]] = [], []
    for site in sites:
        parts[isinstance(site.form, Lookup) and site.view in tables].append(site)
    return parts
