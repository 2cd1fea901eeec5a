"""Which layer feeds which: the order in which back-matching goes through a program.

A second walk over the loss's jaxpr follows the activations from layer to layer, and counts the
positions that pooling leaves of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from cqjax.capture import jaxprs, marks
from cqjax.capture.jaxprs import aval
from cqjax.capture.matrix_form import Convolution
from cqjax.capture.sites import Position, Site
from cqjax.capture.walk import Use
from cqjax.linalg import devices

_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_SAME_AXES = frozenset({"pad", "concatenate"})


@dataclasses.dataclass(frozen=True)
class Node:
    """A layer as back-matching sees it: a product with a weight, or a normalisation.

    Attributes:
      name: the weight's path, or the normalisation's in its Flax module.
      position: where the equation that gives its output is.
      site: the product; None for a normalisation.
      start: index of the equation that it begins with, in the body that the position is in.
      output: shape and dtype of its output, in one trip of the loops around it.
      loops: lengths of the scans around it, outermost first.
      scale: paths of the parameters that a normalisation multiplies by.
      bias: paths of those that it adds.
      sources: the nodes whose outputs it reads, by number.
      pooled: the part of its output's positions that pooling leaves, before another layer reads
        them.
      devices: how many have rows of their own of its output, within `jax.shard_map`.
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


@dataclasses.dataclass(frozen=True)
class Flow:
    """The layers that the loss depends on, in the order of the program.

    Attributes:
      nodes: the layers.
      top: those that the loss reads directly, by number.
    """

    nodes: tuple[Node, ...]
    top: tuple[int, ...]


class _Trace(NamedTuple):
    """What has become of a layer's output on its way to a variable.

    Attributes:
      pooled: the part of its positions that is left.
      axes: the variable's axes that are positions; None where they are not known any more.
      averaged: the part that maxima or sums over whole axes have left. The loss's own do not count.
    """

    pooled: float
    axes: tuple[int, ...] | None
    averaged: float = 1.0

    @property
    def left(self) -> float:
        """The part of its positions that is left to another layer."""
        return self.pooled * self.averaged


_Traces = Mapping[int, _Trace]


def follow_layers(jaxpr: Any, sites: Sequence[Site], uses: Mapping[str, Sequence[Use]]) -> Flow:
    """Follows the activations through an open jaxpr whose first output is the loss.

    Args:
      jaxpr: the jaxpr.
      sites: its products with a weight.
      uses: for each parameter's path, what it enters besides.
    """
    return _Following(sites, uses).flow(jaxpr)


class _Following:
    def __init__(self, sites: Sequence[Site], uses: Mapping[str, Sequence[Use]]):
        self._sites = {site.position: site for site in sites}
        self._uses = uses
        self._nodes: dict[Position, Node] = {}
        self._numbers: dict[Position, int] = {}
        self._reads: dict[tuple[int, int], float] = {}

    def flow(self, jaxpr: Any) -> Flow:
        """The flow of a whole program."""
        loss = self._body(jaxpr, [{} for _ in jaxpr.invars], (), ())[0]
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
        return Flow(kept, tuple(new[i] for i in top))

    def _sources(self, reader: int) -> list[int]:
        return sorted(source for source, r in self._reads if r == reader)

    def _body(
        self, jaxpr: Any, inputs: Sequence[_Traces], position: Position, loops: tuple[int, ...]
    ) -> list[_Traces]:
        traces: dict[Any, _Traces] = dict(zip(jaxpr.invars, inputs, strict=True))
        started: dict[str, int] = {}

        def read(atom: Any) -> _Traces:
            return {} if jaxprs.is_literal(atom) else traces.get(atom, {})

        for i, eqn in enumerate(jaxpr.eqns):
            at, args = (*position, i), [read(atom) for atom in eqn.invars]
            mark = marks.mark_of(eqn)
            if at in self._sites:
                results = [self._product(eqn, self._sites[at], args)]
            elif mark is not None and mark.after and mark.name in started:
                start = started.pop(mark.name)
                fed = traces.get(jaxpr.eqns[start].outvars[0], {})
                results = [self._normalisation(eqn, mark.name, at, start, loops, fed, args[0])]
            else:
                if mark is not None and not mark.after:
                    started[mark.name] = i
                results = self._equation(eqn, args, at, loops)
            traces.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _product(self, eqn: core.JaxprEqn, site: Site, args: Sequence[_Traces]) -> _Traces:
        """The site's output: its own, whatever it reads."""
        name, start = " + ".join(site.view.paths), site.position[-1]
        node = Node(name, site.position, site, start, site.z, site.loops)
        if isinstance(site.form, Convolution):
            axes = tuple(eqn.params["dimension_numbers"].out_spec[2:])
        else:
            axes = site.form.output.groups[1][1:]
        return {self._node(node, args[site.operand]): _Trace(1.0, axes)}

    def _normalisation(
        self,
        eqn: core.JaxprEqn,
        name: str,
        position: Position,
        start: int,
        loops: tuple[int, ...],
        fed: _Traces,
        result: _Traces,
    ) -> _Traces:
        """The output of what a mark before and a mark after enclose."""
        inside = [(*position[:-1], i) for i in range(start, position[-1])]
        parameters: dict[str, list[str]] = {"mul": [], "add": []}
        for path, uses in self._uses.items():
            for use in uses:
                if use.primitive in parameters and use.position in inside:
                    parameters[use.primitive].append(path)
        z = aval(eqn.outvars[0])
        scale, bias = (tuple(dict.fromkeys(parameters[p])) for p in ("mul", "add"))
        number = devices.number(jaxprs.varying(eqn.outvars[0]))
        output = z.shape, z.dtype
        node = Node(name, position, None, start, output, loops, scale, bias, devices=number)
        axes = next((trace.axes for trace in result.values()), None)
        return {self._node(node, fed): _Trace(1.0, axes)}

    def _node(self, node: Node, fed: _Traces) -> int:
        """The node's number, after recording what it reads."""
        number = self._numbers.setdefault(node.position, len(self._numbers))
        self._nodes[node.position] = node
        for source, trace in fed.items():
            edge = (source, number)
            self._reads[edge] = max(trace.left, self._reads.get(edge, 0.0))
        return number

    def _equation(
        self,
        eqn: core.JaxprEqn,
        args: Sequence[_Traces],
        position: Position,
        loops: tuple[int, ...],
    ) -> Sequence[_Traces]:
        """What has become of the layers' outputs after any other equation."""
        if eqn.primitive in (primitives.jit_p, primitives.remat_p, primitives.closed_call_p):
            body, _ = jaxprs.opened(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
            return self._body(body, args, position, loops)
        if eqn.primitive is primitives.cond_p:
            branches = [
                self._body(jaxprs.opened(branch)[0], args[1:], (*position, i), loops)
                for i, branch in enumerate(eqn.params["branches"])
            ]
            return [_joined(results) for results in zip(*branches, strict=True)]
        if eqn.primitive is primitives.scan_p:
            return self._scan(eqn, args, position, loops)
        if eqn.primitive is primitives.stop_gradient_p:
            return [{}] * len(eqn.outvars)
        moved = _joined(
            [
                {i: _moved(eqn, operand, trace) for i, trace in traces.items()}
                for operand, traces in zip(eqn.invars, args, strict=True)
                if traces
            ]
        )
        return [moved if _differentiable(out) else {} for out in eqn.outvars]

    def _scan(
        self,
        eqn: core.JaxprEqn,
        args: Sequence[_Traces],
        position: Position,
        loops: tuple[int, ...],
    ) -> Sequence[_Traces]:
        body, _ = jaxprs.opened(eqn.params["jaxpr"])
        consts, carry = jaxprs.scan_arity(eqn)
        inputs = [*args[: consts + carry], *map(_lost, args[consts + carry :])]
        inner = (*loops, eqn.params["length"])
        while True:
            results = self._body(body, inputs, position, inner)
            again = [_joined([inputs[consts + i], results[i]]) for i in range(carry)]
            if again == inputs[consts : consts + carry]:
                return [*results[:carry], *map(_lost, results[carry:])]
            inputs[consts : consts + carry] = again


def _moved(eqn: core.JaxprEqn, operand: Any, trace: _Trace) -> _Trace:
    """A trace after an equation that is no product with a weight."""
    name, before, after = eqn.primitive.name, aval(operand).shape, aval(eqn.outvars[0]).shape
    if trace.axes is None:
        return trace
    if name.startswith("reduce_window") or name == "slice":
        part = math.prod(after[i] / before[i] for i in trace.axes)
        return trace._replace(pooled=trace.pooled * part)
    if name in _REDUCTIONS or name == "squeeze":
        gone = eqn.params["dimensions" if name == "squeeze" else "axes"]
        kept = [i for i in range(len(before)) if i not in gone]
        axes = tuple(kept.index(i) for i in trace.axes if i in kept)
        if name == "squeeze":
            return trace._replace(axes=axes)
        if not set(gone) <= set(trace.axes):
            return trace._replace(axes=None)
        part = trace.averaged / math.prod(before[i] for i in gone)
        return trace._replace(axes=axes, averaged=part)
    if eqn.primitive is primitives.transpose_p:
        order = eqn.params["permutation"]
        return trace._replace(axes=tuple(order.index(i) for i in trace.axes))
    if eqn.primitive is primitives.broadcast_in_dim_p:
        return trace._replace(axes=tuple(eqn.params["broadcast_dimensions"][i] for i in trace.axes))
    if eqn.primitive is primitives.reshape_p:
        return trace._replace(axes=_reshaped(trace.axes, before, after))
    same = before == after or name in _SAME_AXES
    return trace if same else trace._replace(axes=None)


def _reshaped(
    axes: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Which axes of a reshaped variable the given ones have become; None if they were merged."""
    found: list[int] = []
    for axis in axes:
        size, start = before[axis], math.prod(before[:axis])
        parts = [
            i
            for i, length in enumerate(after)
            if length > 1 and start <= math.prod(after[:i]) < start * size
        ]
        if math.prod(after[i] for i in parts) != size or (
            parts and math.prod(after[: parts[0]]) != start
        ):
            return None
        found += parts
    return tuple(found)


def _differentiable(out: Any) -> bool:
    return jnp.issubdtype(aval(out).dtype, jnp.floating)


def _joined(traces: Sequence[_Traces]) -> _Traces:
    """What reaches a variable by several ways: of each layer, the most that any leaves of it."""
    joined: dict[int, _Trace] = {}
    for known in traces:
        for i, trace in known.items():
            joined[i] = max(joined.get(i, trace), trace, key=lambda t: (t.axes is not None, t.left))
    return joined


def _lost(traces: _Traces) -> _Traces:
    """Traces across the border of a loop, where a variable has other axes."""
    return {i: trace._replace(axes=None) for i, trace in traces.items()}
