"""Every layer's signal, by backpropagation and by back-matching."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from cqjax.capture import matching, tap, tracing
from cqjax.capture.block import Cost
from cqjax.capture.flow import Flow, Node
from cqjax.capture.sites import Position


class Signals(NamedTuple):
    """What one layer's output is handed, with an axis for each loop around it.

    Attributes:
      gradient: the loss's gradient with respect to the output.
      matched: the signal that back-matching hands down.
    """

    gradient: jax.Array
    matched: jax.Array


def signals(value_fn: Callable[[Any], Any], params: Any, flow: Flow) -> list[Signals]:
    """The signals on the outputs of all layers.

    Args:
      value_fn: the loss, a function of the parameters alone.
      params: the parameters.
      flow: the layers, of a plan of the same loss.

    Returns:
      The signals, in the order of `flow.nodes`.

    Raises:
      ValueError: the loss has other layers; called within `jax.shard_map`.
      TypeError: it is not a real scalar.
    """
    if axes := jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"measured factors within jax.shard_map over {', '.join(map(str, axes))}: they would "
            "be one device's. Update under jax.jit on arrays with a NamedSharding instead"
        )
    trace = tracing.tracer(value_fn, None, (), Cost(), None, "mean")
    traced = trace(params, (), {})
    if isinstance(traced.outputs, tuple | list):
        raise TypeError("value_fn returns a pair; expected the loss alone: lambda p: loss_fn(p)[0]")
    tracing.check_loss(traced.outputs, has_aux=False)
    nodes = traced.plan.layers.flow.nodes
    got, expected = _names(nodes), _names(flow.nodes)
    if got != expected:
        raise ValueError(
            f"value_fn's layers are {got}; expected those of the plan, {expected}: make the plan "
            "of the same loss"
        )
    taps = {
        node.position: tap.Tap(
            lambda x, dz: dz, 0, node.output, node.output, (True,) * len(node.loops), node.loops
        )
        for node in nodes
    }

    def backwards(rules: dict[Position, tap.Rule]) -> tap.Probes:
        evaluation = tap.Evaluation(taps, rules)

        def loss(probes: tap.Probes) -> jax.Array:
            return evaluation(traced.jaxpr, jax.tree.leaves(params), probes)[0]

        return jax.grad(loss)({at: t.zero() for at, t in taps.items()})

    plain, matched = backwards({}), backwards(matching.rules(traced.plan.layers.flow))
    return [Signals(plain[node.position], matched[node.position]) for node in nodes]


def _names(nodes: Sequence[Node]) -> str:
    """The layers, with the shapes of their weights."""
    return ", ".join(f"{n.name} {n.site.view.shape}" if n.site else n.name for n in nodes)
