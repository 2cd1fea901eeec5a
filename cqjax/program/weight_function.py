"""A function that makes a weight of parameters, at a point: a pytree with a Jacobian."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import jax
from jax.extend import core

from cqjax.program import jaxprs


class Text:
    """A function's jaxpr, without values. It equals another that reads the same."""

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr

    @functools.cached_property
    def _key(self) -> str:
        return str(self.jaxpr)

    def __eq__(self, other: object) -> bool:
        """Whether the other reads the same."""
        return self is other or (isinstance(other, Text) and self._key == other._key)

    def __hash__(self) -> int:
        """A hash of what it reads."""
        return hash(self._key)

    def __deepcopy__(self, _: Any) -> "Text":
        """Itself: nothing changes it."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled.

        Raises:
          TypeError: says so.
        """
        raise TypeError(
            "captures of a weight that the loss makes of parameters hold the program that makes "
            "it, which cannot be pickled; pickle the plan, the gradients or the update instead"
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parameters", "given"],
    meta_fields=["text"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class WeightFunction:
    """W = f(V), at some parameters V.

    Attributes:
      parameters: V, by path.
      given: what else it depends on: masks, constants, parameters whose gradient is stopped.
      text: its program.
    """

    parameters: dict[str, jax.Array]
    given: tuple[Any, ...]
    text: Text

    @classmethod
    def traced(
        cls,
        make: Callable[[dict[str, jax.Array], Any], jax.Array],
        parameters: dict[str, jax.Array],
        given: Mapping[int, Any],
    ) -> Self:
        """The function `make(parameters, given)`, at these arguments."""
        jaxpr, consts = jaxprs.opened(jax.make_jaxpr(make)(parameters, given))
        return cls(parameters, (*consts, *jax.tree.leaves(given)), Text(jaxpr))

    def __call__(self, parameters: Mapping[str, jax.Array]) -> jax.Array:
        """W of other parameters."""
        jaxpr, number = self.text.jaxpr, len(self.text.jaxpr.constvars)
        consts, given = self.given[:number], self.given[number:]
        leaves = jax.tree.leaves(dict(parameters))
        (weight,) = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*leaves, *given)
        return weight

    def linearized(
        self,
    ) -> tuple[Callable[[dict], jax.Array], Callable[[jax.Array], dict]]:
        """The Jacobian J at V and its transpose: ΔV ↦ JΔV and ∂L/∂W ↦ Jᵀ ∂L/∂W.

        J is the transpose of the backward pass. So it is what the loss's gradient goes through,
        rules for the backward pass alone (`jax.custom_vjp`) included.
        """
        weight, pull = jax.vjp(self, self.parameters)

        def back(weight: jax.Array) -> dict[str, jax.Array]:
            return pull(weight)[0]

        def forth(change: dict[str, jax.Array]) -> jax.Array:
            return jax.linear_transpose(back, weight)(change)[0]

        return forth, back
