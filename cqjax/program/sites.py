"""A site: an equation Z = XW of a loss whose W is a view of parameters."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from cqjax.linalg import gram
from cqjax.program.forms import Form
from cqjax.program.layout import Layout
from cqjax.program.steps import Position
from cqjax.program.views import View


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
      bias: what is added to every row of Z; None if nothing is.
      recomputed: whether the backward pass computes x anew.
      varying: the mesh axes over which x or the result varies within `jax.shard_map`.
      spread: those of them over which the weight does not vary, with their sizes: each device has
        other rows of the same product.
      shared: whether all examples share x: see `sharing`.
    """

    position: Position
    view: View
    form: Form
    loops: tuple[int, ...]
    operand: int
    x: tuple[tuple[int, ...], Any]
    z: tuple[tuple[int, ...], Any]
    bias: Bias | None = None
    recomputed: bool = False
    varying: frozenset[str] = frozenset()
    spread: tuple[tuple[str, int], ...] = ()
    shared: bool = False

    @property
    def batch(self) -> int:
        """B, with the trips of loops that scan over the weight."""
        return math.prod(length for _, length in self.view.loops) * self.form.weight.shape[0]

    @property
    def dtype(self) -> Any:
        """The dtype in which X is captured: its own, or for integers that of Z, at least float32.

        Integers have no gradient, and a tap returns what it captures as one.
        """
        x, z = self.x[1], self.z[1]
        return x if jnp.issubdtype(x, jnp.floating) else gram.accumulator(z)

    @property
    def shared_trips(self) -> int:
        """How often the site runs with the same weight."""
        return math.prod(self.loops) // math.prod(length for _, length in self.view.loops)

    @property
    def local_rows(self) -> int:
        """Rows of X on one device, over all trips with the same weight."""
        return self.shared_trips * self.form.output.shape[1]

    @property
    def rows(self) -> int:
        """Rows of X, over all trips with the same weight, and all devices."""
        return self.local_rows * math.prod(size for _, size in self.spread)

    @property
    def reduced(self) -> tuple[str, ...]:
        """The mesh axes over which statistics are reduced."""
        return tuple(axis for axis, _ in self.spread)
