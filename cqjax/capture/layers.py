"""The layers of a program, as back-matching gives them rates."""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set

from cqjax.capture.block import Block
from cqjax.capture.flow import Flow, Node


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


@dataclasses.dataclass(frozen=True)
class Layers:
    """Which layer feeds which, and which parameters are theirs.

    Attributes:
      flow: the layers.
      units: the parameters.
    """

    flow: Flow
    units: tuple[Unit, ...]


def make_layers(
    flow: Flow, blocks: Sequence[Block], taken: Set[str], shapes: Mapping[str, tuple[int, ...]]
) -> Layers:
    """Finds the layers of each weight that is solved for, and of each normalisation.

    Args:
      flow: the layers.
      blocks: the weights.
      taken: paths of the parameters that are not skipped.
      shapes: the parameters' shapes, by path.
    """
    numbers = {node.position: i for i, node in enumerate(flow.nodes)}
    units = []

    def add(paths: tuple[str, ...], rows: Mapping[int, int], block: Block | None) -> None:
        pooled = sum(n * flow.nodes[i].pooled for i, n in rows.items())
        units.append(Unit(paths, tuple(rows), sum(rows.values()), pooled, block))

    for block in blocks:
        rows = {
            numbers[site.position]: site.rows for site in block.sites if site.position in numbers
        }
        if rows:
            add(block.paths, rows, block)
    normalisations: dict[tuple[str, ...], dict[int, int]] = {}
    for i, node in enumerate(flow.nodes):
        if node.site is None and node.paths:
            rows = _size(node) // math.prod(shapes[node.paths[0]])
            normalisations.setdefault(node.paths, {})[i] = rows
    for paths, rows in normalisations.items():
        add(tuple(path for path in paths if path in taken), rows, None)
    return Layers(flow, tuple(units))


def _size(node: Node) -> int:
    """Entries of a node's output, over all trips of the loops around it, and all devices."""
    return math.prod(node.output[0]) * math.prod(node.loops) * node.devices
