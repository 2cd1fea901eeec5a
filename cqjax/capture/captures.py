"""What one evaluation of the loss captured: a pytree that crosses `jit`, `vmap` and `scan`."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cqjax.capture.block import Block
from cqjax.capture.layers import Layers
from cqjax.capture.matrix_form import Lookup, one_in
from cqjax.capture.sites import Site
from cqjax.capture.statistics import Counts, Gram, Inputs, Rows, Statistic
from cqjax.linalg import devices, gram


def path_of(keys: Sequence[Any]) -> str:
    """A parameter's path: the keys that lead to it in its tree, joined by "/"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sites", "gradients"], meta_fields=["block"]
)
@dataclasses.dataclass(frozen=True)
class Capture:
    """What was captured for the sites that share one weight.

    Attributes:
      sites: a `Rows`, `Inputs`, `Gram` or `Counts` for each site.
      gradients: the gradients of the parameters involved, as `value_and_grad` returned them: by
        them a transformation can tell whether its updates are still the gradient. (Of a
        `value_and_grad` that is jitted apart from the update they are outputs once more.)
      block: the sites' static description.
    """

    sites: tuple[Statistic, ...]
    gradients: dict[str, jax.Array]
    block: Block

    def rows(self) -> Rows:
        """The rows of all sites, one site after the other.

        Raises:
          ValueError: only their second moment was captured.
        """
        sites = [site for site in self.sites if isinstance(site, Rows)]
        if len(sites) < len(self.sites):
            raise ValueError(
                f"the rows of {self.block.name} were not captured, only their second moment; "
                'pass solver="dual" to cqjax.value_and_grad'
                + (" (a lookup's rows never are)" if self.block.solver == "diagonal" else "")
            )
        if len(sites) == 1:
            return sites[0]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *sites)

    def second_moment(self) -> jax.Array:
        """Sum over the sites of XᵀX, (B, d, d), or with the bias [X, h]ᵀ[X, h], (B, d+1, d+1).

        A lookup's is diagonal: its diagonal, (B, d), is returned.
        """
        parts = (
            _second_moment(self.block, site, statistic)
            for site, statistic in zip(self.block.sites, self.sites, strict=True)
        )
        return functools.reduce(jnp.add, parts)


def _second_moment(block: Block, site: Site, statistic: Statistic) -> jax.Array:
    match statistic:
        case Counts():
            return statistic.counts
        case Gram():
            return statistic.xx
        case Inputs():
            assert not isinstance(site.form, Lookup)
            own = site.form.second_moment(
                statistic.x, statistic.h, block.subsample, block.precision
            )
            return devices.total(own, site.reduced)
        case Rows():
            assert not isinstance(site.form, Lookup)
            together = site.form.together

            def taken(rows: jax.Array) -> jax.Array:
                batch, n, *features = rows.shape
                groups = rows.reshape(batch, n // together, together, *features)
                return one_in(block.subsample, groups, 1)[0].reshape(batch, -1, *features)

            x, h = taken(statistic.x), None if statistic.h is None else taken(statistic.h)
            return statistic.x.shape[1] / max(1, x.shape[1]) * gram.inner(x, h, block.precision)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "batch_size", "examples"],
    meta_fields=["layers"],
)
@dataclasses.dataclass(frozen=True)
class Captures(Mapping[str, tuple[Capture, ...]]):
    """Everything that one evaluation captured, by the parameter's path.

    `captures["params/Dense_0/kernel"]` holds each `Capture` in which the parameter takes part:
    one, unless slices of it are the weights of several products.

    Attributes:
      blocks: a `Capture` for each weight.
      batch_size: N, the number of terms that the loss averages over; None where `value_and_grad`
        could not infer it.
      layers: which layer feeds which, and which parameters are theirs.
      examples: how many examples the batch has; None where that is not plain.
    """

    blocks: tuple[Capture, ...]
    batch_size: int | jax.Array | None
    layers: Layers
    examples: int | jax.Array | None = None

    def __getitem__(self, path: str) -> tuple[Capture, ...]:
        """The captures in which the parameter at `path` takes part.

        Raises:
          KeyError: there are none.
        """
        found = tuple(capture for capture in self.blocks if path in capture.block.paths)
        if not found:
            raise KeyError(path)
        return found

    def __iter__(self) -> Iterator[str]:
        """The paths of all covered parameters."""
        return iter(dict.fromkeys(p for capture in self.blocks for p in capture.block.paths))

    def __len__(self) -> int:
        """The number of covered parameters."""
        return len(set(self))
