"""How a weight is solved for, and what is captured for it: chosen by cost, within limits."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cqjax.capture.block import Block, Solver
from cqjax.capture.statistics import Counts, Gram, Inputs, Rows, Statistic
from cqjax.program.forms import Lookup


class Policy(NamedTuple):
    """What decides how weights are solved for.

    Attributes:
      solver: "dual", "primal", or "auto" for the cheaper.
      capture: what is captured of each product; None for what the solver needs.
      max_dim: the largest matrix to be inverted; None for no limit.
      block_size: of the diagonal blocks of a larger XᵀX; None for no solve at all.
      precision: of the products with X.
    """

    solver: Literal["auto", "primal", "dual"] = "auto"
    capture: type[Statistic] | None = None
    max_dim: int | None = None
    block_size: int | None = None
    precision: lax.PrecisionLike = "highest"

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
          ValueError: names the option.
          TypeError: `capture` is no statistic.
        """
        check_option(self.solver, ("auto", "primal", "dual"), "solver")
        for name, value in (("max_dim", self.max_dim), ("block_size", self.block_size)):
            if value is not None and not (isinstance(value, int | np.integer) and value >= 1):
                raise ValueError(f"{name}={value}: expected a positive integer")
        if self.block_size is not None and (self.max_dim is None or self.block_size > self.max_dim):
            raise ValueError(
                f"block_size={self.block_size} with max_dim={self.max_dim}: expected max_dim, the "
                "size from which on a matrix is split into blocks, and block_size no larger than it"
            )
        _check_capture(self)
        row = jax.ShapeDtypeStruct((1,), jnp.float32)
        try:
            jax.eval_shape(lambda x: jnp.dot(x, x, precision=self.precision), row)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"precision={self.precision!r}: expected what jax.lax.dot_general takes: "
                "'highest', 'high', 'default' or another jax.lax.Precision"
            ) from error

    def decide(self, block: Block) -> Block | str:
        """The block with its solver and statistic; or why there is none."""
        block = dataclasses.replace(block, max_dim=self.max_dim, precision=self.precision)
        if isinstance(block.sites[0].form, Lookup):
            return dataclasses.replace(block, solver="diagonal", statistic=Counts)
        solvers = self._solvers()
        small: list[Solver] = [solver for solver in solvers if block.small(solver)]
        if small:
            solver = min(small, key=block.flops)
            needed = Rows if solver == "dual" else Gram
            return dataclasses.replace(block, solver=solver, statistic=self.capture or needed)
        if self.block_size is not None and (parts := parts_of(block, self.block_size)):
            return in_parts(block, parts)
        size = min(block.size(solver) for solver in solvers)
        return f"needs the inverse of a matrix of {size} rows, more than max_dim"

    def _solvers(self) -> Sequence[Solver]:
        """The solvers to choose from."""
        if self.solver != "auto":
            return (self.solver,)
        has_rows = self.capture is None or issubclass(self.capture, Rows)
        return ("dual", "primal") if has_rows else ("primal",)


def _check_capture(policy: Policy) -> None:
    capture = policy.capture
    if capture is None:
        return
    if not (isinstance(capture, type) and issubclass(capture, Statistic)):
        raise TypeError(
            f"capture={capture!r}: expected a class of statistics: cqjax.Rows, cqjax.Gram, or one "
            "derived from cqjax.Statistic"
        )
    if capture in (Statistic, Counts, Inputs):
        raise ValueError(
            f"capture=cqjax.{capture.__name__}: expected what every product can give: cqjax.Rows, "
            "cqjax.Gram, or a class derived from cqjax.Statistic"
        )
    if policy.solver == "dual" and not issubclass(capture, Rows):
        raise ValueError(
            f'capture={capture.__name__} with solver="dual", which needs rows; expected '
            "capture=cqjax.Rows, or another solver"
        )
    if policy.block_size is not None and capture is not Gram:
        raise ValueError(
            f"capture={capture.__name__} with block_size={policy.block_size}: of a matrix in "
            "diagonal blocks only XᵀX is captured; expected capture=cqjax.Gram, or no block_size="
        )


def parts_of(block: Block, size: int) -> int | None:
    """The least number of equal parts that leaves each at most `size` features, if any does.

    Equal parts need no padding, and compile to one program. A convolution's parts have all the
    window's offsets of some of the channels. A prime number of channels leaves parts of one.
    """
    form = block.sites[0].form
    assert not isinstance(form, Lookup)
    numbers = (n for n in range(1, form.channels + 1) if form.channels % n == 0)
    return next((n for n in numbers if block.features // n <= size), None)


def in_parts(block: Block, parts: int) -> Block:
    """The block with diagonal blocks of XᵀX in its place: see `Block.parts`."""
    sites = []
    for site in block.sites:
        assert not isinstance(site.form, Lookup)
        sites.append(dataclasses.replace(site, form=site.form.in_parts(parts)))
    return dataclasses.replace(
        block, sites=tuple(sites), solver="primal", statistic=Gram, parts=parts
    )


def check_option(value: Any, allowed: Sequence[str], name: str) -> None:
    """Refuses an option that is not one of those allowed.

    Raises:
      ValueError: names the option.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
