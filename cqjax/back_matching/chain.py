"""Algorithm 1 of Zhang, Chen and Liu: the backward factors m of a chain of layers.

They come of the weights' norms alone. m = 1 at the output; each layer that is passed on the way
down multiplies it by a factor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cqjax.back_matching.units import Unit
from cqjax.linalg.gram import accumulator
from cqjax.program import views
from cqjax.program.flow import Flow, Node
from cqjax.program.number_sets import members
from cqjax.program.views import View

Arrays = Mapping[str, jax.Array]
"""Parameters by path."""


@dataclasses.dataclass(frozen=True)
class ChainLayer:
    """A layer in a description of a chain, for `back_matching_rates`.

    Attributes:
      weight: path of its weight, keys joined by "/".
      inputs: number of its input features, or channels.
      outputs: number of its output features, or channels.
      shared: s, at how many positions the weight acts whose outputs receive a gradient: for a
        convolution its output's positions, counted after the pooling that follows; 1 for a fully
        connected layer.
      ratio: c, the positions of its input for each of those.
      normalised: whether a normalisation follows, before the next layer.
      scale: path of what the normalisation multiplies by, if that is learned.
      also: paths of parameters that take the layer's rate: its bias.
      above: paths of parameters that take the rate above the normalisation: what it adds.
    """

    weight: str
    inputs: int
    outputs: int
    shared: float = 1.0
    ratio: float = 1.0
    normalised: bool = False
    scale: str | None = None
    also: tuple[str, ...] = ()
    above: tuple[str, ...] = ()

    @property
    def _scale(self) -> tuple[str, ...]:
        return () if self.scale is None else (self.scale,)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all its parameters."""
        return (self.weight, *self.also, *self.above, *self._scale)

    def stages(self) -> list[Stage]:
        """What is passed on the way down: its normalisation, then the layer itself."""
        entries = self.inputs * self.ratio
        layer = Stage(views.parameter(self.weight, ()), (), self.outputs, 1, entries)
        return [Stage(None, self._scale), layer] if self.normalised else [layer]


class Stage(NamedTuple):
    """What Algorithm 1 passes in one step down: a product with a weight, or a normalisation.

    Attributes:
      weight: the weight; None for a normalisation.
      scale: paths of what a normalisation multiplies by.
      outputs: number of a weight's output features.
      positions: at how many positions a weight acts whose outputs receive a gradient.
      entries: how many entries the input of a weight has.
    """

    weight: View | None
    scale: tuple[str, ...]
    outputs: int = 1
    positions: float = 1
    entries: float = 1

    def factor(self, below: Stage | None, arrays: Arrays) -> jax.Array:
        """What m is multiplied by.

        Of a weight, ‖W‖²_F · positions / entries: the mean over the input's entries of the squared
        norms of the weights that touch each, but for borders. Of a normalisation, the mean square
        of its scale over that of what it normalises: the output of the weight below it, with rows
        of norm ‖W‖²_F / outputs, or of another normalisation.
        """
        if self.weight is not None:
            return _square_of(self.weight, arrays) * self.positions / self.entries
        factor = _mean_square(self.scale, arrays)  # the paper's networks have no learned scale
        if below is not None and below.weight is not None:
            return factor * below.outputs / _square_of(below.weight, arrays)
        return factor if below is None else factor / _mean_square(below.scale, arrays)


def inverse_factors(stages: Sequence[Stage], arrays: Arrays) -> list[jax.Array]:
    """1/m above each stage, from the top down."""
    found, inverse = [], jnp.ones(())
    for stage, below in itertools.zip_longest(stages, stages[1:]):
        found.append(inverse)
        factor = stage.factor(below, arrays)
        # Nothing comes through a layer of zeros: the rates below it are zero.
        passes = (factor > 0) & jnp.isfinite(factor)
        inverse = jnp.where(passes, inverse / jnp.where(passes, factor, 1), 0)
    return found


def rates(layers: Sequence[ChainLayer], arrays: Arrays) -> dict[str, jax.Array]:
    """1/(m s) of each parameter in a description, bottom to top.

    Raises:
      ValueError: a parameter is not there.
    """
    for path in itertools.chain(*(layer.paths for layer in layers)):
        if path not in arrays:
            raise ValueError(
                f"a layer has a parameter {path!r}, which is not among the parameters "
                f"({', '.join(arrays)}): describe it by its path, keys joined by '/'"
            )
    top_down = layers[::-1]
    stages = [stage for layer in top_down for stage in layer.stages()]
    factors = iter(inverse_factors(stages, arrays))
    found: dict[str, jax.Array] = {}
    for layer in top_down:
        inverse = next(factors)
        if layer.normalised:
            found |= dict.fromkeys((*layer.above, *layer._scale), inverse / layer.shared)
            inverse = next(factors)
        found |= dict.fromkeys((layer.weight, *layer.also), inverse / layer.shared)
    return found


def unit_factors(flow: Flow, units: Sequence[Unit], arrays: Arrays) -> list[jax.Array]:
    """1/m of each unit.

    Raises:
      ValueError: the layers form no chain.
    """
    order = _top_down(flow)
    factors = inverse_factors([_stage(flow.nodes[i]) for i in order], arrays)
    uses = Counter(path for node in flow.nodes for path in set(node.paths))
    for path, number in uses.items():
        if number > 1:
            raise ValueError(_no_chain(f"{path} is used by several layers"))
    of_node = dict(zip(order, factors, strict=True))
    return [of_node[unit.nodes[0]] for unit in units]


def _stage(node: Node) -> Stage:
    if node.site is None:
        return Stage(None, node.scale)
    form, entries = node.site.form, math.prod(node.site.x.shape)
    batch, _, outputs = form.weight.shape
    positions = node.pooled * form.output.shape[1]
    return Stage(node.site.view, (), batch * outputs, positions, entries)


def _top_down(flow: Flow) -> list[int]:
    """The layers' numbers from the top to the bottom.

    Raises:
      ValueError: a layer feeds several, or reads several.
    """
    names = [node.name for node in flow.nodes]
    order: dict[int, None] = {}
    reader, sources = "the loss", flow.top
    while sources:
        if sources.bit_count() > 1:
            read = sorted(members(sources))
            more = [f"{len(read) - 6} more"] if len(read) > 6 else []
            some = ", ".join([names[i] for i in read[:6]] + more)
            raise ValueError(_no_chain(f"{reader} reads {some}"))
        (i,) = members(sources)
        if i in order:
            raise ValueError(_no_chain(f"{names[i]} feeds itself, in a loop"))
        order[i] = None
        reader, sources = names[i], flow.nodes[i].sources
    return list(order)


def _no_chain(why: str) -> str:
    return (
        f"the layers form no chain: {why}. Measure their factors instead: "
        'scale_by_back_matching(plan, factors="measured"), or back_matching_rates(..., value_fn=)'
    )


def _square_of(weight: View, arrays: Arrays) -> jax.Array:
    """‖W‖² of a layer; the mean over the layers of a stack.

    Raises:
      ValueError: the weight is not among the parameters.
    """
    for path in weight.paths:
        if path not in arrays:
            raise ValueError(
                f"the parameters have no {path}, whose norm the rates of the layers below depend "
                f"on: they are {', '.join(arrays)}. Where optax masks parameters, place "
                "scale_by_back_matching outside of the mask; skip= of cqjax.plan leaves some alone"
            )
    return _square(weight(arrays)) / math.prod(length for _, length in weight.loops)


def _square(weight: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.asarray(weight).astype(accumulator(weight.dtype))))


def _mean_square(paths: Sequence[str], arrays: Arrays) -> jax.Array:
    """The mean square of what a normalisation multiplies by; 1 if nothing is learned."""
    squares = [_square(arrays[path]) / arrays[path].size for path in paths if path in arrays]
    return functools.reduce(jnp.multiply, squares, jnp.ones(()))
