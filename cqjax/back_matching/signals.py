"""Every layer's signal, by backpropagation and by back-matching."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from cqjax.capture import tracing
from cqjax.capture.options import Options
from cqjax.program import matched
from cqjax.program.flow import Flow, Node
from cqjax.program.steps import Position
from cqjax.program.taps import Evaluation, Probes, Rule, Tap


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
    traced = tracing.trace(value_fn, Options(), params, (), {})
    if isinstance(traced.outputs, tuple | list):
        raise TypeError("value_fn returns a pair; expected the loss alone: lambda p: loss_fn(p)[0]")
    tracing.check_loss(traced.outputs, has_aux=False)
    nodes = traced.plan.flow.nodes
    got, expected = _names(nodes), _names(flow.nodes)
    if got != expected:
        raise ValueError(
            f"value_fn's layers are {got}; expected those of the plan, {expected}: make the plan "
            "of the same loss"
        )
    taps = {
        node.position: Tap(
            lambda x, dz: dz, 0, node.output, node.output, (True,) * len(node.loops), node.loops
        )
        for node in nodes
    }

    def backwards(rules: dict[Position, Rule]) -> Probes:
        evaluation = Evaluation(taps, rules, {})

        def loss(probes: Probes) -> jax.Array:
            return evaluation(traced.jaxpr, jax.tree.leaves(params), probes)[0]

        return jax.grad(loss)({at: t.zero() for at, t in taps.items()})

    plain, matching = backwards({}), backwards(matched.rules(traced.plan.flow))
    return [Signals(plain[node.position], matching[node.position]) for node in nodes]


def _names(nodes: Sequence[Node]) -> str:
    """The layers, with the shapes of their weights."""
    return ", ".join(f"{n.name} {n.site.view.shape}" if n.site else n.name for n in nodes)
