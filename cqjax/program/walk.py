"""One loop over a program: finds parameters' products, and their other uses.

Every variable gets a tag: a `View` of parameters, a `Spread` (a view broadcast to more axes: a bias
on its way), an `Output` (a site's result, possibly transposed or reshaped), or nothing. Where a
view enters a product with an activation there is a site; whatever else it enters is a use.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple, assert_never

import jax
import numpy as np
from jax.extend.core import primitives

from cqjax.linalg import devices
from cqjax.program import jaxprs, lookups, masks, opaque, operators, views
from cqjax.program.forms import Form, Lookup
from cqjax.program.jaxprs import Equation, Shaped
from cqjax.program.known import Known
from cqjax.program.made import Made
from cqjax.program.matrix_form import matrix_form
from cqjax.program.operators import Operators
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Bias, Site
from cqjax.program.steps import Kind, Number, Position, Program, Step, differentiated
from cqjax.program.tags import Output, Spread, Tag, bias_layout, follow, scaled
from cqjax.program.views import View


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


class Record(NamedTuple):
    """What the walk found.

    Attributes:
      sites: the sites, in the order of the program.
      uses: for each parameter's path, what it enters besides sites and biases.
      made: the weights that the loss makes of parameters.
    """

    sites: tuple[Site, ...]
    uses: Mapping[str, tuple[Use, ...]]
    made: Made


def walk(
    program: Program,
    paths: Sequence[str],
    avals: Sequence[Any],
    batch: Set[int],
    known: Known,
    made: Made,
    reparametrized: bool,
) -> Record:
    """Finds the sites and the other uses of parameters in a loss.

    Args:
      program: the loss. Its first inputs are the parameters, its first output is the loss.
      paths: the parameters' paths.
      avals: the parameters' abstract values.
      batch: the variables that depend on the batch.
      known: the variables whose values the program's text fixes.
      made: finds the weights that the loss makes of parameters.
      reparametrized: whether there are sites of weights that the loss makes of parameters.
    """
    return _Walk(program, paths, avals, batch, known, made).record(reparametrized)


class _Walk:
    def __init__(
        self,
        program: Program,
        paths: Sequence[str],
        avals: Sequence[Any],
        batch: Set[int],
        known: Known,
        made: Made,
    ):
        self._program = program
        self._known = known
        self._varying = dict(zip(paths, map(jaxprs.varying, avals), strict=True))
        self._mesh_sizes = jax.sharding.get_abstract_mesh().shape
        self._tags: dict[Number, Tag] = {
            number: views.parameter(path, aval.shape)
            for number, path, aval in zip(program.inputs, paths, avals, strict=False)
        }
        self._sites: list[Site] = []
        self._with_bias: dict[int, Site] = {}  # as they are if nothing else reads their outputs
        self._operators = Operators(program, len(paths), batch)
        self._made = made
        self._stopped: dict[Number, Number] = {}  # what their gradient is stopped from reaching
        self._reads: list[int] = []  # how often each site's output is read, by a bias too
        self._uses: dict[str, list[Use]] = {path: [] for path in paths}

    def record(self, reparametrized: bool) -> Record:
        loss = self._program.outputs[:1]
        # What the loss does not depend on has no gradient: a product there is no site.
        needed = self._program.needed(loss, differentiated)
        for step in self._program.steps:
            self._step(step, needed)
        self._leave(loss, "is the loss")
        self._drop_shared_outputs()
        self._drop_operators()
        sites, uses = self._made.settled(self._sites, self._uses, reparametrized)
        for site in self._sites:
            if site.view.made and site.bias is not None and site not in sites:
                reason = "is the bias of a layer whose weight is not solved for"
                for path in site.bias.view.paths:
                    uses[path].append(Use(reason, site.position, "add"))
        return Record(tuple(sites), {path: tuple(us) for path, us in uses.items()}, self._made)

    def _step(self, step: Step, needed: Set[int]) -> None:
        """Gives tags to what a step writes, as far as it is needed."""
        match step.kind:
            case Kind.LAST:
                # What a trip leaves may be needed by the next one only, and not after the last.
                self._leave([n for n in step.reads if n in needed], "is returned by a scan")
            case _ if needed.isdisjoint(step.writes):
                return
            case Kind.EQUATION:
                args = [self._tags.get(n) for n in step.reads]
                found = any(tag is not None for tag in args)
                results = self._equation(step, args) if found else ()
                if not any(results) and (made := self._made.weight(step)):
                    results = [self._site(step, made.view, made.operand, made.form)]
                self._tags.update(zip(step.writes, results, strict=bool(results)))
            case Kind.ENTER | Kind.CLOSE | Kind.SLICE | Kind.STACK:
                for read, written in zip(step.reads, step.writes, strict=True):
                    if written in needed:
                        self._tags[written] = self._crossing(step, read)
            case Kind.CARRY:
                self._leave(step.reads[:1], "is changed from trip to trip of a scan")
            case Kind.JOIN:
                self._leave(step.reads[1:], "is returned by a branch")
            case _:
                assert_never(step.kind)
        self._operators.step(step, self._tags)

    def _crossing(self, step: Step, read: Number) -> Tag:
        """The tag that a variable has on the other side of a border.

        A site's output is not followed into a body: no site gets a bias added there.
        """
        tag = self._tags.get(read)
        if isinstance(tag, Output):
            self._leave([read], "")
        elif step.kind is Kind.ENTER:
            return tag
        elif step.kind is Kind.CLOSE:
            self._leave([read], "enters a branch for one platform")
        elif step.kind is Kind.STACK:
            self._leave([read], "is returned by a scan")
        elif isinstance(tag, View):
            return views.sliced(tag, len(step.loops))
        else:
            self._leave([read], "is broadcast and scanned over")
        return None

    def _equation(self, step: Step, args: list[Tag]) -> Sequence[Tag]:
        """Tags of the results of an equation, after recording what it does."""
        equation = step.equation
        nothing = [None] * len(equation.outputs)
        if equation.primitive is primitives.pad_p and self._known.scalar(step.reads[1], 0):
            args = args[:1]
        results = views.results(equation, [t if isinstance(t, View) else None for t in args])
        if results is not None:
            return results
        if equation.primitive is primitives.dynamic_slice_p and isinstance(args[0], View):
            read = lookups.read_in_turn(step, args[0], self._known)
            if read is not None:
                return [read]
        if len(args) == 1 and args[0] is not None:
            followed = follow(equation, args[0], self._sites)
            if followed is not None:
                return [followed]
        tagged = [(i, tag) for i, tag in enumerate(args) if tag is not None]
        if len(tagged) == 1:
            ((at, tag),) = tagged
            if equation.primitive is primitives.add_p and self._is_zero(step.reads[1 - at]):
                return [tag]  # sums in Python and in `jax.experimental.jet` begin with 0
            by = self._known.factor(step, at)
            same = None if by is None else scaled(tag, by, self._sites)
            if same is not None:
                return [same]
        unstopped = self._partly_stopped(step, args)
        if unstopped is not None:
            return [unstopped]
        if equation.primitive is primitives.stop_gradient_p:
            self._stopped[step.writes[0]] = step.reads[0]
            return nothing
        for tag in args:
            if isinstance(tag, Output):
                self._reads[tag.site] += 1
        if equation.primitive in (primitives.add_p, primitives.sub_p) and self._attach_bias(
            args, equation.primitive is primitives.sub_p
        ):
            return nothing
        entering = [(i, tag) for i, tag in enumerate(args) if isinstance(tag, View | Spread)]
        reason = opaque.reason(equation) or "is combined with another parameter"
        if len(entering) == 1:
            ((weight, tag),) = entering
            form = matrix_form(equation, weight, tag.sizes if isinstance(tag, Spread) else None)
            if not isinstance(form, str):
                return [self._site(step, tag, weight, form)]
            reason = form
        for _, tag in entering:
            self._use(tag, Use(reason, step.position, equation.primitive.name))
        return nothing

    def _partly_stopped(self, step: Step, args: list[Tag]) -> Tag:
        """The tag of a broadcast view whose gradient is stopped where a predicate is false.

        So `jax.vmap` of `jax.lax.cond` keeps derivatives of a branch that is not taken from
        becoming NaN. The value is the view's own.
        """
        if step.equation.primitive is not primitives.select_n_p or len(step.reads) != 3:
            return None
        _, *cases = step.reads
        for variable, other, tag in zip(cases, reversed(cases), args[1:], strict=True):
            if isinstance(tag, Spread) and self._stopped.get(other) == variable:
                return dataclasses.replace(tag, stopped=True)
        return None

    def _leave(self, variables: Sequence[Number], reason: str) -> None:
        """Records that variables leave the part of the program in which tags are followed."""
        for tag in map(self._tags.get, variables):
            if isinstance(tag, Output):
                self._reads[tag.site] += 1
            elif tag is not None:
                self._use(tag, Use(reason, (), ""))

    def _is_zero(self, number: Number) -> bool:
        literal = self._program.literals.get(number)
        return literal is not None and not np.ndim(literal) and literal == 0

    def _use(self, tag: View | Spread, use: Use) -> None:
        for path in (tag.view if isinstance(tag, Spread) else tag).paths:
            if use not in self._uses[path]:
                self._uses[path].append(use)

    def _site(self, step: Step, tag: View | Spread, weight: int, form: Form) -> Tag:
        """Adds a site. Returns its output's tag."""
        equation, view = step.equation, tag.view if isinstance(tag, Spread) else tag
        operand = form.operand if isinstance(form, Lookup) else 1 - weight
        x, z = equation.inputs[operand], equation.outputs[0]
        if not (x.size and z.size and math.prod(view.shape) and math.prod(step.loops)):
            self._use(view, Use("enters a product without entries", step.position, ""))
            return None
        own, *others = {self._varying[path] for path in view.paths}
        if others:
            reason = "is joined with one that varies over other mesh axes"
            self._use(view, Use(reason, step.position, ""))
            return None
        if view.holes:
            masked = masks.masked(form, view.pattern().reshape(-1, *view.shape))
            if isinstance(masked, str):
                self._use(view, Use(masked, step.position, ""))
                return None
            form = masked
        varying = jaxprs.varying(x) | jaxprs.varying(z)
        site = Site(
            position=step.position,
            view=view,
            form=form,
            loops=step.loops,
            operand=operand,
            source=step.reads[operand],
            x=jaxprs.shaped(x),
            z=jaxprs.shaped(z),
            sizes=_sizes(equation, form),
            recomputed=step.recomputed,
            stopped=isinstance(tag, Spread) and tag.stopped,
            varying=varying,
            spread=tuple((axis, self._mesh_sizes[axis]) for axis in sorted(varying - own)),
            automatic=devices.within_automatic(x),
        )
        self._sites.append(site)
        self._reads.append(0)
        if isinstance(form, Lookup):
            self._operators.looked_up(len(self._sites) - 1, step.writes[0])
        return Output(len(self._sites) - 1, form.axes)

    def _attach_bias(self, args: list[Tag], subtracts: bool) -> bool:
        """Gives an added view to the site whose output it is added to, if it is a bias.

        Whether the sum is the output's only use is known at the end: see `_drop_shared_outputs`.
        """
        if subtracts and args[1] is not None:
            args = [args[0], scaled(args[1], np.array(-1.0), self._sites)]
        outputs = [
            tag
            for tag in args
            if isinstance(tag, Output)
            and not isinstance(self._sites[tag.site].form, Lookup | Ragged)
        ]
        added = [tag for tag in args if isinstance(tag, View | Spread)]
        if len(outputs) != 1 or len(added) != 1:
            return False
        output, tag = outputs[0], added[0]
        view, sizes = (tag, tag.shape) if isinstance(tag, View) else (tag.view, tag.sizes)
        site, rank = self._sites[output.site], len(output.axes)
        layout = bias_layout(site.form, output.axes, sizes or (1,) * rank)
        varying = {self._varying[path] for path in (*view.paths, *site.view.paths)}
        known = output.site in self._with_bias
        if layout is None or view.loops != site.view.loops or known or len(varying) > 1:
            return False
        stopped = site.stopped or (isinstance(tag, Spread) and tag.stopped)
        site = site.with_bias(Bias(view, layout), output.scale)
        self._with_bias[output.site] = dataclasses.replace(site, stopped=stopped)
        return True

    def _drop_shared_outputs(self) -> None:
        """Leaves without a bias the sites whose output is used without it as well.

        The gradient of such a bias is not the sum over the rows of ∂L/∂Z, which also has a part
        from the other use. So it cannot be a further feature of X.
        """
        for i, site in self._with_bias.items():
            if self._reads[i] == 1:
                self._sites[i] = site
            elif site.bias is not None:
                reason = "is added to an output that is used without it too"
                self._use(site.bias.view, Use(reason, (), primitives.add_p.name))

    def _drop_operators(self) -> None:
        """Leaves out the lookups whose rows act on activations."""
        self._sites, dropped = operators.parted(self._sites, self._operators.acting)
        for site in dropped:
            self._use(site.view, Use(operators.REASON, site.position, ""))


def _sizes(equation: Equation, form: Form) -> Shaped | None:
    """The type of the operand with the sizes of a ragged product's groups."""
    return jaxprs.shaped(equation.inputs[form.sizes]) if isinstance(form, Ragged) else None
