"""Which products have rows that all examples share: positions, class tokens, prototypes."""

import dataclasses
from collections.abc import Sequence, Set

from cqjax.program.sites import Site
from cqjax.program.steps import Kind, Program, Step, differentiated


def with_sharing(
    sites: tuple[Site, ...], program: Program, batch: Set[int], examples: int | None
) -> tuple[Site, ...]:
    """The sites, with `shared` set.

    Rows are shared if they come of parameters and constants alone, and are then repeated: they are
    broadcast over the examples, or multiplied with what each example has. A constant that goes to
    the loss without either is the data itself, as a graph's nodes are, or collocation points.

    Args:
      sites: the sites.
      program: the loss, its first output.
      batch: the variables that hold the batch.
      examples: how many examples there are; None where that is not plain.
    """
    if examples is None or examples == 1:
        return sites
    dependent = program.dependent(batch)

    def unrepeated(step: Step, i: int) -> Sequence[int]:
        repeated = _repeated(step, dependent, examples)
        return [n for n in differentiated(step, i) if n not in repeated]

    alone = program.needed(program.outputs[:1], unrepeated)
    reads = {step.position: step for step in program.steps if step.kind is Kind.EQUATION}

    def shared(site: Site) -> bool:
        step = reads[site.position]
        return dependent.isdisjoint(step.reads) and alone.isdisjoint(step.writes)

    return tuple(dataclasses.replace(site, shared=shared(site)) for site in sites)


def _repeated(step: Step, dependent: Set[int], examples: int) -> Set[int]:
    """Those variables that an equation reads and uses once for each example."""
    equation = step.equation
    if step.kind is not Kind.EQUATION or not equation.inputs:
        return frozenset()
    if equation.primitive.name == "broadcast_in_dim":
        (operand, *_), (result,) = equation.inputs, equation.outputs
        kept = {
            axis
            for axis, size in zip(
                equation.params["broadcast_dimensions"], operand.shape, strict=True
            )
            if result.shape[axis] == size
        }
        repeats = any(n == examples and a not in kept for a, n in enumerate(result.shape))
        return frozenset(step.reads if repeats else ())
    if equation.pointwise:  # an axis of length 1 is repeated
        (result, *_) = equation.outputs
        return frozenset(
            number
            for number, aval in zip(step.reads, equation.inputs, strict=True)
            if number not in dependent
            and len(aval.shape) == len(result.shape)
            and any(m != n == examples for m, n in zip(aval.shape, result.shape, strict=True))
        )
    if equation.primitive.name == "dot_general":
        owns = [n in dependent for n in step.reads]
        if owns[0] != owns[1]:
            shape = equation.inputs[owns.index(False)].shape
            # As many rows as examples, or a multiple, may be the examples' own.
            if shape and shape[0] % examples != 0:
                return {step.reads[owns.index(False)]}
    return frozenset()
