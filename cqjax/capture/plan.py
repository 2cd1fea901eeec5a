"""From a walk's record to a plan: which parameters are covered, by which solves, at what cost."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from cqjax.capture.block import Block
from cqjax.capture.matrix_form import Lookup
from cqjax.capture.table import table
from cqjax.capture.walk import Site, Walk

Selector = str | type
"""A pattern for parameters' paths, as in `fnmatch`, or a class of Flax layers."""

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What cqjax captures of a loss, and what its solves cost. Prints as a table.

    Attributes:
      parameters: all parameters, in the order of their tree.
      blocks: one for each weight that is solved for.
      batch_size: N, the number of terms that the loss averages over; None where unknown.
    """

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    batch_size: int | None

    def __str__(self) -> str:
        """The plan as a table."""
        return table(self)

    def uncovered(self) -> dict[str, tuple[str, ...]]:
        """Why, for each parameter that keeps its gradient without having been asked to."""
        return {p.path: p.notes for p in self.parameters if p.status == "uncovered"}


def make_plan(
    walk: Walk,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, frozenset[type]],
    *,
    only: Sequence[Selector] | None,
    skip: Sequence[Selector],
    solver: Literal["auto", "primal", "dual"],
    batch_size: int | None,
) -> Plan:
    """Groups the sites of a walk into blocks and says what becomes of each parameter.

    Args:
      walk: the walk over the loss.
      shapes: the parameters' shapes, by path.
      layers: the classes of the Flax layers that own them.
      only: if given, selects the parameters to capture.
      skip: selects parameters to leave alone.
      solver: "auto" takes the cheaper solution for each weight.
      batch_size: N.

    Raises:
      ValueError: a selector matches no parameter, or a layer's class is ambiguous.
    """
    taken = set(shapes) if only is None else _select(only, "only", shapes, layers)
    taken -= _select(skip, "skip", shapes, layers)
    notes: dict[str, list[str]] = {path: [] for path in shapes}
    groups = _groups([site for site in walk.sites if taken.issuperset(site.view.paths)])
    groups = _without_conflicts(groups, shapes, notes)
    groups = _with_one_bias(groups, taken, notes)
    blocks = tuple(_block(sites, shapes, walk.uses, solver) for sites in groups)
    solved = {path for block in blocks for path in block.paths}
    parameters = []
    for path, shape in shapes.items():
        status: Status = "covered" if path in solved else "uncovered"
        reasons = walk.uses[path] + notes[path]
        if path not in taken:
            status, reasons = "skipped", []
        elif path in solved and walk.uses[path]:
            status = "partly covered"
        elif path not in solved and not reasons:
            reasons = _unmet(path, walk.sites)
        classes = " or ".join(sorted(c.__name__ for c in layers[path]))
        parameters.append(Parameter(path, shape, classes, status, tuple(reasons)))
    return Plan(tuple(parameters), blocks, batch_size)


def _unmet(path: str, sites: Sequence[Site]) -> list[str]:
    """Why a parameter that no equation misuses has no solve."""
    if any(path in site.view.paths for site in sites):
        return ["is joined with a parameter that is skipped"]
    if any(site.bias is not None and path in site.bias.view.paths for site in sites):
        return ["is the bias of a layer whose weight is not solved for"]
    return ["is not reached by the loss"]


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


def _groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites by their weight: the same view, contracted in the same way."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault((site.view, site.form.weight), []).append(site)
    return list(groups.values())


def _without_conflicts(
    groups: list[list[Site]],
    shapes: Mapping[str, tuple[int, ...]],
    notes: dict[str, list[str]],
) -> list[list[Site]]:
    """Leaves out weights of which two solves would each set the same entries."""
    refused: set[int] = set()
    for path in shapes:
        among = [i for i, sites in enumerate(groups) if path in sites[0].view.paths]
        if len(among) > 1 and _overlap([groups[i][0] for i in among], path, shapes):
            refused.update(among)
            notes[path].append(
                f"is the weight of {len(among)} products that contract it in different ways"
            )
    return [sites for i, sites in enumerate(groups) if i not in refused]


def _overlap(sites: Sequence[Site], path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an entry of the parameter is in the views of two of the sites."""
    if any(site.view.whole for site in sites):
        return True
    with jax.ensure_compile_time_eval():
        uses = jnp.zeros(shapes[path])
        for site in sites:
            lengths = (length for _, length in site.view.loops)
            ones = jnp.ones((*lengths, *site.view.shape))
            uses += site.view.transpose(ones, shapes)[path]
        return bool(uses.max() > 1)


def _with_one_bias(
    groups: list[list[Site]], taken: set[str], notes: dict[str, list[str]]
) -> list[list[Site]]:
    """Takes from their sites the biases that are not one weight's alone."""
    weights = {path for sites in groups for path in sites[0].view.paths}
    owners: dict[str, set[int]] = {}
    for i, sites in enumerate(groups):
        for site in sites:
            for path in site.bias.view.paths if site.bias else ():
                owners.setdefault(path, set()).add(i)

    def problem(sites: list[Site]) -> str | None:
        views = {site.bias.view for site in sites if site.bias}
        if len(views) > 1:
            return "is one of several biases added to the outputs of one weight"
        paths = [path for view in views for path in view.paths]
        if any(len(owners[path]) > 1 for path in paths):
            return "is the bias of several weights"
        if weights.intersection(paths):
            return "is a weight and a bias"
        return "" if not taken.issuperset(paths) else None

    result = []
    for sites in groups:
        reason = problem(sites)
        if reason is not None:
            for path in {p for site in sites if site.bias for p in site.bias.view.paths}:
                if reason and reason not in notes[path]:
                    notes[path].append(reason)
            sites = [dataclasses.replace(site, bias=None) for site in sites]
        result.append(sites)
    return result


def _block(
    sites: Sequence[Site],
    shapes: Mapping[str, tuple[int, ...]],
    uses: Mapping[str, Sequence[str]],
    solver: Literal["auto", "primal", "dual"],
) -> Block:
    bias = next((site.bias for site in sites if site.bias is not None), None)
    paths = dict.fromkeys((*sites[0].view.paths, *(bias.view.paths if bias else ())))
    block = Block(
        sites=tuple(sites),
        solver="dual",
        bias=bias,
        shapes=tuple((path, shapes[path]) for path in paths),
        exact=not any(uses[path] for path in paths),
    )
    if any(isinstance(site.form, Lookup) for site in sites):
        return dataclasses.replace(block, solver="diagonal")
    if solver == "primal" or any(site.varying for site in sites):
        return dataclasses.replace(block, solver="primal")
    cheaper = solver == "auto" and block.flops("primal") < block.flops("dual")
    return dataclasses.replace(block, solver="primal" if cheaper else "dual")
