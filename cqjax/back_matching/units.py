"""Units: the parameters that share a rate, and the layers that they are used in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from cqjax.capture.block import Block
from cqjax.capture.captures import Capture, Captures
from cqjax.capture.plan import Plan
from cqjax.program.flow import Node


@dataclasses.dataclass(frozen=True)
class Unit:
    """Parameters that share a rate, and the layers that they are used in.

    Attributes:
      paths: the parameters' paths.
      nodes: the layers, by their numbers in the flow: several where the parameters are shared.
      rows: how many rows their outputs have, summed over the layers.
      pooled: how many of these rows pooling leaves.
      block: what is solved for together, if the parameters are a weight and its bias; None if
        they are a normalisation's.
    """

    paths: tuple[str, ...]
    nodes: tuple[int, ...]
    rows: int
    pooled: float
    block: Block | None

    @property
    def stacked(self) -> tuple[int, ...]:
        """Lengths of the loops that scan over its weight: each trip has a rate of its own."""
        loops = () if self.block is None else self.block.view.loops
        return tuple(length for _, length in loops)


def back_matching_units(source: Plan | Captures) -> tuple[Unit, ...]:
    """The units to which back-matching gives rates: which parameters, in how many positions.

    There is one for each weight that is solved for, and one for each normalisation with parameters.
    A unit's rate is 1/(m s), with s = `pooled` / N by Algorithm 1, and s = `rows` / N where m is
    measured: see `back_matching_rates`.

    Args:
      source: `cqjax.plan(loss_fn)(params, ...)`, or the captures of `cqjax.value_and_grad`.

    Returns:
      The units: weights first, each in the order of the program.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> def loss_fn(params, x):
      ...     return jnp.mean((jax.nn.relu(x @ params["w1"]) @ params["w2"]) ** 2)
      >>> params = {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))}
      >>> plan = cqjax.plan(loss_fn)(params, jnp.ones((5, 3)))
      >>> [(unit.paths, unit.rows) for unit in cqjax.back_matching_units(plan)]
      [(('w1',), 5), (('w2',), 5)]
    """
    nodes = source.flow.nodes
    numbers = {node.position: i for i, node in enumerate(nodes)}
    found = []

    def add(paths: tuple[str, ...], rows: Mapping[int, int], block: Block | None) -> None:
        pooled = sum(n * nodes[i].pooled for i, n in rows.items())
        found.append(Unit(paths, tuple(rows), sum(rows.values()), pooled, block))

    # A layer in both branches of a cond counts the rows of both. A weight that is used both ways (a
    # tied table), or is made of parameters, has the rate 1: Algorithm 1 has no factor for it.
    for captured in source.blocks:
        block = captured.block if isinstance(captured, Capture) else captured
        rows = {
            numbers[site.position]: site.rows for site in block.sites if site.position in numbers
        }
        if rows and block.other is None and block.view.made is None:
            add(block.paths, rows, block)
    parameters = {parameter.path: parameter for parameter in source.parameters}
    normalisations: dict[tuple[str, ...], dict[int, int]] = {}
    for i, node in enumerate(nodes):
        if node.site is None and node.paths:
            rows = _entries(node) // math.prod(parameters[node.paths[0]].shape)
            normalisations.setdefault(node.paths, {})[i] = rows
    for paths, rows in normalisations.items():
        add(tuple(p for p in paths if parameters[p].status != "skipped"), rows, None)
    return tuple(found)


def _entries(node: Node) -> int:
    """Entries of a node's output, over all trips of the loops around it, and all devices."""
    return math.prod(node.output.shape) * math.prod(node.loops) * node.devices
