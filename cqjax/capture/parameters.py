"""Which parameters are selected, and what a plan says of each."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

Selector = str | type
"""A pattern for parameters' paths, as in `fnmatch`, or a class of Flax layers."""

Status = Literal["covered", "partly covered", "uncovered", "skipped"]

Shapes = Mapping[str, tuple[int, ...]]
"""The parameters' shapes, by path."""

Owners = Mapping[str, frozenset[type]]
"""For each parameter's path, the classes of the Flax layers that own it."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What the plan says of one parameter.

    Attributes:
      path: its place in the parameters, keys joined by "/".
      shape: its shape.
      layer: class of the Flax layer that owns it; empty for other code.
      status: "covered": its updates come from a solve; "partly covered": likewise, but the loss
        uses the parameter elsewhere too; "uncovered": it keeps its gradient; "skipped":
        likewise, by `only=` or `skip=`.
      notes: what there is to know: its other uses, or why it is not covered.
    """

    path: str
    shape: tuple[int, ...]
    layer: str
    status: Status
    notes: tuple[str, ...]


def listed(selectors: Selector | Sequence[Selector]) -> Sequence[Selector]:
    """One selector, or several, as a sequence.

    Raises:
      TypeError: something in it selects nothing.
    """
    several = [selectors] if isinstance(selectors, str | type) else selectors
    for selector in several if isinstance(several, Sequence) else [several]:
        if not isinstance(selector, str | type):
            raise TypeError(
                f"{selector!r} selects no parameters: expected a pattern for paths or a class of "
                "layers"
            )
    return several


def selected(
    only: Sequence[Selector] | None, skip: Sequence[Selector], shapes: Shapes, owners: Owners
) -> set[str]:
    """The paths of the parameters to capture.

    Raises:
      ValueError: a selector matches no parameter, or a layer's class is ambiguous.
    """
    chosen = set(shapes) if only is None else _matching(only, "only", shapes, owners)
    return chosen - _matching(skip, "skip", shapes, owners)


def _matching(
    selectors: Sequence[Selector], argument: str, shapes: Shapes, owners: Owners
) -> set[str]:
    matching: set[str] = set()
    for selector in selectors:
        if isinstance(selector, str):
            found = {path for path in shapes if fnmatch.fnmatchcase(path, selector)}
            near = "paths are " + ", ".join(shapes)
        else:
            found = {p for p in shapes if any(issubclass(c, selector) for c in owners[p])}
            _check_unambiguous(found, selector, argument, owners)
            classes = {c.__name__ for cs in owners.values() for c in cs}
            near = "layers are " + (", ".join(sorted(classes)) or "unknown: no Flax module called")
        if not found:
            name = selector if isinstance(selector, str) else selector.__name__
            raise ValueError(f"{argument}={name!r} selects no parameter; the {near}")
        matching |= found
    return matching


def _check_unambiguous(found: set[str], selector: type, argument: str, owners: Owners) -> None:
    for path in sorted(found):
        if not all(issubclass(c, selector) for c in owners[path]):
            names = " or ".join(sorted(c.__name__ for c in owners[path]))
            raise ValueError(
                f"{argument}={selector.__name__}: the layer of {path} may be {names}, since layers "
                "of both kinds were called under that name; select it by its path instead"
            )
