"""Weights that a loss makes of parameters: W = f(V), where f does more than move and scale entries.

Weight normalisation, weight standardisation, spectral normalisation, masks that are drawn anew or
differ between outputs, quantisation with a straight-through gradient, products of parameters: there
the operand of a product is no view of a parameter. But it is a function of parameters, of what the
program's text fixes, and of those arguments that are no batch (random keys, masks). Such a function
can be evaluated apart from the loss, and differentiated.

Within a loop W may have a value for each trip: where what it is made of is scanned over.
"""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.extend.core import primitives

from cqjax.program import jaxprs, views
from cqjax.program.forms import Convolution, Product
from cqjax.program.matrix_form import matrix_form
from cqjax.program.sites import Site
from cqjax.program.steps import Kind, Number, Program, Step, differentiable, differentiated
from cqjax.program.twins import numbering
from cqjax.program.values import Values
from cqjax.program.views import View
from cqjax.program.weight_function import WeightFunction

OPTION = 'reparametrized="nearest"'
"""The option of `value_and_grad` by which such weights are solved for."""

_PRODUCTS = frozenset({primitives.dot_general_p, primitives.conv_general_dilated_p})
_EFFECTS = frozenset({"debug_callback", "debug_print", "io_callback", "pure_callback"})

Levels = tuple[tuple[int, int], ...]
"""The loops around a variable whose trips have values of their own: nesting level and length."""


class Weight(NamedTuple):
    """A product's operand that is made of parameters.

    Attributes:
      operand: which of the equation's operands it is.
      view: the weight, by a name of its own.
      form: the product's form.
    """

    operand: int
    view: View
    form: Product | Convolution


class Made:
    """Finds the weights that a loss makes of parameters, and what makes them.

    It holds no value of the program.
    """

    def __init__(self, program: Program, paths: Sequence[str], batch: Set[int]):
        """Prepares for questions.

        Args:
          program: the loss. Its first inputs are the parameters.
          paths: the parameters' paths.
          batch: the variables that depend on the batch.
        """
        self._program = program
        self._paths = dict(zip(program.inputs, paths, strict=False))
        self._batch = batch
        self._writers = {
            n: (order, step, i)
            for order, step in enumerate(program.steps)
            for i, n in enumerate(step.writes)
        }
        self._variables: dict[str, Number] = {}  # the weights that were found, by their names

    @functools.cached_property
    def _learned(self) -> Set[int]:
        return self._program.dependent(self._paths)

    @functools.cached_property
    def _levels(self) -> Mapping[Number, Levels]:
        """The variables that can be evaluated without the batch, with the loops around them."""
        found: dict[Number, Levels] = {}

        def levels_of(number: Number) -> Levels | None:
            if number in self._batch:
                return None
            return found.get(number) if number in self._writers else ()

        def lifted(step: Step) -> Iterator[tuple[Number, Levels]]:
            each = [levels_of(n) for n in step.reads]
            if step.kind is Kind.EQUATION and step.equation.primitive.name not in _EFFECTS:
                if None not in each:
                    union = {level for levels in each for level in levels or ()}
                    yield from ((n, tuple(sorted(union))) for n in step.writes)
            elif step.kind in (Kind.ENTER, Kind.SLICE):
                for levels, written in zip(each, step.writes, strict=True):
                    if levels is not None:
                        yield written, (*levels, *_sliced_by(step))

        for step in self._program.steps:
            found.update((n, levels) for n, levels in lifted(step) if n not in self._batch)
        return found

    @functools.cached_property
    def _numbering(self) -> Mapping[Number, Number]:
        return numbering(self._program)

    def weight(self, step: Step) -> Weight | None:
        """The operand of a product that is made of parameters; None if none is, or both are."""
        if step.equation.primitive not in _PRODUCTS:
            return None
        made = [i for i, n in enumerate(step.reads) if n in self._learned and n in self._levels]
        if len(made) != 1:
            return None
        (operand,) = made
        form = matrix_form(step.equation, operand)
        number = self._origin(step.reads[operand])
        sources = self._sources(number)
        if not isinstance(form, Product | Convolution) or not sources:
            return None
        name = f"f({', '.join(sources)}) {number}"
        self._variables[name] = number
        shape = step.equation.inputs[operand].shape
        view = views.made(name, sources, shape, self._levels.get(number, ()))
        return Weight(operand, view, form)

    def _origin(self, number: Number) -> Number:
        """The first variable with the same value: outside of a body that it enters as it is."""
        while number in self._writers:
            _, step, i = self._writers[number]
            if step.kind is not Kind.ENTER:
                break
            number = step.reads[i]
        return self._numbering.get(number, number)

    def _sources(self, number: Number) -> tuple[str, ...]:
        """The parameters that a variable's gradient reaches."""
        found = self._behind(number, (), lambda step: not differentiable(step))
        return tuple(path for n, path in self._paths.items() if n in found)

    def _behind(
        self, number: Number, known: Container[int], stops: Callable[[Step], bool] = lambda _: False
    ) -> Iterable[Number]:
        """The variables on which one depends, itself included, up to those that are known."""
        found, waiting = dict[Number, None](), [number]
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found[number] = None
            if number in self._writers and number not in known:
                _, step, i = self._writers[number]
                waiting += () if stops(step) else step.sources(i)
        return found

    def settled(
        self, sites: Sequence[Site], uses: Mapping[str, Sequence[Any]], wanted: bool
    ) -> tuple[list[Site], dict[str, list[Any]]]:
        """The sites and uses of parameters, once those that only serve to make weights are told.

        What a parameter enters on its way to a weight is no use of it. Nor is a product there a
        layer: an iteration of spectral normalisation. But a parameter that is a layer's weight as
        it is remains one; what else is made of it is not solved for.

        Args:
          sites: the sites, with those whose weight is made.
          uses: what parameters enter besides.
          wanted: whether such weights are to be solved for. If not, uses say how they could be.
        """
        if not self._variables:
            return list(sites), {path: list(each) for path, each in uses.items()}
        writes = {s.position: s.writes for s in self._program.steps if s.kind is Kind.EQUATION}
        made = {site.view.made for site in sites if site.view.made}
        while True:
            cut = {self._variables[name] for name in made}
            cut |= {n for n in self._levels if self._origin(n) in cut}
            live = self._program.needed(self._program.outputs[:1], differentiated, cut) - cut
            serving = {at for at, written in writes.items() if live.isdisjoint(written)}
            outer = {s.view.made for s in sites if s.view.made and s.position not in serving}
            inner = {s.position for s in sites if s.view.made and s.position in serving}
            # A product with a weight that is masked differently for different outputs.
            serving |= {site.position for site in sites if site.view.made in made}
            told = {path for path, us in uses.items() if any(u.position in serving for u in us)}

            own = [
                site
                for site in sites
                if not site.view.made
                and not (site.position in serving and told.issuperset(site.view.paths))
            ]
            weights = {path for site in own for path in site.view.paths}
            left = {
                site.view.made
                for site in sites
                if site.view.made in made
                and (told.isdisjoint(site.view.paths) or not weights.isdisjoint(site.view.paths))
            }
            left |= made - outer
            if not left:
                break
            made -= left
        sources = {p for s in sites if s.view.made in made for p in s.view.paths}
        solved = made if wanted else set()
        kept = [s for s in sites if s in own or (s.view.made in solved and s.position not in inner)]
        others: dict[str, list[Any]] = {}
        for path, us in uses.items():
            others[path] = [use for use in us if use.position not in serving]
            if not wanted and path in sources:
                others[path] = [
                    use._replace(reason=_reason(use)) if use.position in serving else use
                    for use in us
                ]
        return kept, others

    def function(
        self, name: str, jaxpr: Any, parameters: Sequence[jax.Array], values: Values
    ) -> WeightFunction:
        """What makes the weight of this name, at these parameters.

        Args:
          name: the weight's, as its view has it.
          jaxpr: the loss.
          parameters: all parameters.
          values: of the variables that do not depend on parameters.
        """
        number = self._variables[name]
        given = dict(zip(self._paths, parameters, strict=True))
        behind = self._behind(number, values)
        fixed = values.of(n for n in behind if n in values)
        given |= {n: fixed[n] for n in behind if n in values}
        sources = {
            self._paths[n]: n for n in self._paths if self._paths[n] in self._sources(number)
        }
        steps = {
            self._writers[n][0]: self._writers[n][1]
            for n in behind
            if n in self._writers and n not in given
        }
        rest = {n: value for n, value in given.items() if n in behind and n not in sources.values()}

        def make(parameters: Mapping[str, jax.Array], rest: Mapping[Number, Any]) -> jax.Array:
            known: dict[Number, tuple[Any, Levels]] = {
                sources[path]: (array, ()) for path, array in parameters.items()
            }
            known |= {n: (array, ()) for n, array in rest.items()}
            for order in sorted(steps):
                known.update(
                    zip(steps[order].writes, _taken(steps[order], jaxpr, known), strict=True)
                )
            return known[number][0]

        return WeightFunction.traced(make, {p: given[n] for p, n in sources.items()}, rest)


def _sliced_by(step: Step) -> Levels:
    """The loop that gives each trip its part of what a step reads."""
    return ((len(step.loops), step.equation.params["length"]),) if step.kind is Kind.SLICE else ()


def _reason(use: Any) -> str:
    return f"{use.reason}; it makes a product's weight, which {OPTION} covers"


def _taken(
    step: Step, jaxpr: Any, known: Mapping[Number, tuple[Any, Levels]]
) -> Iterable[tuple[Any, Levels]]:
    """The values that a step writes, each with an axis in front for each of its loops."""
    reads = [known.get(n, (None, ())) for n in step.reads]
    if step.kind is not Kind.EQUATION:
        return [(array, (*levels, *_sliced_by(step))) for array, levels in reads]
    union = tuple(sorted({level for _, levels in reads for level in levels}))
    eqn = jaxprs.at(jaxpr, step.position)
    compute: Any = functools.partial(jaxprs.evaluate, eqn)
    for level in reversed(union):  # the outermost loop's axis is the first, so it comes last
        compute = jax.vmap(compute, ([0 if level in levels else None for _, levels in reads],))
    return [(array, union) for array in compute([array for array, _ in reads])]
