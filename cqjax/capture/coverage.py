"""Which sites are solved for together as a block, and which cannot be solved for, and why."""

import dataclasses
from collections.abc import Sequence, Set

import jax
import jax.numpy as jnp

from cqjax.capture.block import Block
from cqjax.capture.options import Options
from cqjax.capture.parameters import Shapes
from cqjax.capture.policy import decided
from cqjax.capture.statistics import Gram
from cqjax.program.forms import Lookup
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Site
from cqjax.program.views import View
from cqjax.program.walk import Record

Reasons = dict[str, list[str]]
"""For each parameter's path, what it does that no solve accounts for, in words."""


def make_blocks(
    record: Record, chosen: Set[str], shapes: Shapes, options: Options
) -> tuple[tuple[Block, ...], Reasons]:
    """Groups the sites by their weights.

    Args:
      record: the sites of the loss, and what else the parameters enter.
      chosen: paths of the parameters to capture.
      shapes: the parameters' shapes, by path.
      options: how they may be solved for.

    Returns:
      The blocks, and for each parameter what it does besides.
    """
    reasons = {path: list(dict.fromkeys(u.reason for u in us)) for path, us in record.uses.items()}
    sites = []
    for site in record.sites:
        if chosen >= set(site.view.paths):
            sites.append(site)
        else:
            _drop(site, "is joined with a parameter that is skipped", reasons)
    groups = _without_conflicts(_groups(sites), shapes, reasons)
    groups = _with_one_bias(groups, chosen, reasons)
    blocks = []
    for sites in groups:
        block = decided(_undecided(sites, shapes, reasons), options)
        if isinstance(block, Block):
            blocks.append(block)
            continue
        for site in sites:
            _drop(site, block, reasons)
    return tuple(blocks), reasons


def _note(reasons: Reasons, view: View, reason: str) -> None:
    for path in view.paths:
        if reason not in reasons[path]:
            reasons[path].append(reason)


def _drop(site: Site, reason: str, reasons: Reasons) -> None:
    _note(reasons, site.view, reason)
    if site.bias is not None:
        _note(reasons, site.bias.view, "is the bias of a layer whose weight is not solved for")


def _groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites by their weight: the same view, contracted in the same way and by the same kind.

    Where a product has c times the weight of the first one, its X counts c times instead.
    """
    groups: dict[object, list[Site]] = {}
    for site in sites:
        kind = type(site.form) if isinstance(site.form, Lookup | Ragged) else None
        view, factor = (site.view, 1.0) if kind is Lookup else site.view.split
        group = groups.setdefault((view, site.form.weight, kind), [])
        if group and group[0].view != site.view:
            first = group[0].view
            site = dataclasses.replace(site, view=first, factor=factor / first.split[1])
        group.append(site)
    return list(groups.values())


def _without_conflicts(
    groups: list[list[Site]], shapes: Shapes, reasons: Reasons
) -> list[list[Site]]:
    """Leaves out weights that hold an entry twice, and those of which two hold the same one."""
    refused: dict[int, str] = {}
    groups_of: dict[str, list[int]] = {}
    for i, sites in enumerate(groups):
        for path in dict.fromkeys(sites[0].view.paths):
            groups_of.setdefault(path, []).append(i)
    for path, among in groups_of.items():
        views = [groups[i][0].view for i in among]
        if _most_occurrences(path, views, shapes) > 1:
            products = f"{len(among)} products that contract it in different ways, or scale it"
            reason = f"is the weight of {products}"
            if any(view.made for view in views):
                reason = f"is made into the weights of {products}"
            if len(among) == 1:
                reason = "occurs more than once in one product's weight"
            refused.update(dict.fromkeys(among, reason))
    for i, reason in refused.items():
        for site in groups[i]:
            _drop(site, reason, reasons)
    return [sites for i, sites in enumerate(groups) if i not in refused]


def _most_occurrences(path: str, views: Sequence[View], shapes: Shapes) -> int:
    """How often the views hold one entry of a parameter, at the most."""
    if any(view.made for view in views):  # what made it may have used each entry
        return len(views)
    if all(view.whole for view in views):  # else slices or repeated parameters could share entries
        return len(views)
    with jax.ensure_compile_time_eval():
        total = jnp.zeros(shapes[path])
        for view in views:
            ones = jnp.ones((*(length for _, length in view.loops), *view.shape))
            total += view.unscaled.transpose(ones, shapes)[path]
        return int(total.max(initial=0))


def _with_one_bias(
    groups: list[list[Site]], chosen: Set[str], reasons: Reasons
) -> list[list[Site]]:
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
        return "is joined with a parameter that is skipped" if paths - chosen else None

    result = []
    for sites in groups:
        biases = {site.bias for site in sites if site.bias is not None}
        reason = problem(biases)
        if reason is not None:
            for bias in biases:
                _note(reasons, bias.view, reason)
            sites = [dataclasses.replace(site, bias=None) for site in sites]
        result.append(sites)
    return result


def _undecided(sites: Sequence[Site], shapes: Shapes, reasons: Reasons) -> Block:
    """The sites' block, as if it were solved for by the primal: the policy decides."""
    bias = next((site.bias for site in sites if site.bias is not None), None)
    paths = dict.fromkeys((*sites[0].view.paths, *(bias.view.paths if bias else ())))
    return Block(
        sites=tuple(sites),
        statistic=Gram,
        solver="primal",
        bias=bias,
        shapes=tuple((path, shapes[path]) for path in paths),
        exact=not (sites[0].view.made or any(reasons[path] for path in paths))
        and not any(s.stopped for s in sites),
    )
