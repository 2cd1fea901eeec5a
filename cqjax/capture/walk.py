"""One abstract walk over a loss's jaxpr: where parameters meet activations, or anything else.

Every variable gets a tag: a `View` of parameters, a `Spread` (a view broadcast to more axes: a bias
on its way), an `Output` (a site's result, possibly transposed or reshaped), or nothing. The walk
goes into `jit`, `remat`, `scan` and `cond`; whatever else a view enters is recorded as a use.
"""

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import primitives

from cqjax.capture import jaxprs, matrix_form, views
from cqjax.capture.jaxprs import aval
from cqjax.capture.matrix_form import Form, Lookup
from cqjax.capture.sites import Bias, Position, Site
from cqjax.capture.tags import Output, Spread, Tag, bias_layout, follow
from cqjax.capture.views import View


class Use(NamedTuple):
    """Where a parameter enters an equation that is no product with it.

    Attributes:
      reason: what it does there, in words.
      position: where the equation is.
      primitive: name of its primitive.
    """

    reason: str
    position: Position
    primitive: str


class Walk:
    """The walk's record.

    Attributes:
      sites: the sites, in the order of the program.
      uses: for each parameter's path, what it enters besides sites and biases.
    """

    def __init__(self, jaxpr: Any, paths: Sequence[str], data: Set[Position]):
        """Walks `jaxpr`, whose first inputs are parameters and whose first output is the loss.

        Args:
          jaxpr: an open jaxpr.
          paths: the parameters' paths.
          data: the equations that depend on data.
        """
        self._data = data
        self.sites: list[Site] = []
        self.uses: dict[str, list[Use]] = {path: [] for path in paths}
        self._reads: list[int] = []
        self._varying = dict(zip(paths, map(jaxprs.varying, jaxpr.invars), strict=False))
        self._sizes = jax.sharding.get_abstract_mesh().shape
        self._recomputed = 0
        tags: list[Tag] = [None] * len(jaxpr.invars)
        for i, path in enumerate(paths):
            tags[i] = views.parameter(path, aval(jaxpr.invars[i]).shape)
        needed = [i == 0 for i in range(len(jaxpr.outvars))]
        self._leave(self._walk(jaxpr, tags, (), (), needed)[:1], "is the loss")
        self._without_shared_outputs()

    def _walk(
        self,
        jaxpr: Any,
        inputs: Sequence[Tag],
        position: Position,
        loops: tuple[int, ...],
        needed: Sequence[bool],
    ) -> list[Tag]:
        """Tags of the results of a jaxpr of which the loss depends on those that are `needed`."""
        tags: dict[Any, Tag] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Tag:
            return None if jaxprs.is_literal(atom) else tags.get(atom)

        live = jaxprs.needed_results(jaxpr, needed)
        for i, (eqn, wanted) in enumerate(zip(jaxpr.eqns, live, strict=True)):
            args = [read(atom) for atom in eqn.invars]
            if any(wanted) and any(tag is not None for tag in args):
                results = self._inner(eqn, args, (*position, i), loops, wanted)
                if results is None:
                    results = self._equation(eqn, args, (*position, i), loops)
                tags.update(zip(eqn.outvars, results, strict=True))
        return [
            read(atom) if need else None for atom, need in zip(jaxpr.outvars, needed, strict=True)
        ]

    def _equation(
        self, eqn: core.JaxprEqn, args: list[Tag], position: Position, loops: tuple[int, ...]
    ) -> Sequence[Tag]:
        """Tags of the results of an equation without a body, after recording what it does."""
        nothing = [None] * len(eqn.outvars)
        moved = views.moved(eqn, [tag if isinstance(tag, View) else None for tag in args])
        if moved is not None:
            return moved
        if len(args) == 1 and args[0] is not None:
            followed = follow(eqn, args[0], self.sites)
            if followed is not None:
                return [followed]
        if eqn.primitive is primitives.stop_gradient_p:
            return nothing
        for tag in args:
            if isinstance(tag, Output):
                self._reads[tag.site] += 1
        if eqn.primitive is primitives.add_p and self._bias(args):
            return nothing
        entering = [(i, tag) for i, tag in enumerate(args) if isinstance(tag, View | Spread)]
        reason = "is combined with another parameter"
        if len(entering) == 1:
            ((weight, tag),) = entering
            form = matrix_form.matrix_form(eqn, weight)
            if isinstance(tag, View) and not isinstance(form, str):
                return [self._site(eqn, tag, weight, form, position, loops)]
            reason = form if isinstance(form, str) else "is broadcast before a product"
        for _, tag in entering:
            self._use(tag, reason, position, eqn.primitive.name)
        return nothing

    def _leave(self, tags: Sequence[Tag], reason: str) -> None:
        """Records that values leave the part of the program in which their tags are followed."""
        for tag in tags:
            if isinstance(tag, Output):
                self._reads[tag.site] += 1
            elif tag is not None:
                self._use(tag, reason)

    def _without_shared_outputs(self) -> None:
        """Takes the bias from sites whose output is used without it as well."""
        for i, site in enumerate(self.sites):
            if site.bias is not None and self._reads[i] > 1:
                self._use(site.bias.view, "is added to an output that is used without it too")
                self.sites[i] = dataclasses.replace(site, bias=None)

    def _use(
        self, tag: View | Spread, reason: str, position: Position = (), primitive: str = ""
    ) -> None:
        use = Use(reason, position, primitive)
        for path in (tag.view if isinstance(tag, Spread) else tag).paths:
            if use not in self.uses[path]:
                self.uses[path].append(use)

    def _site(
        self,
        eqn: core.JaxprEqn,
        view: View,
        weight: int,
        form: Form,
        position: Position,
        loops: tuple[int, ...],
    ) -> Tag:
        x, z = aval(eqn.invars[1 - weight]), aval(eqn.outvars[0])
        if not (x.size and z.size and math.prod(view.shape) and math.prod(loops)):
            self._use(view, "enters a product without entries", position)
            return None
        _check_placement(view, x, z)
        own, *others = {self._varying[path] for path in view.paths}
        if others:
            self._use(view, "is joined with one that varies over other mesh axes", position)
            return None
        varying = jaxprs.varying(eqn.invars[1 - weight]) | jaxprs.varying(eqn.outvars[0])
        site = Site(
            position=position,
            view=view,
            form=form,
            loops=loops,
            operand=1 - weight,
            x=(x.shape, x.dtype),
            z=(z.shape, z.dtype),
            recomputed=self._recomputed > 0,
            varying=varying,
            spread=tuple((axis, self._sizes[axis]) for axis in sorted(varying - own)),
            shared=position not in self._data,
        )
        self.sites.append(site)
        self._reads.append(0)
        return Output(len(self.sites) - 1, form.axes)

    def _bias(self, args: list[Tag]) -> bool:
        """Attaches an added view to the site whose output it is added to, if it is a bias."""
        outputs = [
            tag
            for tag in args
            if isinstance(tag, Output) and not isinstance(self.sites[tag.site].form, Lookup)
        ]
        added = [tag for tag in args if isinstance(tag, View | Spread)]
        if len(outputs) != 1 or len(added) != 1:
            return False
        output, tag = outputs[0], added[0]
        view, sizes = (tag, tag.shape) if isinstance(tag, View) else (tag.view, tag.sizes)
        site, rank = self.sites[output.site], len(output.axes)
        layout = bias_layout(site.form, output.axes, sizes or (1,) * rank)
        varying = {self._varying[path] for path in (*view.paths, *site.view.paths)}
        if layout is None or view.loops != site.view.loops or site.bias or len(varying) > 1:
            return False
        self.sites[output.site] = dataclasses.replace(site, bias=Bias(view, layout))
        return True

    def _inner(
        self,
        eqn: core.JaxprEqn,
        args: list[Tag],
        position: Position,
        loops: tuple[int, ...],
        needed: Sequence[bool],
    ) -> Sequence[Tag] | None:
        """Tags of the results of an equation with a body that the walk goes into; else None."""
        if eqn.primitive in (primitives.jit_p, primitives.remat_p, primitives.closed_call_p):
            body, _ = jaxprs.opened(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
            recomputed = eqn.primitive is primitives.remat_p
            self._recomputed += recomputed
            results = self._walk(body, args, position, loops, needed)
            self._recomputed -= recomputed
            return results
        if eqn.primitive is primitives.cond_p and not eqn.params.get("branches_platforms"):
            for i, branch in enumerate(eqn.params["branches"]):
                operands = self._without_outputs(args[1:])
                body, _ = jaxprs.opened(branch)
                results = self._walk(body, operands, (*position, i), loops, needed)
                self._leave(results, "is returned by a branch")
            return [None] * len(eqn.outvars)
        if eqn.primitive is primitives.scan_p:
            return self._scan(eqn, self._without_outputs(args), position, loops, needed)
        return None

    def _scan(
        self,
        eqn: core.JaxprEqn,
        args: list[Tag],
        position: Position,
        loops: tuple[int, ...],
        needed: Sequence[bool],
    ) -> Sequence[Tag]:
        body, _ = jaxprs.opened(eqn.params["jaxpr"])
        consts, carry = jaxprs.scan_arity(eqn)
        constant = [body.outvars[i] is body.invars[consts + i] for i in range(carry)]
        inputs = list(args)
        for i, tag in enumerate(args):
            if consts <= i < consts + carry and not constant[i - consts]:
                self._leave([tag], "is changed from trip to trip of a scan")
                inputs[i] = None
            elif i >= consts + carry and isinstance(tag, View):
                inputs[i] = views.sliced(tag, len(loops))
            elif i >= consts + carry:
                self._leave([tag], "is broadcast and scanned over")
                inputs[i] = None
        wanted = [i < carry or need for i, need in enumerate(needed)]
        results = self._walk(body, inputs, position, (*loops, eqn.params["length"]), wanted)
        kept = [args[consts + i] if constant[i] else None for i in range(carry)]
        changed = [tag for i, tag in enumerate(results) if i >= carry or not constant[i]]
        self._leave(changed, "is returned by a scan")
        return [*kept, *([None] * (len(eqn.outvars) - carry))]

    def _without_outputs(self, tags: Sequence[Tag]) -> list[Tag]:
        """Tags of what enters a body in which a site's output from outside is not followed."""
        self._leave([tag for tag in tags if isinstance(tag, Output)], "")
        return [None if isinstance(tag, Output) else tag for tag in tags]


def _check_placement(view: View, x: Any, z: Any) -> None:
    """Refuses arrays whose types carry a sharding.

    Raises:
      ValueError: names the parameter, and says what to do.
    """
    for array in (x, z):
        spec = getattr(getattr(array, "sharding", None), "spec", ())
        if any(axis is not None for axis in spec):
            raise ValueError(
                f"{' + '.join(view.paths)} meets an activation whose type is sharded ({array}), "
                "since its mesh has explicit axes; expected automatic ones: make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,), and jax.jit will place the statistics"
            )
