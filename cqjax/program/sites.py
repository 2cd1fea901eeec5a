"""A site: an equation Z = XW of a loss whose W is a view of parameters."""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cqjax.linalg import gram
from cqjax.program import views
from cqjax.program.forms import Convolution, Form, Product
from cqjax.program.jaxprs import Shaped
from cqjax.program.known import Constant
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
      source: the number of the activation among the program's variables: another one in each branch
        and loop.
      x: the type of the activation.
      z: the type of the result.
      sizes: the type of the operand with the sizes of a ragged product's groups.
      bias: what is added to every row of Z; None if nothing is.
      gain: what the equation's result is multiplied by before the bias is added, a number or one
        for each output, (B, o). Z is the product with it then, and so is the weight.
      factor: what x counts times, since the weight of its own product is as many times the view's.
      recomputed: whether the backward pass computes x anew.
      stopped: whether the weight's gradient, or the bias's, is stopped in some rows.
      varying: the mesh axes over which x or the result varies within `jax.shard_map`.
      spread: those of them over which the weight does not vary, with their sizes: each device has
        other rows of the same product.
      shared: whether all examples share x: see `sharing`.
      automatic: whether x is in a part of the loss in which the mesh's axes are automatic, and
        explicit around it. So it cannot leave that part as it is.
    """

    position: Position
    view: View
    form: Form
    loops: tuple[int, ...]
    operand: int
    source: int
    x: Shaped
    z: Shaped
    sizes: Shaped | None = None
    bias: Bias | None = None
    gain: Constant = Constant(1.0)
    factor: float = 1.0
    recomputed: bool = False
    stopped: bool = False
    varying: frozenset[str] = frozenset()
    spread: tuple[tuple[str, int], ...] = ()
    shared: bool = False
    automatic: bool = False

    def with_bias(self, bias: Bias, gain: Constant) -> "Site":
        """The site with a bias that is added to the product of its output with a gain.

        A layer's output is what its bias is added to: so the gain belongs to the weight.
        """
        if gain == Constant(1.0):
            return dataclasses.replace(self, bias=bias)
        factor, layout = gain.value, self.form.weight
        if factor.ndim:
            each = np.broadcast_to(factor[:, None], layout.shape)
            factor = layout.unpack(each, self.view.shape)
        view = views.scaled(self.view, factor)
        return dataclasses.replace(self, view=view, bias=bias, gain=gain)

    def activation(self, x: jax.Array) -> jax.Array:
        """What the weight is multiplied by, of the equation's operand x, in its shape."""
        return x if self.factor == 1 else x * jnp.asarray(self.factor, x.dtype)

    def gradient(self, dz: jax.Array) -> jax.Array:
        """∂L/∂Z, from the gradient with respect to the equation's result, in its shape."""
        if self.gain == Constant(1.0):
            return dz
        factor, layout = self.gain.value.astype(dz.dtype), self.form.output
        if not factor.ndim:
            return dz / factor
        return layout.unpack(layout.pack(dz) / factor[:, None], dz.shape)

    @property
    def batch(self) -> int:
        """B, with the trips of loops that scan over the weight."""
        return math.prod(length for _, length in self.view.loops) * self.form.weight.shape[0]

    @property
    def rows_of(self) -> Hashable:
        """What X is made of, and how: sites of which it is equal have the same [X, h]."""
        assert isinstance(self.form, Product | Convolution)
        how = self.form.reading, self.factor, self.dtype, self.bias is not None
        where = self.loops, self.view.loops, self.spread, self.automatic
        return self.source, how, where, self.shared

    @property
    def dtype(self) -> Any:
        """The dtype in which X is captured: its own, or for integers that of Z, at least float32.

        Integers have no gradient, and a tap returns what it captures as one.
        """
        x, z = self.x.dtype, self.z.dtype
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
