"""From a walk's record to blocks: which sites are solved for together, and which cannot be."""

import dataclasses
from collections.abc import Mapping, Sequence, Set

import jax
import jax.numpy as jnp

from cqjax.capture.block import SPANNING, Block, Cost, Solver
from cqjax.capture.matrix_form import Lookup
from cqjax.capture.sites import Site
from cqjax.capture.views import View
from cqjax.capture.walk import Walk

Shapes = Mapping[str, tuple[int, ...]]
Uses = dict[str, list[str]]


def make_blocks(
    walk: Walk, taken: Set[str], shapes: Shapes, cost: Cost
) -> tuple[tuple[Block, ...], Uses]:
    """Groups the sites by their weights.

    Args:
      walk: the walk over the loss.
      taken: paths of the parameters to capture.
      shapes: the parameters' shapes, by path.
      cost: how they may be solved for.

    Returns:
      The blocks, and for each parameter what it does besides.
    """
    uses = {path: list(dict.fromkeys(u.reason for u in us)) for path, us in walk.uses.items()}
    taken_sites = []
    for site in walk.sites:
        if taken >= set(site.view.paths):
            taken_sites.append(site)
        else:
            _drop(site, "is joined with a parameter that is skipped", uses)
    groups = _without_conflicts(_groups(taken_sites), shapes, uses)
    groups = _with_one_bias(groups, taken, uses)
    blocks = [_block(sites, shapes, uses, cost) for sites in groups]
    return tuple(block for block in blocks if block is not None), uses


def _note(uses: Uses, view: View, reason: str) -> None:
    for path in view.paths:
        if reason not in uses[path]:
            uses[path].append(reason)


def _drop(site: Site, reason: str, uses: Uses) -> None:
    _note(uses, site.view, reason)
    if site.bias is not None:
        _note(uses, site.bias.view, "is the bias of a layer whose weight is not solved for")


def _groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites by their weight: the same view, contracted in the same way, by product or lookup."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        key = (site.view, site.form.weight, isinstance(site.form, Lookup))
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _without_conflicts(groups: list[list[Site]], shapes: Shapes, uses: Uses) -> list[list[Site]]:
    """Leaves out weights that hold an entry twice, and those of which two hold the same one."""
    refused: dict[int, str] = {}
    for path in shapes:
        among = [i for i, sites in enumerate(groups) if path in sites[0].view.paths]
        views = [groups[i][0].view for i in among]
        if _most_occurrences(path, views, shapes) > 1:
            reason = f"is the weight of {len(among)} products that contract it in different ways"
            if len(among) == 1:
                reason = "occurs more than once in one product's weight"
            refused.update(dict.fromkeys(among, reason))
    for i, reason in refused.items():
        for site in groups[i]:
            _drop(site, reason, uses)
    return [sites for i, sites in enumerate(groups) if i not in refused]


def _most_occurrences(path: str, views: Sequence[View], shapes: Shapes) -> int:
    """How often the views hold one entry of a parameter, at the most."""
    if all(view.whole for view in views):
        return len(views)
    with jax.ensure_compile_time_eval():
        total = jnp.zeros(shapes[path])
        for view in views:
            ones = jnp.ones((*(length for _, length in view.loops), *view.shape))
            total += view.transpose(ones, shapes)[path]
        return int(total.max(initial=0))


def _with_one_bias(groups: list[list[Site]], taken: Set[str], uses: Uses) -> list[list[Site]]:
    """Takes from their sites the biases that are not one weight's alone."""
    weights = {path for sites in groups for path in sites[0].view.paths}
    owners: dict[str, set[int]] = {}
    for i, sites in enumerate(groups):
        for site in sites:
            for path in site.bias.view.paths if site.bias else ():
                owners.setdefault(path, set()).add(i)

    def problem(biases: Set) -> str | None:
        paths = {path for bias in biases for path in bias.view.paths}
        if len(biases) > 1:
            return "is one of several biases added to the outputs of one weight"
        if any(len(owners[path]) > 1 for path in paths):
            return "is the bias of several weights"
        if weights & paths:
            return "is a weight and a bias"
        if not all(bias.view.whole for bias in biases):
            return "is a bias in parts only"
        return "is joined with a parameter that is skipped" if paths - taken else None

    result = []
    for sites in groups:
        biases = {site.bias for site in sites if site.bias is not None}
        reason = problem(biases)
        if reason is not None:
            for bias in biases:
                _note(uses, bias.view, reason)
            sites = [dataclasses.replace(site, bias=None) for site in sites]
        result.append(sites)
    return result


def _block(
    sites: Sequence[Site],
    shapes: Shapes,
    uses: Uses,
    cost: Cost,
) -> Block | None:
    """The sites' block; None, which is noted, if no matrix that may be inverted is small enough."""
    bias = next((site.bias for site in sites if site.bias is not None), None)
    paths = dict.fromkeys((*sites[0].view.paths, *(bias.view.paths if bias else ())))
    block = Block(
        sites=tuple(sites),
        solver="diagonal",
        bias=bias,
        shapes=tuple((path, shapes[path]) for path in paths),
        exact=not any(uses[path] for path in paths),
        precision=cost.precision,
        max_dim=cost.max_dim,
    )
    if isinstance(sites[0].form, Lookup):
        return block
    solvers: tuple[Solver, ...] = ("dual", "primal") if cost.solver == "auto" else (cost.solver,)
    block = _subsampled(block, cost.subsample)
    small: list[Solver] = [solver for solver in solvers if block.small(solver)]
    if small:
        return dataclasses.replace(block, solver=min(small, key=block.flops))
    if cost.block_size is not None and (parts := block.parts_of(cost.block_size)):
        return _subsampled(block.split(parts), cost.subsample)
    size = min(block.size(solver) for solver in solvers)
    for site in sites:
        _drop(site, f"needs the inverse of a matrix of {size} rows, more than max_dim", uses)
    return None


def _subsampled(block: Block, subsample: int) -> Block:
    """The block with XᵀX from one in `subsample` rows, or more: enough to span the features."""
    most = max(1, block.rows // (SPANNING * max(1, block.features)))
    return dataclasses.replace(block, subsample=min(subsample, most))
