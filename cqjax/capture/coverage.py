"""Which sites are solved for together as a block, and which cannot be solved for, and why."""

import dataclasses
import itertools
from collections.abc import Sequence, Set

import jax
import jax.numpy as jnp

from cqjax.capture.block import Block
from cqjax.capture.groups import Group, grouped, same_bias
from cqjax.capture.options import Options
from cqjax.capture.parameters import Shapes
from cqjax.capture.policy import decided
from cqjax.capture.statistics import Gram
from cqjax.program.sites import Bias, Site
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
    # Back-matching propagates along a weight, not back along it.
    groups = grouped(sites, shapes, both_sides=options.signal == "gradient")
    groups = _without_conflicts(groups, shapes, reasons)
    groups = _with_one_bias(groups, chosen, shapes, reasons)
    blocks = []
    for group in groups:
        block = decided(_undecided(group, shapes, reasons), options)
        if isinstance(block, Block):
            blocks.append(block)
            continue
        for site in itertools.chain(*group):
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


def _without_conflicts(groups: list[Group], shapes: Shapes, reasons: Reasons) -> list[Group]:
    """Leaves out weights that hold an entry twice, and those of which two hold the same one."""
    refused: dict[int, str] = {}
    groups_of: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        for path in dict.fromkeys(group.view.paths):
            groups_of.setdefault(path, []).append(i)
    for path, among in groups_of.items():
        views = [groups[i].view for i in among]
        if _most_occurrences(path, views, shapes) > 1:
            products = f"{len(among)} products that contract it in different ways, or scale it"
            reason = f"is the weight of {products}"
            if any(view.made for view in views):
                reason = f"is made into the weights of {products}"
            if len(among) == 1:
                reason = "occurs more than once in one product's weight"
            refused.update(dict.fromkeys(among, reason))
    for i, reason in refused.items():
        for site in itertools.chain(*groups[i]):
            _drop(site, reason, reasons)
    return [group for i, group in enumerate(groups) if i not in refused]


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
    groups: list[Group], chosen: Set[str], shapes: Shapes, reasons: Reasons
) -> list[Group]:
    """Takes from their sites the biases that are not one weight's alone."""
    weights = {path for group in groups for path in group.view.paths}
    owners: dict[str, set[object]] = {}
    for i, group in enumerate(groups):
        for side, sites in enumerate(group):
            for site in sites:
                for path in site.bias.view.paths if site.bias else ():
                    owners.setdefault(path, set()).add((i, side))

    def problem(biases: Sequence[Bias]) -> str | None:
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

    def with_one(sites: list[Site]) -> list[Site]:
        sites = same_bias(sites, shapes)
        biases = list(dict.fromkeys(site.bias for site in sites if site.bias is not None))
        reason = problem(biases)
        if reason is None:
            return sites
        for bias in biases:
            _note(reasons, bias.view, reason)
        return [dataclasses.replace(site, bias=None) for site in sites]

    return [Group(*map(with_one, group)) for group in groups]


def _undecided(group: Group, shapes: Shapes, reasons: Reasons) -> Block:
    """The sites' block, as if it were solved for by the primal: the policy decides."""
    biases = [next((site.bias for site in side if site.bias is not None), None) for side in group]
    of_biases = (bias.view.paths for bias in biases if bias is not None)
    paths = dict.fromkeys((*group.view.paths, *itertools.chain(*of_biases)))
    # Of two sides, the gradient is not XᵀZ̄.
    exact = not (group.other or group.view.made or any(reasons[path] for path in paths))
    block, other = (
        Block(
            sites=tuple(sites),
            statistic=Gram,
            solver="primal",
            bias=bias,
            shapes=tuple((path, shapes[path]) for path in paths),
            exact=exact and not any(site.stopped for site in sites),
            beside_own=not all(site.shared for site in beside),
        )
        for sites, bias, beside in zip(group, biases, reversed(group), strict=True)
    )
    return dataclasses.replace(block, other=other) if group.other else block
