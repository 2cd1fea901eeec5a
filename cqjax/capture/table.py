"""A plan as a table in plain text."""

import textwrap
from collections.abc import Iterator, Sequence, Set

from jax.export import is_symbolic_dim

from cqjax.capture.block import Block
from cqjax.capture.parameters import Parameter

_HEADER = ("parameter", "layer", "sites", "B", "n", "d", "o", "solver", "added FLOPs")
_NUMERIC = {"sites", "B", "n", "d", "o", "added FLOPs"}
WIDTH = 100
"""No line of a plan is longer."""


def parameter_lines(parameters: Sequence[Parameter], blocks: Sequence[Block]) -> Iterator[str]:
    """One line for each parameter: its layer, its product's sizes, its solver and cost.

    The sizes are those of Z = XW with X: (B, n, d) and W: (B, d, o). Where a weight is used both
    ways, as Y = DWᵀ too, sites and rows are counted for each side. Added FLOPs are relative to the
    layer's own, forwards and backwards. What there is to note stands in the same line, or below if
    it does not fit there. A path that is too long has a line of its own.
    """
    of: dict[str, list[Block]] = {}
    for block in blocks:
        for path in block.paths:
            of.setdefault(path, []).append(block)
    rows = [_cells(each, of.get(each.path, ())) for each in parameters]
    others = [
        max(map(len, column)) for column in zip(_HEADER, *(row for row, _ in rows), strict=True)
    ]
    longest = WIDTH - sum(width + 2 for width in others[1:])
    short = [("" if len(row[0]) > longest else row[0], *row[1:]) for row, _ in rows]
    header, rule, *table = lines(_HEADER, _NUMERIC, short)
    yield from (header, rule)
    for line, (row, notes) in zip(table, rows, strict=True):
        if len(row[0]) > longest:
            yield from wrapped(row[0], "")
        beside = (f"{start}  {notes}".rstrip() for start in (line.ljust(len(rule)), line))
        fitting = next((each for each in beside if len(each) <= WIDTH), None)
        yield from (line, *wrapped(notes)) if fitting is None else (fitting,)


def wrapped(text: str, indent: str = "    ") -> Iterator[str]:
    """The lines of a text, none longer than a plan's, each of them indented."""
    yield from textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def lines(header: Sequence[str], numeric: Set[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table: its header, a rule and its rows, numeric columns to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        aligned = (
            cell.rjust(width) if name in numeric else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        )
        yield "  ".join(aligned).rstrip()


def _cells(parameter: Parameter, blocks: Sequence[Block]) -> tuple[tuple[str, ...], str]:
    """A parameter's line, of the blocks that it takes part in, and the notes on it."""
    notes = "; ".join(parameter.notes)
    if parameter.status == "partly covered":
        notes = f"also {notes}"
    elif parameter.status != "covered":
        notes = f"{parameter.status}: {notes}" if notes else parameter.status
    head, gap = (parameter.path, parameter.layer or "-"), ("",) * (len(_HEADER) - 2)
    weights = [b for b in blocks if parameter.path in b.view.paths]
    if not weights:
        bias = f"bias of {blocks[0].name}" if blocks else ""
        return (*head, *gap), "; ".join(filter(None, (bias, notes)))
    if len(weights) > 1:
        sliced = "; ".join(filter(None, ("in slices", notes)))
        return (*head, str(len(weights)), *gap[1:]), sliced
    (block,) = weights
    if block.other is not None:
        return (*head, *_of_both_sides(block, block.other)), notes
    if block.view.made:
        made = f"W = f({', '.join(block.view.paths)})"
        notes = "; ".join(filter(None, (made, notes)))
    elif len(block.view.paths) > 1:
        others = ", ".join(p for p in block.view.paths if p != parameter.path)
        notes = "; ".join(filter(None, (f"joined with {others}", notes)))
    sizes = (block.batch, block.rows, block.features, block.outputs)
    unknown = block.solver == "diagonal" or is_symbolic_dim(block.rows)
    cost = "-" if unknown else f"{block.relative_flops():.1%}"
    return (*head, str(len(block.sites)), *map(str, sizes), block.solver, cost), notes


def _of_both_sides(block: Block, other: Block) -> tuple[str, ...]:
    """The cells from "sites" to the cost, of a weight with products Z = XW and Y = DWᵀ."""
    sites = f"{len(block.sites)} + {len(other.sites)}"
    rows = f"{block.rows} + {other.rows}"
    unknown = is_symbolic_dim(block.rows) or is_symbolic_dim(other.rows)
    cost = "-" if unknown else f"{block.relative_flops():.1%}"
    sizes = (block.batch, rows, block.features, block.outputs)
    return (sites, *map(str, sizes), block.solver, cost)
