"""Which layer feeds which: the order in which back-matching goes through a program.

The loop over the program follows every layer's output to the layers that read it, and counts how
many of its positions pooling leaves. The order in which layers are called would not do: it would
take a residual network for a chain.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.extend.core import primitives

from cqjax.program import jaxprs, marks
from cqjax.program.jaxprs import Equation
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Site
from cqjax.program.steps import Kind, Number, Position, Program, Step
from cqjax.program.walk import Record

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_SAME_AXES = frozenset({"pad", "concatenate"})


@dataclasses.dataclass(frozen=True)
class Node:
    """A layer as back-matching sees it: a product with a weight, or a normalisation.

    Attributes:
      name: the weight's path, or the normalisation's in its Flax module.
      position: where the equation is that gives its output.
      site: the product; None for a normalisation.
      start: index of the equation that it begins with, in the body that the position is in.
      output: shape and dtype of its output, in one trip of the loops around it.
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
    output: tuple[tuple[int, ...], Any]
    loops: tuple[int, ...]
    scale: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()
    pooled: float = 1.0
    devices: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all its parameters."""
        if self.site is None:
            return (*self.scale, *self.bias)
        return (*self.site.view.paths, *(self.site.bias.view.paths if self.site.bias else ()))


_Found = tuple[tuple[Node, ...], tuple[int, ...]]
"""The layers, and the numbers of those that the loss reads directly."""


class Flow:
    """The layers that a loss depends on, and which feeds which. Found on first use.

    Only back-matching uses them. Two flows are equal if their layers are. So they are also
    found where JAX compares the captures that hold a flow: where these cross a `jax.jit` or a
    `jax.lax.scan`.

    It keeps the program, which holds no values: no tracer that would outlive its trace.
    """

    def __init__(self, program: Program, record: Record):
        self._program = program
        self._record = record
        # Read now, since the question may come when the mesh is no longer the current one.
        self._mesh_sizes = dict(jax.sharding.get_abstract_mesh().shape)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The layers, in the order of the program."""
        return self._found[0]

    @property
    def top(self) -> tuple[int, ...]:
        """The layers that the loss reads directly, by number."""
        return self._found[1]

    @functools.cached_property
    def unknown(self) -> tuple[str, ...]:
        """Paths of parameters that belong to none of the layers, and are not merely added."""
        known = {path for node in self.nodes for path in node.paths}
        uses = self._record.uses.items()
        used = {path for path, us in uses if any(use.primitive != "add" for use in us)}
        sites = [node.site for node in self.nodes if node.site is not None]
        ragged = {p for site in sites if isinstance(site.form, Ragged) for p in site.view.paths}
        return tuple(path for path, _ in uses if path in (used - known) | ragged)

    @functools.cached_property
    def _found(self) -> _Found:
        return _Following(self._program, self._record, self._mesh_sizes).found()

    def __eq__(self, other: object) -> bool:
        """Whether the other's layers are the same."""
        return self is other or (isinstance(other, Flow) and self._state == other._state)

    def __hash__(self) -> int:
        """A hash of the layers."""
        return hash(self._found)

    @property
    def _state(self) -> dict[str, Any]:
        return {"_found": self._found, "unknown": self.unknown}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: the layers, for which it needs the program no more.

        Primitives are told apart by identity, and a copy of one is another.
        """
        return self._state


class _Trace(NamedTuple):
    """What has become of a layer's output on its way to a variable.

    Attributes:
      pooled: the fraction of its positions left.
      axes: the variable's axes that are positions; None where they are not known any more.
      averaged: the part that maxima or sums over whole axes have left. Those of the loss itself do
        not count: else the order in which it sums would change every rate.
    """

    pooled: float
    axes: tuple[int, ...] | None
    averaged: float = 1.0

    @property
    def left(self) -> float:
        """The part of its positions that is left to another layer."""
        return self.pooled * self.averaged


_Traces = Mapping[int, _Trace]
"""For each node, by number, what has become of its output."""


class _Following:
    """Follows the activations through a program whose first output is the loss."""

    def __init__(self, program: Program, record: Record, mesh_sizes: Mapping[str, int]):
        self._program = program
        self._mesh_sizes = mesh_sizes
        self._sites = {site.position: site for site in record.sites}
        self._uses = record.uses
        self._nodes: dict[Position, Node] = {}
        self._numbers: dict[Position, int] = {}
        self._reads: dict[tuple[int, int], float] = {}
        self._traces: dict[Number, _Traces] = {}
        self._starts: dict[tuple[Position, str], tuple[int, int]] = {}

    def found(self) -> _Found:
        carries = [step for step in self._program.steps if step.kind is Kind.CARRY]
        while True:
            self._reads.clear()  # a pass may see more left of a layer than the last one does
            for step in self._program.steps:
                self._traces.update(zip(step.writes, self._step(step), strict=True))
            # Repeat if a carry's next value has traces that it lacks.
            if all(self._step(step) == [self._traces[step.writes[0]]] for step in carries):
                break
        return self._reached(self._traces.get(self._program.outputs[0], {}))

    def _reached(self, loss: _Traces) -> _Found:
        """The layers that the loss depends on, and those that it reads directly."""
        top = tuple(sorted(loss))
        nodes = list(self._nodes.values())
        reached, waiting = set(), list(top)
        while waiting:
            reader = waiting.pop()
            if reader not in reached:
                reached.add(reader)
                waiting.extend(self._sources(reader))
        pooled: dict[int, float] = {}
        for i in sorted(reached, reverse=True):
            parts = [
                part * (pooled.get(reader, 1.0) if nodes[reader].site is None else 1.0)
                for (source, reader), part in self._reads.items()
                if source == i and reader in reached
            ]
            pooled[i] = max([*parts, loss[i].pooled] if i in loss else parts)
        new = {i: number for number, i in enumerate(sorted(reached))}
        kept = tuple(
            dataclasses.replace(
                nodes[i], sources=tuple(new[s] for s in self._sources(i)), pooled=pooled[i]
            )
            for i in new
        )
        return kept, tuple(new[i] for i in top)

    def _sources(self, reader: int) -> list[int]:
        return sorted(source for source, r in self._reads if r == reader)

    def _step(self, step: Step) -> Sequence[_Traces]:
        """What has become of the layers' outputs in what a step writes."""
        reads = [self._traces.get(n, {}) for n in step.reads]
        match step.kind:
            case Kind.EQUATION:
                return self._equation(step, reads)
            case Kind.CARRY:
                return [_joined(reads)]
            case Kind.JOIN:
                return [_joined(reads[1:])]
            case Kind.SLICE | Kind.STACK:  # a variable has other axes outside of a loop
                return [
                    {i: trace._replace(axes=None) for i, trace in traces.items()}
                    for traces in reads
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
            [
                {i: _after(equation, operand.shape, trace) for i, trace in traces.items()}
                for operand, traces in zip(equation.inputs, args, strict=True)
                if traces
            ]
        )
        floating = (jnp.issubdtype(out.dtype, jnp.floating) for out in equation.outputs)
        return [results if differentiable else {} for differentiable in floating]

    def _product(self, site: Site, args: Sequence[_Traces]) -> _Traces:
        """The site's output: a new layer's, whatever it reads."""
        name, start = " + ".join(site.view.paths), site.position[-1]
        node = Node(name, site.position, site, start, site.z, site.loops)
        return {self._node(node, args[site.operand]): _Trace(1.0, site.form.positions)}

    def _normalisation(
        self, step: Step, name: str, start: int, marked: int, result: _Traces
    ) -> _Traces:
        """The output of a normalisation, whose input is `marked`."""
        at = step.position
        inside = [(*at[:-1], i) for i in range(start, at[-1])]
        parameters: dict[str, list[str]] = {"mul": [], "add": []}
        for path, uses in self._uses.items():
            for use in uses:
                if use.primitive in parameters and use.position in inside:
                    parameters[use.primitive].append(path)
        z = step.equation.outputs[0]
        scale, bias = (tuple(dict.fromkeys(parameters[p])) for p in ("mul", "add"))
        number = math.prod(self._mesh_sizes[axis] for axis in jaxprs.varying(z))
        output = z.shape, z.dtype
        node = Node(name, at, None, start, output, step.loops, scale, bias, devices=number)
        axes = next((trace.axes for trace in result.values()), None)
        return {self._node(node, self._traces.get(marked, {})): _Trace(1.0, axes)}

    def _node(self, node: Node, fed: _Traces) -> int:
        """The node's number, after recording what it reads."""
        number = self._numbers.setdefault(node.position, len(self._numbers))
        self._nodes[node.position] = node
        for source, trace in fed.items():
            edge = (source, number)
            self._reads[edge] = max(trace.left, self._reads.get(edge, 0.0))
        return number


def _after(equation: Equation, before: tuple[int, ...], trace: _Trace) -> _Trace:
    """A trace, of an operand of shape `before`, after an equation that is no layer.

    Pooling is what leaves fewer positions: windows, slices, and reductions of whole axes.
    """
    name, params, after = equation.primitive.name, equation.params, equation.outputs[0].shape
    if trace.axes is None or any(is_symbolic_dim(before[i]) for i in trace.axes):
        return trace._replace(axes=None)
    if name.startswith("reduce_window") or name == "slice":
        part = math.prod(after[i] / before[i] for i in trace.axes)
        return trace._replace(pooled=trace.pooled * part)
    if name in _REDUCTIONS or name == "squeeze":
        gone = params["dimensions" if name == "squeeze" else "axes"]
        kept = [i for i in range(len(before)) if i not in gone]
        axes = tuple(kept.index(i) for i in trace.axes if i in kept)
        if name == "squeeze":
            return trace._replace(axes=axes)
        if not set(gone) <= set(trace.axes):
            return trace._replace(axes=None)
        part = trace.averaged / math.prod(before[i] for i in gone)
        return trace._replace(axes=axes, averaged=part)
    if equation.primitive is primitives.transpose_p:
        order = params["permutation"]
        return trace._replace(axes=tuple(order.index(i) for i in trace.axes))
    if equation.primitive is primitives.broadcast_in_dim_p:
        return trace._replace(axes=tuple(params["broadcast_dimensions"][i] for i in trace.axes))
    if equation.primitive is primitives.reshape_p:
        return trace._replace(axes=_reshaped(trace.axes, before, after))
    same = before == after or name in _SAME_AXES
    return trace if same else trace._replace(axes=None)


def _reshaped(
    axes: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Which axes of a reshaped variable the given ones have become; None if they were merged."""
    # What is in front stays: so a symbolic number of examples need not be compared.
    alike = (a == b for a, b in zip(before, after, strict=False))
    same = sum(itertools.takewhile(bool, alike))
    found = [axis for axis in axes if axis < same]
    for axis in (axis for axis in axes if axis >= same):
        size, start = before[axis], math.prod(before[same:axis])
        parts = [
            i
            for i, length in enumerate(after)
            if i >= same and length > 1 and start <= math.prod(after[same:i]) < start * size
        ]
        if math.prod(after[i] for i in parts) != size or (
            parts and math.prod(after[same : parts[0]]) != start
        ):
            return None
        found += parts
    return tuple(found)


def _joined(traces: Sequence[_Traces]) -> _Traces:
    """What reaches a variable by several ways: of each layer, the most that any leaves of it."""
    joined: dict[int, _Trace] = {}
    for known in traces:
        for i, trace in known.items():
            joined[i] = max(joined.get(i, trace), trace, key=lambda t: (t.axes is not None, t.left))
    return joined
