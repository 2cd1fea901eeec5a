"""Algorithm 1 of seed 004: the backward factors of a chain of layers, from its weights' norms."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from cqjax.capture.flow import Flow, Node
from cqjax.capture.layers import Layers
from cqjax.linalg.gram import accumulator

Arrays = Mapping[str, jax.Array]


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


def rates(layers: Sequence[ChainLayer], arrays: Arrays) -> dict[str, jax.Array]:
    """1/(m s) of each parameter in a description, bottom to top.

    Raises:
      ValueError: a parameter is not there.
    """
    result: dict[str, jax.Array] = {}
    inverse = jnp.ones(())
    for layer in reversed(layers):
        scale = () if layer.scale is None else (layer.scale,)
        for path in (layer.weight, *layer.also, *layer.above, *scale):
            if path not in arrays:
                raise ValueError(
                    f"a layer has a parameter {path!r}, which is not among the parameters "
                    f"({', '.join(arrays)}): describe it by its path, keys joined by '/'"
                )
        square = _square(arrays[layer.weight])
        if layer.normalised:
            result |= dict.fromkeys((*layer.above, *scale), inverse / layer.shared)
            inverse = _divided(inverse, _scale(scale, arrays) * layer.outputs / square)
        result |= dict.fromkeys((layer.weight, *layer.also), inverse / layer.shared)
        inverse = _divided(inverse, square / layer.inputs / layer.ratio)
    return result


def inverse_factors(layers: Layers, arrays: Arrays) -> list[jax.Array]:
    """1/m of each unit.

    Raises:
      ValueError: the layers form no chain.
    """
    flow = layers.flow
    factors: dict[int, jax.Array] = {}
    inverse = jnp.ones(())
    for i in _top_down(flow):
        node, factors[i] = flow.nodes[i], inverse
        below = flow.nodes[node.sources[0]] if node.sources else None
        if node.site is not None:
            positions = node.pooled * node.site.form.output.shape[1]
            entries = math.prod(node.site.x[0])
            inverse = _divided(inverse, _square_of(node, arrays) * positions / entries)
        else:
            factor = _scale(node.scale, arrays)
            if below is not None and below.site is not None:
                batch, _, outputs = below.site.form.weight.shape
                factor = factor * batch * outputs / _square_of(below, arrays)
            elif below is not None:  # a normalisation's output varies by the square of its scale
                factor = factor / _scale(below.scale, arrays)
            inverse = _divided(inverse, factor)
    paths = [path for node in flow.nodes for path in set(node.paths)]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(_no_chain(f"{path} is used by several layers"))
    return [factors[unit.nodes[0]] for unit in layers.units]


def _top_down(flow: Flow) -> list[int]:
    """The layers' numbers from the top to the bottom.

    Raises:
      ValueError: a layer feeds several, or reads several.
    """
    names = [node.name for node in flow.nodes]
    order: list[int] = []
    reader, sources = "the loss", list(flow.top)
    while sources:
        if len(sources) > 1:
            read = ", ".join(names[i] for i in sources)
            raise ValueError(_no_chain(f"{reader} reads {read}"))
        i = sources[0]
        if i in order:
            raise ValueError(_no_chain(f"{names[i]} feeds itself, in a loop"))
        order.append(i)
        reader, sources = names[i], list(flow.nodes[i].sources)
    return order


def _no_chain(why: str) -> str:
    return (
        f"the layers form no chain: {why}. Measure their factors instead: "
        'scale_by_back_matching(plan, factors="measured"), or back_matching_rates(..., value_fn=)'
    )


def _square_of(node: Node, arrays: Arrays) -> jax.Array:
    """‖W‖² of a layer; the mean over the layers of a stack.

    Raises:
      ValueError: the weight is not among the parameters.
    """
    assert node.site is not None
    view = node.site.view
    for path in view.paths:
        if path not in arrays:
            raise ValueError(
                f"the parameters have no {path}, whose norm the rates of the layers below depend "
                f"on: they are {', '.join(arrays)}. Where optax masks parameters, place "
                "scale_by_back_matching outside of the mask; skip= of cqjax.plan leaves some alone"
            )
    return _square(view(arrays)) / math.prod(length for _, length in view.loops)


def _square(weight: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.asarray(weight).astype(accumulator(weight.dtype))))


def _scale(paths: Sequence[str], arrays: Arrays) -> jax.Array:
    """The mean square of what a normalisation multiplies by; 1 if nothing is learned."""
    squares = [_square(arrays[path]) / arrays[path].size for path in paths if path in arrays]
    return functools.reduce(jnp.multiply, squares, jnp.ones(()))


def _divided(inverse: jax.Array, factor: jax.Array) -> jax.Array:
    """1/m below a layer with that factor; 0 below one that lets nothing through."""
    passes = (factor > 0) & jnp.isfinite(factor)
    return jnp.where(passes, inverse / jnp.where(passes, factor, 1), 0)
