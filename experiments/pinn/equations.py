"""Two differential equations with known solutions, and the networks' losses for them.

Each loss is written in two ways, which are equal. In `reverse` mode the network is differentiated
as most people do it, by `jax.grad`, whose result is differentiated once more: by `jax.jvp` for
Poisson's equation, as in `jax.hessian`, and by `jax.grad` for Burgers'. The loss then uses each
weight W in products X W and in products D Wᵀ. In `forward` mode the network is differentiated by
`jax.jvp`, and W is used in products X W alone.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.classification import LossFn

Mode = Literal["reverse", "forward"]
Field = Callable[[jax.Array], jax.Array]
"""Takes a place, a vector, to a number."""

VISCOSITY = 0.03  # of Burgers' equation
QUADRATURE = 200  # nodes of the integrals in its solution
_NODES, _WEIGHTS = np.polynomial.hermite.hermgauss(QUADRATURE)


class Network(nn.Module):
    """Layers of tanh, from places to a number each."""

    width: int = 64
    depth: int = 3

    @nn.compact
    def __call__(self, places: jax.Array) -> jax.Array:
        """Return the values `(...,)` at places `(..., dimensions)`."""
        x = places
        for _ in range(self.depth):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)[..., 0]


class Equation(NamedTuple):
    """A differential equation on a rectangle, with values given on a part of its border."""

    low: tuple[float, float]
    high: tuple[float, float]
    residuals: dict[Mode, Callable[[Field, jax.Array], jax.Array]]
    """Take a function and a place to what the equation says is zero."""
    solution: Callable[[np.ndarray], np.ndarray]
    """Takes places `(n, 2)` to the values `(n,)`, in float64."""
    given: Callable[[np.random.Generator, int], np.ndarray]
    """Draws places in the unit square's border, where the solution is given."""

    def inside(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """Places `(number, 2)`, uniformly at random."""
        return self._placed(rng.uniform(size=(number, 2)))

    def border(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """Places `(number, 2)` where the solution is given, uniformly at random."""
        return self._placed(self.given(rng, number))

    def grid(self, side: int) -> np.ndarray:
        """Places `(side ** 2, 2)`, the second coordinate the fastest, with those of the border."""
        ticks = np.linspace(0, 1, side)
        return self._placed(np.stack(np.meshgrid(ticks, ticks, indexing="ij"), -1).reshape(-1, 2))

    def _placed(self, unit: np.ndarray) -> np.ndarray:
        low, high = np.array(self.low), np.array(self.high)
        return low + (high - low) * unit


def loss(
    model: nn.Module, equation: Equation, mode: Mode, border: np.ndarray, weight: float
) -> LossFn:
    """The mean squared residual, plus a multiple of the mean squared error on the border.

    Args:
      model: The network.
      equation: What it is to solve.
      mode: How the network is differentiated.
      border: Places `(n, 2)` where the solution is given.
      weight: The multiple.

    Returns:
      A loss of parameters, the network's state (which is handed on), places `(n, 2)`, and what
      their residuals should be, zeros `(n,)`.
    """
    residual = equation.residuals[mode]
    places, values = jnp.asarray(border), jnp.asarray(equation.solution(border))

    def loss_fn(
        params: Any, model_state: Any, inside: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, Any]:
        def field(place: jax.Array) -> jax.Array:
            return model.apply({"params": params}, place)  # pyright: ignore[reportReturnType]

        residuals = jax.vmap(lambda place: residual(field, place))(inside)
        there = jax.vmap(field)(places.astype(inside.dtype))
        errors = there - values.astype(inside.dtype)
        return jnp.mean((residuals - targets) ** 2) + weight * jnp.mean(errors**2), model_state

    return loss_fn


def _twice(u: Field, place: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The value, the first and the second derivative along an axis, by forward mode alone."""
    way = jnp.zeros_like(place).at[axis].set(1)

    def once(place: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(u, (place,), (way,))

    (value, first), (_, second) = jax.jvp(once, (place,), (way,))
    return value, first, second


def _source(place: jax.Array) -> jax.Array:
    return 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * place))


def _poisson_reverse(u: Field, place: jax.Array) -> jax.Array:
    # The diagonal of jax.hessian(u), entry by entry: on CPUs this takes a third of the time.
    slopes = (jax.jvp(jax.grad(u), (place,), (way,))[1] for way in jnp.eye(2, dtype=place.dtype))
    return sum(slope[axis] for axis, slope in enumerate(slopes)) + _source(place)


def _poisson_forward(u: Field, place: jax.Array) -> jax.Array:
    return sum(_twice(u, place, axis)[2] for axis in (0, 1)) + _source(place)


def _poisson_solution(places: np.ndarray) -> np.ndarray:
    return np.prod(np.sin(np.pi * np.asarray(places, np.float64)), axis=-1)


def _all_sides(rng: np.random.Generator, number: int) -> np.ndarray:
    along, side = rng.uniform(size=number), rng.integers(4, size=number)
    fixed = side % 2
    return np.where((side < 2)[:, None], np.stack([along, fixed], -1), np.stack([fixed, along], -1))


def _burgers_reverse(u: Field, place: jax.Array) -> jax.Array:
    slope = jax.grad(u)
    second = jax.grad(lambda place: slope(place)[0])(place)[0]
    by_place, by_time = slope(place)
    return by_time + u(place) * by_place - VISCOSITY * second


def _burgers_forward(u: Field, place: jax.Array) -> jax.Array:
    value, by_place, second = _twice(u, place, 0)
    by_time = jax.jvp(u, (place,), (jnp.array([0, 1], place.dtype),))[1]
    return by_time + value * by_place - VISCOSITY * second


def _burgers_solution(places: np.ndarray) -> np.ndarray:
    """Cole's and Hopf's formula: two integrals against the heat kernel, by Gauss and Hermite."""
    x, t = np.asarray(places, np.float64).T
    shifted = x[:, None] - np.sqrt(4 * VISCOSITY * t)[:, None] * _NODES
    weights = _WEIGHTS * np.exp(-np.cos(np.pi * shifted) / (2 * np.pi * VISCOSITY))
    return -(weights * np.sin(np.pi * shifted)).sum(axis=-1) / weights.sum(axis=-1)


def _sides_and_start(rng: np.random.Generator, number: int) -> np.ndarray:
    along, side = rng.uniform(size=number), rng.integers(4, size=number)
    start = np.stack([along, np.zeros(number)], -1)
    return np.where((side < 2)[:, None], start, np.stack([side % 2, along], -1))


POISSON = Equation(
    (0.0, 0.0),
    (1.0, 1.0),
    {"reverse": _poisson_reverse, "forward": _poisson_forward},
    _poisson_solution,
    _all_sides,
)
"""-Δu = 2 π² sin(πx) sin(πy) on the unit square, and u = 0 on its border."""

BURGERS = Equation(
    (-1.0, 0.0),
    (1.0, 1.0),
    {"reverse": _burgers_reverse, "forward": _burgers_forward},
    _burgers_solution,
    _sides_and_start,
)
"""u_t + u u_x = 0.03 u_xx for x in [-1, 1] and t in [0, 1], from u = -sin(πx); u = 0 at both ends.

Half of the places where u is given are at the start, the others at the ends.
"""
