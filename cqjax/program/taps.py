"""Evaluates a loss's jaxpr with taps at its sites.

A tap is the identity on a site's output z. Its backward rule hands on the gradient dz unchanged,
and returns a statistic of (x, dz) as the "gradient" of a probe: an extra input, which is zero. So
the gradients with respect to the probes are the statistics. JAX brings them out of scanned,
rematerialised, jitted and sharded code within the one backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from cqjax.linalg import devices
from cqjax.program import jaxprs
from cqjax.program.jaxprs import Shaped
from cqjax.program.steps import CALLS, Position

Probes = dict[Position, Any]


@dataclasses.dataclass(frozen=True)
class Tap:
    """What the backward pass captures at one equation.

    Attributes:
      statistic: what one trip contributes, of the activation x, the signal dz, `more` and `given`.
      operand: which of the equation's operands is x.
      x: the type of x.
      z: the type of the result.
      stacked: for each loop around the equation, whether the statistic has an axis for it, rather
        than a sum over it.
      loops: lengths of these loops.
      varying: the mesh axes over which x or dz varies, and the statistic with them.
      more: further operands that the statistic needs, with their types.
      given: further arrays that it needs, which are none of the program's.
    """

    statistic: Callable[..., Any]
    operand: int
    x: Shaped
    z: Shaped
    stacked: tuple[bool, ...]
    loops: tuple[int, ...]
    varying: frozenset[str] = frozenset()
    more: tuple[tuple[int, Shaped], ...] = ()
    given: tuple[jax.Array, ...] = ()

    def __call__(self, x: jax.Array, dz: jax.Array, *more: jax.Array) -> Any:
        """What one trip contributes."""
        like = jax.tree.map(self._placement, self._structs)
        return devices.vary(
            devices.automatic(self.statistic, x, dz, *more, like=like), self.varying
        )

    def zero(self) -> Any:
        """The probe."""
        loops = [n for n, stacked in zip(self.loops, self.stacked, strict=True) if stacked]
        zeros = jax.tree.map(lambda s: jnp.zeros((*loops, *s.shape), s.dtype), self._structs)
        places = jax.tree.map(self._placement, self._structs)
        return devices.vary(devices.placed(zeros, places), self.varying)

    @functools.cached_property
    def _structs(self) -> Any:
        """The shapes and dtypes of what one trip contributes."""
        shaped = (self.x, self.z, *(shaped for _, shaped in self.more))
        structs = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (*shaped, *self.given)]
        return jax.eval_shape(self.statistic, *structs)

    def _placement(self, struct: jax.ShapeDtypeStruct) -> NamedSharding | None:
        """How an array of the statistic is split along a mesh's explicit axes.

        What has the shape of x (activations that are captured as they are) stays where x is. The
        sums, and the rows that a solve gathers, are on all devices.
        """
        at = self.x.placement
        if at and struct.shape == self.x.shape and not any(self.stacked):
            return at
        at = at or self.z.placement
        return NamedSharding(at.mesh, PartitionSpec()) if at else None


class Body(NamedTuple):
    """A jaxpr under evaluation.

    Attributes:
      eqns: its equations.
      values: the variables that have a value already.
    """

    eqns: Sequence[core.JaxprEqn]
    values: Mapping[Any, Any]


Rule = Callable[[core.JaxprEqn, list[Any], Body], list[Any]]
"""Evaluates an equation on operands in a way of its own."""


class Evaluation:
    """Evaluates a jaxpr like `jax.core.eval_jaxpr`, tapping equations on its way."""

    def __init__(
        self,
        taps: Mapping[Position, Tap],
        rules: Mapping[Position, Rule],
        twins: Mapping[Position, Position],
    ):
        """Prepares the evaluation of a program.

        Args:
          taps: what is taken out of its backward pass, by the equations' positions.
          rules: how some of its equations are evaluated.
          twins: equations whose result is that of an earlier one of the same body. It is used
            again, so that its tap sees the sum of their gradients.
        """
        self._taps = taps
        self._rules = rules
        self._twins = twins
        # The bodies that have taps or rules within, each with its taps.
        self._bodies: dict[Position, list[Position]] = {}
        for at in {**taps, **rules}:
            for i in range(1, len(at)):
                self._bodies.setdefault(at[:i], []).extend([at] if at in taps else [])

    def __call__(self, jaxpr: Any, inputs: Sequence[Any], probes: Probes) -> list[Any]:
        """The results of an open or closed jaxpr.

        Args:
          jaxpr: the jaxpr.
          inputs: its inputs.
          probes: zeros for the statistics of its sites.
        """
        # What taps are given goes into bodies with the probes. A tap that closed over a traced
        # array could not be within a `jax.jit` of the loss.
        given = {at: (probe, self._taps[at].given) for at, probe in probes.items()}
        return self._body(jaxpr, inputs, given, (), 0)

    def _body(
        self, jaxpr: Any, inputs: Sequence[Any], probes: Probes, position: Position, level: int
    ) -> list[Any]:
        """The results of a jaxpr at a position, with so many scans around it."""
        jaxpr, consts = jaxprs.opened(jaxpr)
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        tapped: dict[Position, list[Any]] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            at = (*position, i)
            if self._twins.get(at) in tapped:
                values.update(zip(eqn.outvars, tapped[self._twins[at]], strict=True))
                continue
            args = [jaxprs.value(atom, values) for atom in eqn.invars]
            if at in self._rules:
                results = self._rules[at](eqn, args, Body(jaxpr.eqns, values))
            elif at in self._bodies:
                inner = {p: probes[p] for p in self._bodies[at]}
                results = self._inside(eqn, args, inner, at, level)
            else:
                results = jaxprs.evaluate(eqn, args)
            if at in self._taps:
                tap = self._taps[at]
                read = tuple(args[i] for i in (tap.operand, *(i for i, _ in tap.more)))
                probe, given = probes[at]
                results = tapped[at] = [_tap(tap, results[0], (*read, *given), probe)]
            values.update(zip(eqn.outvars, results, strict=True))
        return [jaxprs.value(atom, values) for atom in jaxpr.outvars]

    def _inside(
        self, eqn: core.JaxprEqn, args: list[Any], probes: Probes, at: Position, level: int
    ) -> list[Any]:
        """Evaluates an equation with sites in its body, by the public JAX function for it."""
        params = eqn.params
        if eqn.primitive is primitives.scan_p:
            return self._scan(eqn, args, probes, at, level)
        if eqn.primitive is primitives.cond_p:
            branches = [
                self._function(branch, (*at, i), level)
                for i, branch in enumerate(params["branches"])
            ]
            return lax.switch(args[0], branches, args[1:], probes)
        assert eqn.primitive in CALLS
        body = self._function(params.get("jaxpr", params.get("call_jaxpr")), at, level)
        if eqn.primitive is primitives.remat_p:
            body = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
        elif eqn.primitive is primitives.jit_p:
            body = _jit(body, params)
        return body(args, probes)

    def _function(
        self, jaxpr: Any, at: Position, level: int
    ) -> Callable[[Sequence[Any], Probes], list[Any]]:
        return lambda inputs, probes: self._body(jaxpr, inputs, probes, at, level)

    def _scan(
        self, eqn: core.JaxprEqn, args: list[Any], probes: Probes, at: Position, level: int
    ) -> list[Any]:
        params = eqn.params
        split = jaxprs.scan_arity(eqn)
        consts, carry, xs = (
            args[: split.consts],
            args[split.consts : split.consts + split.carry],
            args[split.consts + split.carry :],
        )
        stacked = {p: probe for p, (probe, _) in probes.items() if self._taps[p].stacked[level]}
        summed = {p: probe for p, probe in probes.items() if p not in stacked}

        def body(carry: list[Any], trip: tuple[list[Any], Probes]) -> tuple[list, list]:
            inputs, slices = trip
            inner = summed | {p: (probe, probes[p][1]) for p, probe in slices.items()}
            results = self._body(params["jaxpr"], [*consts, *carry, *inputs], inner, at, level + 1)
            return results[: split.carry], results[split.carry :]

        carry, ys = lax.scan(
            body,
            carry,
            (xs, stacked),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]


def _tap(tap: Tap, z: jax.Array, read: tuple[jax.Array, ...], probe: Any) -> jax.Array:
    """The identity on z, whose transpose leaves the tap's statistic in the probe's gradient."""

    @jax.custom_vjp
    def identity(z: jax.Array, read: tuple[jax.Array, ...], probe: Any) -> jax.Array:
        return z

    def backward(read: tuple[jax.Array, ...], dz: jax.Array) -> tuple[jax.Array, None, Any]:
        x, *more = read
        return dz, None, tap(x, dz, *more)

    identity.defvjp(lambda z, read, probe: (z, read), backward)
    return identity(z, read, probe)


def _jit(body: Callable[..., Any], params: Mapping[str, Any]) -> Callable[..., Any]:
    """`jax.jit` of a body, with the name, inlining and shardings of the equation it replaces."""

    def placed(shardings: Sequence[Any]) -> list[Sharding | None] | None:
        kept = [s if isinstance(s, Sharding) else None for s in shardings]
        return kept if any(kept) else None

    body.__name__ = params["name"]
    options: dict[str, Any] = {"compiler_options": dict(params["compiler_options_kvs"]) or None}
    if inputs := placed(params["in_shardings"]):
        options["in_shardings"] = (inputs, None)
    if outputs := placed(params["out_shardings"]):
        options["out_shardings"] = outputs
    return jax.jit(body, inline=params["inline"], **options)
