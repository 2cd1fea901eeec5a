"""A plan: which parameters are covered, by which solves, at what cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from cqjax.capture.batch_size import BatchSize
from cqjax.capture.block import Block
from cqjax.capture.coverage import make_blocks
from cqjax.capture.options import Options, Signal
from cqjax.capture.parameters import Owners, Parameter, Shapes, Status, listed, selected
from cqjax.capture.table import parameter_lines, wrapped
from cqjax.program.flow import Flow
from cqjax.program.walk import Record


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What cqjax captures of a loss, and what its solves cost. Prints as a table.

    Attributes:
      parameters: all parameters, in the order of their tree.
      blocks: one for each weight that is solved for.
      batch_size: N, the number of terms that the loss averages over; None where it is unknown, or
        computed anew in each call (the sum of a mask).
      batch_size_source: how it is known, in words.
      examples: how many examples the batch has; None where that is not plain.
      flow: which layer feeds which.
      signal: what is propagated from layer to layer.
      unknown: where N is unknown: the arrays by which it was looked for, with their shapes.
    """

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    batch_size: int | jax.Array | None
    batch_size_source: str
    examples: int | None
    flow: Flow
    signal: Signal
    unknown: str = ""

    def __str__(self) -> str:
        """The plan as a table."""
        covered = sum(p.status in ("covered", "partly covered") for p in self.parameters)
        total = f"{covered} of {len(self.parameters)} parameters covered; "
        total += f"N = {self.batch_size_source}"
        if self.unknown:
            total += f" ({self.unknown})"
        if self.signal == "matched":
            unmatched = ", ".join(self.unmatched) or "no layer with parameters"
            total += f"\nsignal: matched; as in backpropagation through {unmatched}"
        below = (line for part in total.splitlines() for line in wrapped(part, ""))
        return "\n".join((*parameter_lines(self.parameters, self.blocks), *below))

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Paths of the parameters of layers that back-matching does not know.

        They are neither weights of a product, nor of a normalisation, nor merely added. The signal
        passes there as in backpropagation.
        """
        return self.flow.unknown

    def uncovered(self) -> dict[str, tuple[str, ...]]:
        """Why, for each parameter that keeps its gradient without having been asked to."""
        return {p.path: p.notes for p in self.parameters if p.status == "uncovered"}


def make_plan(
    record: Record,
    flow: Flow,
    shapes: Shapes,
    owners: Owners,
    options: Options,
    *,
    batch_size: BatchSize,
    examples: int | None,
) -> Plan:
    """Groups the sites of a loss into blocks and says what becomes of each parameter.

    Args:
      record: the sites, and what else the parameters enter.
      flow: which layer feeds which.
      shapes: the parameters' shapes, by path.
      owners: the classes of the Flax layers that own them.
      options: what is asked for.
      batch_size: N, given or inferred.
      examples: how many there are.

    Raises:
      ValueError: a selector matches no parameter, or a layer's class is ambiguous or unknown.
    """
    only = None if options.only is None else listed(options.only)
    skip = listed(options.skip)
    if any(isinstance(selector, type) for selector in (*(only or ()), *skip)):
        _check_owners_known(record, owners)
    chosen = selected(only, skip, shapes, owners)
    blocks, reasons = make_blocks(record, chosen, shapes, options)
    solved = {path for block in blocks for path in block.paths}
    shared = {path for block in blocks if block.shared for path in block.view.paths}
    on_rows = () if examples is None else ("all examples share its rows",)
    parameters = []
    for path, shape in shapes.items():
        notes = tuple(reasons[path]) or ("is not reached by the loss",)
        status: Status = "partly covered" if reasons[path] else "covered"
        if path not in chosen:
            status = "skipped"
        elif path not in solved:
            status = "uncovered"
        classes = " or ".join(sorted(c.__name__ for c in owners[path]))
        if status in ("covered", "skipped"):
            notes = on_rows if path in shared else ()
        parameters.append(Parameter(path, shape, classes, status, notes))
    # A plan outlives the trace, and so it holds nothing that was computed in it.
    size = None if batch_size.computed else batch_size.value
    source = batch_size.source
    return Plan(tuple(parameters), blocks, size, source, examples, flow, options.signal)


def check_plan(plan: Any) -> None:
    """Refuses what is no plan.

    Raises:
      TypeError: says how to make one.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is a {type(plan).__name__}; expected a Plan: cqjax.plan(loss_fn)(params, *args)"
        )


def _check_owners_known(record: Record, owners: Owners) -> None:
    """Refuses to select by class where the class of a layer that there is is unknown.

    Flax's interceptor does not see into a plain `jax.jit` or `jax.checkpoint` that was traced
    before. And a class that selects a layer's bias selects its weight too.

    Raises:
      ValueError: names the parameter.
    """
    for site in record.sites:
        biases = site.bias.view.paths if site.bias is not None else ()
        for path in site.view.paths:
            if owners[path]:
                continue
            for bias in biases:
                if owners[bias]:
                    names = " or ".join(sorted(c.__name__ for c in owners[bias]))
                    raise ValueError(
                        f"the layer of {path} is unknown, though {bias}, the bias of its product, "
                        f"is of {names}; select parameters by their paths instead"
                    )
            if len(site.position) > 1:
                raise ValueError(
                    f"the layer of {path} is unknown: a function around it (jax.jit, "
                    "jax.checkpoint, ...) is not Flax's, or was traced before; select parameters "
                    "by their paths instead"
                )
