"""Evaluates a loss's jaxpr with taps at its sites.

A tap is the identity on a site's output z, with a backward rule that hands on dz unchanged and
returns a statistic of (x, dz) as the "gradient" of a probe: an extra zero input. The gradients with
respect to the probes bring the statistics out of scanned, rematerialised, jitted and sharded code
within the one backward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import Sharding

from cqjax.capture import jaxprs
from cqjax.capture.block import Block
from cqjax.capture.sites import Position, Site
from cqjax.capture.statistics import Statistic

Probes = dict[Position, Statistic]
Taps = Mapping[Position, tuple[Block, Site]]


def taps(blocks: Sequence[Block]) -> Taps:
    """Each site's block, by the site's position."""
    return {site.position: (block, site) for block in blocks for site in block.sites}


def zero_probes(blocks: Sequence[Block]) -> Probes:
    """A zero for every statistic, with an axis for each loop that the statistic keeps apart."""
    probes = {}
    for block in blocks:
        for site in block.sites:
            one = jax.eval_shape(
                lambda x, dz, block=block, site=site: block.statistic(site, x, dz),
                jax.ShapeDtypeStruct(*site.x),
                jax.ShapeDtypeStruct(*site.z),
            )
            loops = [length for i, length in enumerate(site.loops) if block.scanned(site, i)]
            probes[site.position] = jax.tree.map(
                lambda s, loops=loops: jnp.zeros((*loops, *s.shape), s.dtype), one
            )
    return probes


class Evaluation:
    """Evaluates a jaxpr like `jax.core.eval_jaxpr`, tapping the sites on its way."""

    def __init__(self, taps: Taps):
        """Prepares the evaluation of a program with sites at the positions in `taps`."""
        self._taps = taps
        self._bodies = {at[:i] for at in taps for i in range(1, len(at))}

    def __call__(
        self,
        jaxpr: Any,
        inputs: Sequence[Any],
        probes: Probes,
        position: Position = (),
        level: int = 0,
    ) -> list[Any]:
        """The results of an open or closed jaxpr.

        Args:
          jaxpr: the jaxpr.
          inputs: its inputs.
          probes: zeros for the statistics of the sites within.
          position: where the jaxpr is.
          level: how many scans are around it.
        """
        jaxpr, consts = jaxprs.opened(jaxpr)
        values = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            if jaxprs.is_literal(atom):
                return np.asarray(atom.val, atom.aval.dtype)
            return values[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            at = (*position, i)
            args = [read(atom) for atom in eqn.invars]
            if at in self._taps:
                results = self._site(eqn, args, *self._taps[at], probes[at])
            elif at in self._bodies:
                inner = {p: probe for p, probe in probes.items() if p[: len(at)] == at}
                results = self._inside(eqn, args, inner, at, level)
            else:
                results = jaxprs.evaluate(eqn, args)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _site(
        self, eqn: core.JaxprEqn, args: list[Any], block: Block, site: Site, probe: Statistic
    ) -> list[Any]:
        (z,) = jaxprs.evaluate(eqn, args)
        x = args[site.operand]
        return [_tap(lambda x, dz: block.statistic(site, x, dz), z, x, probe)]

    def _inside(
        self, eqn: core.JaxprEqn, args: list[Any], probes: Probes, at: Position, level: int
    ) -> list[Any]:
        """Evaluates an equation with sites in its body, by the public call that makes such one."""
        params = eqn.params
        if eqn.primitive is primitives.scan_p:
            return self._scan(eqn, args, probes, at, level)
        if eqn.primitive is primitives.cond_p:
            branches = [
                self._function(branch, (*at, i), level)
                for i, branch in enumerate(params["branches"])
            ]
            return lax.switch(args[0], branches, args[1:], probes)
        body = self._function(params.get("jaxpr", params.get("call_jaxpr")), at, level)
        if eqn.primitive is primitives.remat_p:
            body = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
        elif eqn.primitive is primitives.jit_p:
            body = _jit(body, params)
        return body(args, probes)

    def _function(
        self, jaxpr: Any, at: Position, level: int
    ) -> Callable[[Sequence[Any], Probes], list[Any]]:
        return lambda inputs, probes: self(jaxpr, inputs, probes, at, level)

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
        stacked = {
            p: probes[p] for p in probes if self._taps[p][0].scanned(self._taps[p][1], level)
        }
        summed = {p: probe for p, probe in probes.items() if p not in stacked}

        def body(carry: list[Any], trip: tuple[list[Any], Probes]) -> tuple[list, list]:
            inputs, probes = trip
            results = self(
                params["jaxpr"], [*consts, *carry, *inputs], summed | probes, at, level + 1
            )
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


def _tap(
    statistic: Callable[[jax.Array, jax.Array], Statistic],
    z: jax.Array,
    x: jax.Array,
    probe: Statistic,
) -> jax.Array:
    """The identity on z, whose transpose leaves `statistic(x, dz)` in the probe's gradient."""

    @jax.custom_vjp
    def identity(z: jax.Array, x: jax.Array, probe: Statistic) -> jax.Array:
        return z

    identity.defvjp(lambda z, x, probe: (z, x), lambda x, dz: (dz, None, statistic(x, dz)))
    return identity(z, x, probe)


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
