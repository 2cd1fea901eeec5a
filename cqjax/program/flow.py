"""Which layer feeds which: the order in which back-matching goes through a program.

The loop over the program follows every layer's output to the layers that read it, and counts how
many of its positions pooling leaves. The order in which layers are called would not do: it would
take a residual network for a chain.

In a residual network each layer reads all below it: see `number_sets`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import primitives

from cqjax.program import jaxprs, marks, pooling
from cqjax.program.jaxprs import Shaped
from cqjax.program.number_sets import Numbers, closed_up, members
from cqjax.program.pooling import Trace
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Site
from cqjax.program.steps import Kind, Number, Position, Program, Step
from cqjax.program.walk import Record


@dataclasses.dataclass(frozen=True)
class Node:
    """A layer as back-matching sees it: a product with a weight, or a normalisation.

    Attributes:
      name: the weight's path, or the normalisation's in its Flax module.
      position: where the equation is that gives its output.
      site: the product; None for a normalisation.
      start: index of the equation that it begins with, in the body that the position is in.
      output: the type of its output, in one trip of the loops around it.
      loops: lengths of the scans around it, outermost first.
      scale: paths of the parameters that a normalisation multiplies by.
      bias: paths of those that it adds.
      sources: the nodes whose outputs it reads, by number.
      pooled: the fraction of its output's positions that pooling leaves to the next layer.
      devices: how many devices have rows of their own of its output, within `jax.shard_map`.
    """

    name: str
    position: Position
    site: Site | None
    start: int
    output: Shaped
    loops: tuple[int, ...]
    scale: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()
    sources: Numbers = 0
    pooled: float = 1.0
    devices: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all its parameters."""
        if self.site is None:
            return (*self.scale, *self.bias)
        return (*self.site.view.paths, *(self.site.bias.view.paths if self.site.bias else ()))


class _Found(NamedTuple):
    """What there is to know of a loss's layers: see `Flow`."""

    nodes: tuple[Node, ...]
    top: Numbers
    unknown: tuple[str, ...]


class Flow:
    """The layers that a loss depends on, and which feeds which. Found on first use.

    Only back-matching uses them. Two flows are equal if their layers are. So they are also
    found where JAX compares the captures that hold a flow: where these cross a `jax.jit` or a
    `jax.lax.scan`.

    Until then it keeps the program, which holds no values: no tracer that would outlive its trace.
    """

    def __init__(self, program: Program, record: Record):
        # Read now, since the question may come when the mesh is no longer the current one.
        mesh_sizes = dict(jax.sharding.get_abstract_mesh().shape)
        self._given: tuple[Any, ...] = program, record, mesh_sizes

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The layers, in the order of the program."""
        return self._found.nodes

    @property
    def top(self) -> Numbers:
        """The layers that the loss reads directly, by number."""
        return self._found.top

    @property
    def unknown(self) -> tuple[str, ...]:
        """Paths of parameters that belong to none of the layers, and are not merely added."""
        return self._found.unknown

    @functools.cached_property
    def _found(self) -> _Found:
        found, self._given = _Following(*self._given).found(), ()
        return found

    def __eq__(self, other: object) -> bool:
        """Whether the other's layers are the same."""
        return self is other or (isinstance(other, Flow) and self._found == other._found)

    def __hash__(self) -> int:
        """A hash of the layers."""
        return hash(self._found)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: the layers, for which it needs the program no more.

        Primitives are told apart by identity, and a copy of one is another.
        """
        return {"_found": self._found}


_Traces = Mapping[Trace, Numbers]
"""What has become of the layers' outputs that reach a variable: of which layers what has."""


class _Following:
    """Follows the activations through a program whose first output is the loss."""

    def __init__(self, program: Program, record: Record, mesh_sizes: Mapping[str, int]):
        self._program = program
        self._mesh_sizes = mesh_sizes
        self._record = record
        self._sites = {site.position: site for site in record.sites}
        self._uses: dict[Position, list[tuple[str, str]]] = {}  # paths, and what they enter there
        for path, uses in record.uses.items():
            for use in uses:
                self._uses.setdefault(use.position, []).append((use.primitive, path))
        self._nodes: dict[Position, Node] = {}
        self._numbers: dict[Position, int] = {}
        self._reads: list[_Traces] = []
        self._traces: dict[Number, _Traces] = {}
        self._starts: dict[tuple[Position, str], tuple[int, int]] = {}

    def found(self) -> _Found:
        carries = [step for step in self._program.steps if step.kind is Kind.CARRY]
        while True:
            for step in self._program.steps:
                self._traces.update(zip(step.writes, self._step(step), strict=True))
            # Repeat if a carry's next value has traces that it lacks.
            if all(self._step(step) == [self._traces[step.writes[0]]] for step in carries):
                break
        loss = self._traces.get(self._program.outputs[0], {})
        sources, top = list(map(_union, self._reads)), _union(loss)
        reached, waiting = 0, top
        while waiting:
            reader = next(members(waiting))
            reached |= 1 << reader
            waiting = (waiting | sources[reader]) & ~reached
        pooled = self._pooled(loss, reached)
        gone = list(members(~reached & ((1 << len(sources)) - 1)))
        nodes = tuple(
            dataclasses.replace(node, sources=closed_up(sources[i], gone), pooled=pooled[i])
            for i, node in enumerate(self._nodes.values())
            if i in pooled
        )
        return _Found(nodes, closed_up(top, gone), self._unknown(nodes))

    def _pooled(self, loss: _Traces, reached: Numbers) -> dict[int, float]:
        """What fraction of each layer's positions is left to the reader that is left the most.

        A normalisation hands on what is left of its own.
        """
        nodes, parts = list(self._nodes.values()), dict[float, Numbers]()

        def leave(part: float, layers: Numbers) -> None:
            parts[part] = parts.get(part, 0) | layers

        for trace, layers in loss.items():
            leave(trace.pooled, layers)
        for reader in members(reached):
            for trace, layers in self._reads[reader].items():
                above = layers >> reader << reader  # in a loop, these may read what comes later
                leave(trace.left, above if nodes[reader].site is None else layers)
        pooled: dict[int, float] = {}
        for i in members(reached):  # from the top down: all readers come before
            pooled[i] = max(part for part, layers in parts.items() if layers >> i & 1)
            if nodes[i].site is None:
                for trace, layers in self._reads[i].items():
                    leave(trace.left * pooled[i], layers & ((1 << i) - 1))
        return pooled

    def _unknown(self, nodes: Sequence[Node]) -> tuple[str, ...]:
        known = {path for node in nodes for path in node.paths}
        uses = self._record.uses.items()
        used = {path for path, us in uses if any(use.primitive != "add" for use in us)}
        sites = [node.site for node in nodes if node.site is not None]
        ragged = {p for site in sites if isinstance(site.form, Ragged) for p in site.view.paths}
        return tuple(path for path, _ in uses if path in (used - known) | ragged)

    def _step(self, step: Step) -> Sequence[_Traces]:
        """What has become of the layers' outputs in what a step writes."""
        reads = [self._traces.get(n, {}) for n in step.reads]
        match step.kind:
            case Kind.EQUATION:
                return self._equation(step, reads)
            case Kind.CARRY:
                return [_joined(*reads)]
            case Kind.JOIN:
                return [_joined(*reads[1:])]
            case Kind.SLICE | Kind.STACK:  # a variable has other axes outside of a loop
                return [
                    _joined(
                        *({trace._replace(axes=None): layers} for trace, layers in each.items())
                    )
                    for each in reads
                ]
            case Kind.ENTER | Kind.CLOSE | Kind.LAST:
                return reads

    def _equation(self, step: Step, args: Sequence[_Traces]) -> Sequence[_Traces]:
        equation = step.equation
        if step.position in self._sites:
            return [self._product(self._sites[step.position], args)]
        mark = marks.mark_of(equation)
        if mark is not None:
            body = step.position[:-1], mark.name
            if not mark.after:
                self._starts[body] = step.position[-1], step.writes[0]
            elif body in self._starts:
                return [self._normalisation(step, mark.name, *self._starts[body], args[0])]
        if equation.primitive is primitives.stop_gradient_p or not equation.outputs:  # an effect
            return [{}] * len(equation.outputs)
        results = _joined(
            *(
                {pooling.through(equation, operand.shape, trace): layers}
                for operand, traces in zip(equation.inputs, args, strict=True)
                for trace, layers in traces.items()
            )
        )
        floating = (jnp.issubdtype(out.dtype, jnp.floating) for out in equation.outputs)
        return [results if differentiable else {} for differentiable in floating]

    def _product(self, site: Site, args: Sequence[_Traces]) -> _Traces:
        """The site's output: a new layer's, whatever it reads."""
        name, start = " + ".join(site.view.paths), site.position[-1]
        node = Node(name, site.position, site, start, site.z, site.loops)
        return {Trace(1.0, site.form.positions): self._node(node, args[site.operand])}

    def _normalisation(
        self, step: Step, name: str, start: int, marked: int, result: _Traces
    ) -> _Traces:
        """The output of a normalisation, whose input is `marked`."""
        at = step.position
        inside = ((*at[:-1], i) for i in range(start, at[-1]))
        uses = dict.fromkeys(use for place in inside for use in self._uses.get(place, ()))
        scale, bias = (tuple(sorted(path for p, path in uses if p == q)) for q in ("mul", "add"))
        z = step.equation.outputs[0]
        number = math.prod(self._mesh_sizes[axis] for axis in jaxprs.varying(z))
        output = jaxprs.shaped(z)
        node = Node(name, at, None, start, output, step.loops, scale, bias, devices=number)
        axes = next((trace.axes for trace in result), None)
        return {Trace(1.0, axes): self._node(node, self._traces.get(marked, {}))}

    def _node(self, node: Node, fed: _Traces) -> Numbers:
        """The node, as a set, after recording what it reads."""
        number = self._numbers.setdefault(node.position, len(self._numbers))
        self._nodes[node.position] = node
        self._reads[number : number + 1] = [fed]
        return 1 << number


def _joined(*several: _Traces) -> _Traces:
    """What reaches a variable by several ways: of each layer, the most that any leaves of it."""
    found: dict[Trace, Numbers] = {}
    for traces in several:
        for trace, layers in traces.items():
            found[trace] = found.get(trace, 0) | layers
    joined, known = {}, 0
    for trace in sorted(found, key=lambda t: (t.axes is not None, t.left), reverse=True):
        if layers := found[trace] & ~known:
            joined[trace] = layers
            known |= layers
    return joined


def _union(traces: _Traces) -> Numbers:
    """All layers that reach a variable."""
    return functools.reduce(operator.or_, traces.values(), 0)
