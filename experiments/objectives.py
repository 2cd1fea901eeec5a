"""What conjugate gradients are tried on: a quadratic valley, Rosenbrock's function, a network."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

SIZE, CONDITION = 10, 100.0  # of the valley
SAMPLES, HIDDEN = 100, 8  # of the network

Objective = Callable[[Any], jax.Array]


def valley(key: jax.Array) -> tuple[Objective, Any]:
    """A quadratic that is turned at random, and a random start."""
    turn, start = jax.random.split(key)
    q = jnp.linalg.qr(jax.random.normal(turn, (SIZE, SIZE)))[0]
    matrix = q @ (jnp.geomspace(1.0, CONDITION, SIZE)[:, None] * q.T)
    return lambda x: 0.5 * x @ matrix @ x, jax.random.normal(start, (SIZE,))


def rosenbrock(key: jax.Array) -> tuple[Objective, Any]:
    """Rosenbrock's function of two variables, and a random start."""
    start = jax.random.uniform(key, (2,), minval=-2.0, maxval=2.0)
    return lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, start


def network(key: jax.Array) -> tuple[Objective, Any]:
    """The squared error of a network of one hidden layer, and random weights."""
    x = jax.random.uniform(jax.random.key(0), (SAMPLES, 2), minval=-1.0)
    y = jnp.sin(3 * x[:, 0]) * x[:, 1]
    first, last = jax.random.split(key)
    w1, w2 = jax.random.normal(first, (2, HIDDEN)), jax.random.normal(last, (HIDDEN,)) / HIDDEN

    def loss_fn(params: Any) -> jax.Array:
        w1, b1, w2, b2 = params
        return 0.5 * jnp.mean((jnp.tanh(x @ w1 + b1) @ w2 + b2 - y) ** 2)

    return loss_fn, (w1, jnp.zeros(HIDDEN), w2, jnp.zeros(()))


Problem = Literal["quadratic valley", "Rosenbrock", "network", "network, further"]
PROBLEMS: dict[str, tuple[Any, float]] = {  # and what part of the first value is to be reached
    "quadratic valley": (valley, 1e-8),
    "Rosenbrock": (rosenbrock, 1e-8),
    "network": (network, 1e-2),
    "network, further": (network, 1e-3),
}
