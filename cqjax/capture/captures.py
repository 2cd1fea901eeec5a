"""What one evaluation of the loss captured: a pytree that crosses `jit`, `vmap` and `scan`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cqjax.capture.block import Block
from cqjax.capture.outputs import Moment, Outputs
from cqjax.capture.own_statistics import Groups
from cqjax.capture.parameters import Parameter
from cqjax.capture.statistics import Rows, Statistic
from cqjax.capture.table import lines
from cqjax.linalg import devices
from cqjax.program.flow import Flow
from cqjax.program.weight_function import WeightFunction


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sites", "gradients", "number", "other", "function"],
    meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Capture:
    """What was captured for the sites that share one weight.

    Attributes:
      sites: a statistic for each site: `Rows`, `Inputs`, `Gram`, `Counts`, `Groups`, or what
        `capture=` asked for.
      gradients: the gradients of the parameters involved, as `value_and_grad` returned them: by
        them a transformation can tell whether its updates are still the gradient. (Of a
        `value_and_grad` that is jitted apart from the update they are outputs once more.)
      block: the sites' static description.
      number: how many of its rows are examples, () or (B,); None where all are. Those that the loss
        leaves out, by a mask or otherwise, are zeros among the rows.
      other: where the loss has products Y = DWᵀ with the same weight, too, what was captured of
        them: their rows are those of D, and their weight is Wᵀ. None where it has none.
      function: what makes the weight of the parameters, W = f(V), with `reparametrized="nearest"`;
        None for a weight that is a parameter.
    """

    sites: tuple[Statistic, ...]
    gradients: dict[str, jax.Array]
    block: Block
    number: jax.Array | None
    other: Capture | None
    function: WeightFunction | None

    def __repr__(self) -> str:
        """Its paths, and the shapes of what was captured of each site."""
        return f"Capture({', '.join(self.block.paths)}: {'; '.join(map(_shapes, self.sites))})"

    @property
    def has_rows(self) -> bool:
        """Whether the rows were captured, and not their second moment alone."""
        return bool(self.sites) and all(isinstance(site, Rows) for site in self.sites)

    def rows(self) -> Rows:
        """The rows of all sites, one site after the other.

        Raises:
          ValueError: they were not captured.
        """
        sites = [site for site in self.sites if isinstance(site, Rows)]
        if not self.has_rows:
            raise ValueError(
                f"the rows of {self.block.name} were not captured, only their second moment; "
                'pass capture=cqjax.Rows (or solver="dual") to cqjax.value_and_grad'
                + (" (a lookup's rows never are)" if self.block.statistic.diagonal else "")
                + (" (a ragged product's rows never are)" if self.block.grouped else "")
            )
        if len(sites) == 1:
            return sites[0]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *sites)

    def row_counts(self) -> int | jax.Array:
        """How many rows of each of the B weights are examples: n, or (B,) where they differ."""
        sizes = [site.sizes for site in self.sites if isinstance(site, Groups)]
        if sizes:
            return functools.reduce(jnp.add, sizes)
        return self.block.rows if self.number is None else self.number

    def second_moment(self) -> jax.Array:
        """Sum over the sites of XᵀX, (B, d, d), or with the bias [X, h]ᵀ[X, h], (B, d+1, d+1).

        A lookup's is diagonal: its diagonal, (B, d), is returned.

        Raises:
          ValueError: it was not captured.
        """

        def total(statistics: Sequence[Statistic]) -> jax.Array:
            pairs = zip(self.block.sites, statistics, strict=True)
            parts = (each.second_moment(site, self.block.precision) for site, each in pairs)
            return functools.reduce(jnp.add, parts)

        return devices.automatic(total, self.sites)

    def outputs(self, weight: jax.Array) -> tuple[Outputs | Moment, ...]:
        """What other weights V, (B, d, k), make of each site's inputs, or the inputs' XᵀX.

        Raises:
          ValueError: neither rows nor their second moment were captured.
        """
        precision = self.block.precision
        return tuple(
            each.outputs(site, weight, precision) or Moment(each.second_moment(site, precision))
            for site, each in zip(self.block.sites, self.sites, strict=True)
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "batch_size", "examples"],
    meta_fields=["parameters", "flow", "unknown"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Captures(Mapping[str, tuple[Capture, ...]]):
    """Everything that one evaluation captured, by the parameter's path.

    `captures["params/Dense_0/kernel"]` holds each `Capture` in which the parameter takes part:
    one, unless slices of it are the weights of several products.

    Attributes:
      blocks: a `Capture` for each weight.
      batch_size: N, the number of terms that the loss averages over; None where `value_and_grad`
        could not infer it.
      examples: how many examples the batch has; None where that is not plain.
      parameters: what the plan says of each parameter.
      flow: which layer feeds which.
      unknown: where N is unknown: the arrays by which it was looked for, with their shapes.
    """

    blocks: tuple[Capture, ...]
    batch_size: int | jax.Array | None
    examples: int | jax.Array | None
    parameters: tuple[Parameter, ...]
    flow: Flow
    unknown: str = ""

    def __repr__(self) -> str:
        """A table: for each weight its bias, its sites' number, and what was captured of them."""
        rows = []
        for each in self.blocks:
            bias = ", ".join(path for path in each.block.paths if path not in each.block.view.paths)
            captured = dict.fromkeys(map(_shapes, each.sites))
            rows.append((each.block.name, bias, str(len(each.sites)), "; ".join(captured)))
        return "\n".join(lines(("weight", "bias", "sites", "captured"), {"sites"}, rows))

    def __getitem__(self, path: str) -> tuple[Capture, ...]:
        """The captures in which the parameter at `path` takes part.

        Raises:
          KeyError: there are none.
        """
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        """The paths of all covered parameters."""
        return iter(self._by_path)

    def __len__(self) -> int:
        """The number of covered parameters."""
        return len(self._by_path)

    @functools.cached_property
    def _by_path(self) -> Mapping[str, tuple[Capture, ...]]:
        found: dict[str, list[Capture]] = {}
        for capture in self.blocks:
            for path in capture.block.paths:
                found.setdefault(path, []).append(capture)
        return {path: tuple(captures) for path, captures in found.items()}


def _shapes(statistic: Any) -> str:
    """A statistic's class, and its arrays' names, dtypes and shapes."""
    if not dataclasses.is_dataclass(statistic):
        return type(statistic).__name__
    parts = ((each.name, getattr(statistic, each.name)) for each in dataclasses.fields(statistic))
    arrays = (f"{name} {_typed(value)}" for name, value in parts if hasattr(value, "shape"))
    return f"{type(statistic).__name__}: {', '.join(arrays)}"


def _typed(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}".replace(" ", "")
