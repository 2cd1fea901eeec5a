"""How a weight is solved for, and what is captured for it: chosen by cost, within limits."""

import dataclasses
from collections.abc import Sequence

from jax.export import is_symbolic_dim

from cqjax.capture.block import Block, Solver
from cqjax.capture.options import Options
from cqjax.capture.own_statistics import Counts, Groups
from cqjax.capture.statistics import Gram, Rows
from cqjax.program.forms import Lookup
from cqjax.program.ragged import Ragged


def decided(block: Block, options: Options) -> Block | str:
    """The block with its solver and statistic; or why it is not solved for."""
    block = dataclasses.replace(block, max_dim=options.max_dim, precision=options.precision)
    if block.other is not None:
        return _both_sides(block, block.other, options)
    if isinstance(block.sites[0].form, Lookup):
        return dataclasses.replace(block, solver="diagonal", statistic=Counts)
    if isinstance(block.sites[0].form, Ragged):
        if not block.small("primal"):
            return _too_large(block.size("primal"))
        return dataclasses.replace(block, statistic=Groups)
    if block.view.made and any(site.x.placement or site.z.placement for site in block.sites):
        return "is made into a weight on a mesh with explicit axes; expected automatic ones"
    if block.view.made:
        needed = dataclasses.replace(block, statistic=options.capture or Gram)
        return needed if block.small("primal") else _too_large(block.size("primal"))
    solvers = _solvers(block, options)
    small: list[Solver] = [solver for solver in solvers if block.small(solver)]
    if small:
        solver = min(small, key=block.flops)
        needed = Rows if solver == "dual" else Gram
        return dataclasses.replace(block, solver=solver, statistic=options.capture or needed)
    if options.block_size is not None and (parts := _parts(block, options.block_size)):
        return _in_parts(block, parts)
    return _too_large(min(block.size(solver) for solver in solvers))


BOTH_SIDES_DIM = 1024
"""The largest matrix of which a weight that is used both ways takes eigenvectors, or inverses for
some of them, unless `max_dim` says otherwise. On 2 CPU cores `eigh` of 512 rows takes 40 to 640 ms,
and its time goes with the cube."""


def _both_sides(block: Block, other: Block, options: Options) -> Block | str:
    """A weight with products Z = XW and Y = DWᵀ: two second moments, and one solve."""
    if block.max_dim is None and not block.windows:
        block = dataclasses.replace(block, max_dim=BOTH_SIDES_DIM)
    sides = []
    for side in (block, dataclasses.replace(other, max_dim=block.max_dim)):
        looked_up = isinstance(side.sites[0].form, Lookup)
        statistic = Counts if looked_up else options.capture or Gram
        side = dataclasses.replace(
            side, solver="both sides", statistic=statistic, precision=options.precision
        )
        if not side.small("both sides"):
            return (
                "is used both ways, and needs the eigenvectors of a matrix of "
                f"{side.size('both sides')} rows, more than max_dim={block.max_dim}"
            )
        sides.append(side)
    return dataclasses.replace(sides[0], other=sides[1])


def _too_large(size: int) -> str:
    return f"needs the inverse of a matrix of {size} rows, more than max_dim"


def _solvers(block: Block, options: Options) -> Sequence[Solver]:
    """The solvers to choose from.

    Where the number of rows is symbolic (`jax.export`), nothing is known to cost less than the
    primal, whose matrix is of known size.

    Raises:
      ValueError: the dual is asked for there.
    """
    symbolic = is_symbolic_dim(block.rows)
    if symbolic and options.solver == "dual":
        raise ValueError(
            f'solver="dual" needs the number of rows of {block.name}, which is {block.rows}: '
            'expected solver="auto" or "primal", or shapes without symbolic dimensions'
        )
    if options.solver != "auto":
        return (options.solver,)
    has_rows = options.capture is None or issubclass(options.capture, Rows)
    return ("dual", "primal") if has_rows and not symbolic else ("primal",)


def _parts(block: Block, size: int) -> int | None:
    """The least number of equal parts that leaves each at most `size` features, if any does.

    Equal parts need no padding, and compile to one program. A convolution's parts have all the
    window's offsets of some of the channels. A prime number of channels leaves parts of one.
    """
    form = block.sites[0].form
    assert not isinstance(form, Lookup | Ragged)
    numbers = (n for n in range(1, form.channels + 1) if form.channels % n == 0)
    return next((n for n in numbers if block.features // n <= size), None)


def _in_parts(block: Block, parts: int) -> Block:
    """The block with diagonal blocks of XᵀX in its place: see `Block.parts`."""
    sites = []
    for site in block.sites:
        assert not isinstance(site.form, Lookup | Ragged)
        sites.append(dataclasses.replace(site, form=site.form.in_parts(parts)))
    return dataclasses.replace(
        block, sites=tuple(sites), solver="primal", statistic=Gram, parts=parts
    )
