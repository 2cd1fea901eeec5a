"""A plan: which parameters are covered, by which solves, at what cost."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from cqjax.capture.block import Block
from cqjax.capture.coverage import make_blocks
from cqjax.capture.options import Options, Signal
from cqjax.capture.parameters import Owners, Parameter, Shapes, Status, listed, selected
from cqjax.capture.table import parameter_lines
from cqjax.program.flow import Flow
from cqjax.program.walk import Record


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
    """What cqjax captures of a loss, and what its solves cost. Prints as a table.

    Attributes:
      parameters: all parameters, in the order of their tree.
      blocks: one for each weight that is solved for.
      batch_size: N, the number of terms that the loss averages over; None where unknown.
      examples: how many examples the batch has; None where that is not plain.
      flow: which layer feeds which.
      signal: what is propagated from layer to layer.
      unknown: where N is unknown: the arrays by which it was looked for, with their shapes.
    """

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    batch_size: int | jax.Array | None
    examples: int | None
    flow: Flow
    signal: Signal
    unknown: str = ""

    def __str__(self) -> str:
        """The plan as a table."""
        covered = sum(p.status in ("covered", "partly covered") for p in self.parameters)
        size = f"not inferred ({self.unknown})" if self.unknown else self.batch_size
        total = f"{covered} of {len(self.parameters)} parameters covered; batch size {size}"
        if self.signal == "matched":
            unmatched = ", ".join(self.unmatched) or "no layer with parameters"
            total += f"\nsignal: matched; as in backpropagation through {unmatched}"
        return "\n".join((*parameter_lines(self.parameters, self.blocks), total))

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
    batch_size: int | jax.Array | None,
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
            notes = _notes_on_rows(path, blocks, batch_size, examples)
        parameters.append(Parameter(path, shape, classes, status, notes))
    return Plan(tuple(parameters), blocks, batch_size, examples, flow, options.signal)


def check_plan(plan: Any) -> None:
    """Refuses what is no plan.

    Raises:
      TypeError: says how to make one.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is a {type(plan).__name__}; expected a Plan: cqjax.plan(loss_fn)(params, *args)"
        )


def _notes_on_rows(
    path: str,
    blocks: Sequence[Block],
    batch_size: int | jax.Array | None,
    examples: int | None,
) -> tuple[str, ...]:
    """A note where a weight's rows are not, or cannot be, the examples' own."""
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


def _check_owners_known(record: Record, owners: Owners) -> None:
    """Refuses to select by class where a function around a layer may have hidden it.

    Flax's interceptor does not see into a plain `jax.jit` or `jax.checkpoint` that was traced
    before.

    Raises:
      ValueError: names the parameter.
    """
    for site in record.sites:
        for path in site.view.paths:
            if len(site.position) > 1 and not owners[path]:
                raise ValueError(
                    f"the layer of {path} is unknown: a function around it (jax.jit, "
                    "jax.checkpoint, ...) is not Flax's, or was traced before; select parameters "
                    "by their paths instead"
                )
