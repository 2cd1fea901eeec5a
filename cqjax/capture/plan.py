"""From a walk's record to a plan: which parameters are covered, by which solves, at what cost."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

import jax

from cqjax.capture.block import Block, Cost
from cqjax.capture.coverage import make_blocks
from cqjax.capture.flow import Flow
from cqjax.capture.layers import Layers, make_layers
from cqjax.capture.table import table
from cqjax.capture.walk import Walk

Selector = str | type
"""A pattern for parameters' paths, as in `fnmatch`, or a class of Flax layers."""

Signal = Literal["gradient", "matched"]

Status = Literal["covered", "partly covered", "uncovered", "skipped"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What the plan says of one parameter.

    Attributes:
      path: its place in the parameters, keys joined by "/".
      shape: its shape.
      layer: class of the Flax layer that owns it; empty for other code.
      status: "covered": its updates come from a solve; "partly covered": so they do, and the loss
        uses the parameter elsewhere too; "uncovered": it keeps its gradient; "skipped": so it
        does, as `only=` or `skip=` asked.
      notes: what there is to know: its other uses, or why it is not covered.
    """

    path: str
    shape: tuple[int, ...]
    layer: str
    status: Status
    notes: tuple[str, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What cqjax captures of a loss, and what its solves cost. Prints as a table.

    Attributes:
      parameters: all parameters, in the order of their tree.
      blocks: one for each weight that is solved for.
      batch_size: N, the number of terms that the loss averages over; None where unknown.
      examples: how many examples the batch has; None where that is not plain.
      layers: which layer feeds which, and which parameters are theirs.
      unmatched: paths of parameters of layers that back-matching does not know: neither weights
        of a product, nor of a normalisation, nor merely added. The signal passes there as in
        backpropagation.
      signal: what is propagated from layer to layer.
    """

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    batch_size: int | jax.Array | None
    examples: int | None
    layers: Layers
    unmatched: tuple[str, ...]
    signal: Signal

    def __str__(self) -> str:
        """The plan as a table."""
        return table(self)

    def uncovered(self) -> dict[str, tuple[str, ...]]:
        """Why, for each parameter that keeps its gradient without having been asked to."""
        return {p.path: p.notes for p in self.parameters if p.status == "uncovered"}


def make_plan(
    walk: Walk,
    flow: Flow,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, frozenset[type]],
    *,
    only: Sequence[Selector] | None,
    skip: Sequence[Selector],
    cost: Cost,
    batch_size: int | jax.Array | None,
    examples: int | None,
    signal: Signal,
) -> Plan:
    """Groups the sites of a walk into blocks and says what becomes of each parameter.

    Args:
      walk: the walk over the loss.
      flow: which layer feeds which.
      shapes: the parameters' shapes, by path.
      layers: the classes of the Flax layers that own them.
      only: if given, selects the parameters to capture.
      skip: selects parameters to leave alone.
      cost: how the weights may be solved for.
      batch_size: N.
      examples: how many there are.
      signal: what is propagated.

    Raises:
      ValueError: a selector matches no parameter, or a layer's class is ambiguous or unknown.
    """
    if any(isinstance(selector, type) for selector in (*(only or ()), *skip)):
        _check_layers_known(walk, layers)
    taken = set(shapes) if only is None else _select(only, "only", shapes, layers)
    taken -= _select(skip, "skip", shapes, layers)
    blocks, uses = make_blocks(walk, taken, shapes, cost)
    solved = {path for block in blocks for path in block.paths}
    parameters = []
    for path, shape in shapes.items():
        notes = tuple(uses[path]) or ("is not reached by the loss",)
        status: Status = "partly covered" if uses[path] else "covered"
        if path not in taken:
            status = "skipped"
        elif path not in solved:
            status = "uncovered"
        classes = " or ".join(sorted(c.__name__ for c in layers[path]))
        if status in ("covered", "skipped"):
            notes = _not_per_example(path, blocks, batch_size, examples)
        parameters.append(Parameter(path, shape, classes, status, notes))
    known = {path for node in flow.nodes for path in node.paths}
    unmatched = tuple(
        path
        for path in shapes
        if path not in known and any(use.primitive != "add" for use in walk.uses[path])
    )
    made = make_layers(flow, blocks, taken, shapes)
    return Plan(tuple(parameters), blocks, batch_size, examples, made, unmatched, signal)


def _not_per_example(
    path: str,
    blocks: Sequence[Block],
    batch_size: int | jax.Array | None,
    examples: int | None,
) -> tuple[str, ...]:
    """What there is to know where a weight's rows are not, or cannot be, the examples' own."""
    for block in blocks:
        if path not in block.view.paths:
            continue
        if block.shared and examples is not None:
            return ("all examples share its rows",)
        if isinstance(batch_size, int) and batch_size >= 1 and block.rows % batch_size:
            return (
                f"its {block.rows} rows are no multiple of the batch size {batch_size}: if the "
                f"examples share them, its updates are up to {batch_size} times too large, and it "
                "should be skipped",
            )
    return ()


def _check_layers_known(walk: Walk, layers: Mapping[str, frozenset[type]]) -> None:
    """Refuses to select by class where a function around a layer may have hidden it.

    Raises:
      ValueError: names the parameter.
    """
    for site in walk.sites:
        for path in site.view.paths:
            if len(site.position) > 1 and not layers[path]:
                raise ValueError(
                    f"the layer of {path} is unknown: a function around it (jax.jit, "
                    "jax.checkpoint, ...) is not Flax's, or was traced before; select parameters "
                    "by their paths instead"
                )


def _select(
    selectors: Sequence[Selector],
    argument: str,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, frozenset[type]],
) -> set[str]:
    selected: set[str] = set()
    for selector in selectors:
        if isinstance(selector, str):
            found = {path for path in shapes if fnmatch.fnmatchcase(path, selector)}
            near = "paths are " + ", ".join(shapes)
        else:
            found = {p for p in shapes if any(issubclass(c, selector) for c in layers[p])}
            for path in sorted(found):
                if not all(issubclass(c, selector) for c in layers[path]):
                    names = " or ".join(sorted(c.__name__ for c in layers[path]))
                    raise ValueError(
                        f"{argument}={selector.__name__}: the layer of {path} may be {names}, "
                        f"since layers of both kinds were called under that name; "
                        f"select it by its path instead"
                    )
            classes = {c.__name__ for cs in layers.values() for c in cs}
            near = "layers are " + (", ".join(sorted(classes)) or "unknown: no Flax module called")
        if not found:
            name = selector if isinstance(selector, str) else selector.__name__
            raise ValueError(f"{argument}={name!r} selects no parameter; the {near}")
        selected |= found
    return selected
