"""One abstract walk over a loss's jaxpr: where parameters meet activations, or anything else.

Every variable gets a tag: a `View` of parameters, a `Spread` (a view broadcast to more axes: a bias
on its way), an `Output` (a site's result, possibly transposed or reshaped), or nothing. The walk
goes into `jit`, `remat`, `scan` and `cond`; whatever else a view enters is recorded as a use.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import primitives

from cqjax.capture import jaxprs, matrix_form, views
from cqjax.capture.jaxprs import aval
from cqjax.capture.matrix_form import Form, Layout
from cqjax.capture.views import View

Position = tuple[int, ...]
"""Where an equation is: its index, after those of the equations (and branches) around it."""


@dataclasses.dataclass(frozen=True)
class Bias:
    """A view of a parameter that is added to every row of a site's output.

    Attributes:
      view: the parameter's entries, as they are added.
      layout: from the view's array to (B, o).
    """

    view: View
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Site:
    """An equation Z = XW whose W is a view of parameters.

    Attributes:
      position: where the equation is.
      view: the weight.
      form: the equation's matrix form, of one trip of the loops around it.
      loops: lengths of the scans around the equation, outermost first.
      operand: which of the equation's operands is the activation.
      x: shape and dtype of the activation.
      z: shape and dtype of the result.
      varying: mesh axes over which a surrounding `shard_map` splits the result.
      bias: what is added to every row of Z; None if nothing is.
    """

    position: Position
    view: View
    form: Form
    loops: tuple[int, ...]
    operand: int
    x: tuple[tuple[int, ...], Any]
    z: tuple[tuple[int, ...], Any]
    varying: frozenset[str]
    bias: Bias | None = None

    @property
    def shared_trips(self) -> int:
        """How often the site runs with the same weight."""
        return math.prod(self.loops) // math.prod(length for _, length in self.view.loops)


@dataclasses.dataclass(frozen=True)
class _Spread:
    view: View
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Output:
    site: int
    axes: tuple[tuple[int, ...], ...]


_Tag = View | _Spread | _Output | None


class Walk:
    """The walk's record.

    Attributes:
      sites: the sites, in the order of the program.
      uses: for each parameter's path, what it enters besides sites and biases.
    """

    def __init__(self, jaxpr: Any, paths: Sequence[str]):
        """Walks `jaxpr`, whose first inputs are parameters and whose first output is the loss.

        Args:
          jaxpr: an open jaxpr.
          paths: the parameters' paths.
        """
        self.sites: list[Site] = []
        self.uses: dict[str, list[str]] = {path: [] for path in paths}
        tags: list[_Tag] = [None] * len(jaxpr.invars)
        for i, path in enumerate(paths):
            tags[i] = views.parameter(path, aval(jaxpr.invars[i]).shape)
        live = jaxprs.live_equations(jaxpr, jaxpr.outvars[:1])
        self._walk(jaxpr, tags, (), (), live)

    def _walk(
        self,
        jaxpr: Any,
        inputs: Sequence[_Tag],
        position: Position,
        loops: tuple[int, ...],
        live: Sequence[bool] | None = None,
    ) -> list[_Tag]:
        tags: dict[Any, _Tag] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Tag:
            return None if jaxprs.is_literal(atom) else tags.get(atom)

        for i, eqn in enumerate(jaxpr.eqns):
            if live is not None and not live[i]:
                continue
            args = [read(atom) for atom in eqn.invars]
            if any(tag is not None for tag in args):
                results = self._equation(eqn, args, (*position, i), loops)
                tags.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, eqn: core.JaxprEqn, args: list[_Tag], position: Position, loops: tuple[int, ...]
    ) -> Sequence[_Tag]:
        nothing = [None] * len(eqn.outvars)
        inner = self._inner(eqn, args, position, loops)
        if inner is not None:
            return inner
        moved = views.moved(eqn, [tag if isinstance(tag, View) else None for tag in args])
        if moved is not None:
            return moved
        if len(args) == 1 and isinstance(args[0], _Output):
            return [_follow(eqn, args[0], self.sites[args[0].site].form)] * len(eqn.outvars)
        if len(args) == 1 and isinstance(args[0], View | _Spread):
            spread = _spread(eqn, args[0])
            if spread is not None:
                return [spread]
        if eqn.primitive is primitives.stop_gradient_p:
            return nothing
        if eqn.primitive is primitives.add_p and self._bias(args):
            return nothing
        entering = [(i, tag) for i, tag in enumerate(args) if isinstance(tag, View | _Spread)]
        reason = "is combined with another parameter"
        if len(entering) == 1:
            ((weight, tag),) = entering
            form = matrix_form.matrix_form(eqn, weight)
            if isinstance(tag, View) and not isinstance(form, str):
                return [self._site(eqn, tag, weight, form, position, loops)]
            reason = form if isinstance(form, str) else "is broadcast before a product"
        for _, tag in entering:
            self._use(tag.view if isinstance(tag, _Spread) else tag, reason)
        return nothing

    def _use(self, view: View, reason: str) -> None:
        for path in view.paths:
            if reason not in self.uses[path]:
                self.uses[path].append(reason)

    def _site(
        self,
        eqn: core.JaxprEqn,
        view: View,
        weight: int,
        form: Form,
        position: Position,
        loops: tuple[int, ...],
    ) -> _Output:
        x, z = aval(eqn.invars[1 - weight]), aval(eqn.outvars[0])
        varying = frozenset(getattr(z, "vma", ()))
        site = Site(
            position=position,
            view=view,
            form=form,
            loops=loops,
            operand=1 - weight,
            x=(x.shape, x.dtype),
            z=(z.shape, z.dtype),
            varying=varying,
        )
        self.sites.append(site)
        return _Output(len(self.sites) - 1, form.axes)

    def _bias(self, args: list[_Tag]) -> bool:
        """Attaches an added view to the site whose output it is added to, if it is a bias."""
        outputs = [tag for tag in args if isinstance(tag, _Output)]
        added = [tag for tag in args if isinstance(tag, View | _Spread)]
        if len(outputs) != 1 or len(added) != 1:
            return False
        output, tag = outputs[0], added[0]
        view, sizes = (tag, tag.shape) if isinstance(tag, View) else (tag.view, tag.sizes)
        site = self.sites[output.site]
        layout = _bias_layout(site.form, output.axes, sizes)
        if layout is None or view.loops != site.view.loops or site.bias is not None:
            return False
        self.sites[output.site] = dataclasses.replace(site, bias=Bias(view, layout))
        return True

    def _inner(
        self, eqn: core.JaxprEqn, args: list[_Tag], position: Position, loops: tuple[int, ...]
    ) -> Sequence[_Tag] | None:
        """Tags of the results of an equation with a body that the walk goes into; else None."""
        if eqn.primitive in (primitives.jit_p, primitives.remat_p, primitives.closed_call_p):
            body, _ = jaxprs.opened(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
            return self._walk(body, args, position, loops)
        if eqn.primitive is primitives.cond_p:
            for i, branch in enumerate(eqn.params["branches"]):
                operands = [_no_output(tag) for tag in args[1:]]
                self._walk(jaxprs.opened(branch)[0], operands, (*position, i), loops)
            return [None] * len(eqn.outvars)
        if eqn.primitive is primitives.scan_p:
            return self._scan(eqn, [_no_output(tag) for tag in args], position, loops)
        return None

    def _scan(
        self, eqn: core.JaxprEqn, args: list[_Tag], position: Position, loops: tuple[int, ...]
    ) -> Sequence[_Tag]:
        body, _ = jaxprs.opened(eqn.params["jaxpr"])
        consts, carry = jaxprs.scan_arity(eqn)
        inputs = list(args)
        constant = [body.outvars[i] is body.invars[consts + i] for i in range(carry)]
        for i in range(carry):
            tag = args[consts + i]
            if isinstance(tag, View) and not constant[i]:
                self._use(tag, "is changed from trip to trip of a scan")
                inputs[consts + i] = None
        for i in range(consts + carry, len(args)):
            tag = args[i]
            if isinstance(tag, View):
                inputs[i] = views.sliced(tag, len(loops))
            elif isinstance(tag, _Spread):
                self._use(tag.view, "is broadcast and scanned over")
                inputs[i] = None
        outputs = self._walk(body, inputs, position, (*loops, eqn.params["length"]))
        for tag in outputs[carry:]:
            if isinstance(tag, View):
                self._use(tag, "is stacked by a scan")
        kept = [args[consts + i] if constant[i] else None for i in range(carry)]
        return [*kept, *([None] * (len(eqn.outvars) - carry))]


def _no_output(tag: _Tag) -> _Tag:
    return None if isinstance(tag, _Output) else tag


def _spread(eqn: core.JaxprEqn, tag: View | _Spread) -> _Spread | None:
    """The tag of a view after a broadcast, or None if the equation is none."""
    view, before = (tag, tag.shape) if isinstance(tag, View) else (tag.view, tag.sizes)
    if views.keeps_entries(eqn):
        return _Spread(view, before)
    if eqn.primitive is not primitives.broadcast_in_dim_p:
        return None
    sizes = [1] * len(aval(eqn.outvars[0]).shape)
    for axis, size in zip(eqn.params["broadcast_dimensions"], before, strict=True):
        sizes[axis] = size
    return _Spread(view, tuple(sizes))


def _follow(eqn: core.JaxprEqn, tag: _Output, form: Form) -> _Tag:
    """The tag of a site's output after an operation that only moves its entries."""
    axes, shape = tag.axes, aval(eqn.outvars[0]).shape
    if eqn.primitive is primitives.transpose_p:
        axes = tuple(axes[i] for i in eqn.params["permutation"])
    elif eqn.primitive in (primitives.reshape_p, primitives.squeeze_p):
        dimensions = eqn.params.get("dimensions")
        if eqn.primitive is primitives.reshape_p and dimensions is not None:
            axes = tuple(axes[i] for i in dimensions)
        regrouped = _regroup([i for axis in axes for i in axis], form.output.sizes, shape)
        if regrouped is None:
            return None
        axes = regrouped
    elif not views.keeps_entries(eqn):
        return None
    return _Output(tag.site, axes)


def _regroup(
    factors: list[int], sizes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """Which factors each axis of a reshaped output is made of, or None if it cuts one in two."""
    remaining = [i for i in factors if sizes[i] != 1]
    axes = []
    for size in shape:
        axis, product = [], 1
        while product < size and remaining:
            axis.append(remaining.pop(0))
            product *= sizes[axis[-1]]
        if product != size:
            return None
        axes.append(tuple(axis))
    return tuple(axes) if not remaining else None


def _bias_layout(
    form: Form, axes: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]
) -> Layout | None:
    """Layout (B, o) of a view that is added along output axes only; None if it is no bias."""
    lengths, (batch, rows, outputs) = form.output.sizes, form.output.groups
    kept: list[int] = []
    for axis, size in zip(axes, sizes, strict=True):
        factors = [i for i in axis if lengths[i] != 1]
        if all(i in rows for i in factors) and size == 1:
            continue
        if any(i in rows for i in factors) or size != math.prod(lengths[i] for i in factors):
            return None
        kept += factors
    groups = [[kept.index(i) for i in group if i in kept] for group in (batch, outputs)]
    if len(kept) != sum(lengths[i] != 1 for i in (*batch, *outputs)):
        return None
    return Layout(tuple(lengths[i] for i in kept), (tuple(groups[0]), tuple(groups[1])))
