"""Sites of one weight, and those that use it the other way."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.program.forms import Convolution, Lookup, Product
from cqjax.program.known import Constant
from cqjax.program.layout import Layout
from cqjax.program.ragged import Ragged
from cqjax.program.sites import Bias, Site
from cqjax.program.views import View

Kind = type[Lookup] | type[Ragged] | None
"""What keeps a product apart from others of the same weight."""

Shapes = Mapping[str, tuple[int, ...]]


class Group(NamedTuple):
    """The sites of one weight.

    Attributes:
      sites: those with Z = XW.
      other: those with Y = DWᵀ.
    """

    sites: list[Site]
    other: list[Site]

    @property
    def view(self) -> View:
        """The weight."""
        return self.sites[0].view


def grouped(sites: Sequence[Site], shapes: Shapes, *, both_sides: bool) -> list[Group]:
    """Sites by their weight: the same view, contracted in the same way and by the same kind.

    Where a product has c times the weight of the first one, its X counts c times instead.

    Args:
      sites: the sites.
      shapes: the parameters' shapes, by path.
      both_sides: whether a product that contracts the weight's outputs joins those that contract
        its features. Lookups may be on one side; ragged products stay alone.
    """
    groups: collections.OrderedDict[tuple[View, Layout, Kind], list[Site]]
    groups = collections.OrderedDict()
    for site in map(_untransposed, sites):
        kind: Kind = type(site.form) if isinstance(site.form, Lookup | Ragged) else None
        view, factor = (site.view, 1.0) if kind is Lookup else site.view.split
        group = groups.setdefault((view, site.form.weight, kind), [])
        first = group[0].view if group else site.view
        group.append(_with_weight(site, first, factor))
    found: list[Group] = []
    while groups:
        (view, weight, kind), own = groups.popitem(last=False)
        kinds = {None: (None, Lookup), Lookup: (None,), Ragged: ()}[kind]
        keys = [key for k in kinds if (key := (view, weight.transposed, k)) in groups]
        keys += [key for key, other in groups.items() if _turned(own[0], other[0], shapes)]
        if not (both_sides and keys) or view.made:
            found.append(Group(own, []))
            continue
        # The side of a lookup, whose second moment is diagonal, or else of a bias comes first.
        sides = [own, groups.pop(keys[0])]
        found.append(Group(*sorted(sides, key=_order)))
    return found


def same_bias(sites: Sequence[Site], shapes: Shapes) -> list[Site]:
    """The sites, with one bias for those that add the same entries, reshaped in different ways."""
    biases = dict.fromkeys(site.bias for site in sites if site.bias is not None)
    if len(biases) < 2:
        return list(sites)
    entries: dict[tuple[object, ...], Bias] = {}
    same: dict[Bias, Bias] = {}
    for bias in biases:
        places = _places(bias.view, bias.layout, shapes)
        key = bias.view.paths, places.shape, places.tobytes()
        same[bias] = entries.setdefault(key, bias)
    return [
        site if site.bias is None else dataclasses.replace(site, bias=same[site.bias])
        for site in sites
    ]


def _untransposed(site: Site) -> Site:
    """The site whose weight is the parameter as it is stored, rather than its transpose."""
    if not isinstance(site.form, Product):
        return site
    form, view = site.form.untransposed(site.view)
    # Masks, factors and biases have the order of the features, or of the outputs.
    kept = form.inputs == site.form.inputs and form.output == site.form.output
    plain = site.bias is None and site.gain == Constant(1.0) and form.live == Constant(True)
    return dataclasses.replace(site, form=form, view=view) if kept or plain else site


def _order(sites: Sequence[Site]) -> int:
    if isinstance(sites[0].form, Lookup):
        return 0
    return 1 if any(site.bias is not None for site in sites) else 2


def _with_weight(site: Site, view: View, factor: float) -> Site:
    """The site with another weight of its group, which differs by a factor."""
    if site.view == view:
        return site
    return dataclasses.replace(site, view=view, factor=factor / view.split[1])


def _turned(site: Site, other: Site, shapes: Shapes) -> bool:
    """Whether two convolutions have one kernel, and its windows and channels are turned around.

    So it is with a convolution and its transpose.
    """
    forms = site.form, other.form
    if not all(isinstance(form, Convolution) and site.batch == 1 for form in forms):
        return False
    if site.view.paths != other.view.paths or site.view.scaled or other.view.scaled:
        return False
    own, others = (_places(s.view, s.form.weight, shapes) for s in (site, other))
    assert isinstance(forms[0], Convolution)
    return own.size == others.size and bool((own == forms[0].turned(others)).all())


def _places(view: View, layout: Layout, shapes: Shapes) -> np.ndarray:
    """Which entries of its parameters a view's matrix has: their numbers, times any scales."""
    numbers, arrays = 1, {}
    for path in view.paths:
        size = int(np.prod(shapes[path]))
        arrays[path] = np.arange(numbers, numbers + size, dtype=np.float32).reshape(shapes[path])
        numbers += size
    with jax.ensure_compile_time_eval():
        moved = view(jax.tree.map(jnp.asarray, arrays))
        packed = jax.vmap(layout.pack)(moved.reshape(-1, *view.shape))
        return np.asarray(packed.reshape(-1, *layout.shape[1:]))
