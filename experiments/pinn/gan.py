"""A small GAN whose critic's loss has a derivative inside: the penalty on its gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from experiments.classification import LossFn, Metric
from experiments.data import Split
from experiments.pinn.equations import Mode

NOISE = 4  # numbers that a point is generated from
MODES, RADIUS, DEVIATION = 8, 1.5, 0.1  # of the ring
PENALTY = 0.1


class Layers(nn.Module):
    """Hidden layers of ReLUs."""

    outputs: int
    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the outputs `(..., outputs)` for inputs `(..., features)`."""
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class Gan(NamedTuple):
    """Two networks. Their parameters are a dictionary with these names."""

    generator: Layers
    critic: Layers

    @classmethod
    def of(cls, width: int) -> "Gan":
        """Two hidden layers of the same width for both."""
        return cls(Layers(2, (width, width)), Layers(1, (width, width)))

    def start(self, seed: int) -> tuple[Any, Any]:
        """The first parameters, and no further state."""
        keys = jax.random.split(jax.random.key(seed))
        inputs = jnp.zeros((1, NOISE)), jnp.zeros((1, 2))
        params = {
            name: network.init(key, its)["params"]
            for name, network, key, its in zip(self._fields, self, keys, inputs, strict=True)
        }
        return params, {}

    def generated(self, params: Any, noise: jax.Array) -> jax.Array:
        """Points `(n, 2)` from noise `(n, NOISE)`."""
        return self.generator.apply({"params": params["generator"]}, noise)  # pyright: ignore

    def loss(self, mode: Mode) -> LossFn:
        """One loss for both networks, each of which sees the other as given.

        The critic has logistic losses and a penalty on its squared gradients at all points, as in
        Mescheder, Geiger and Nowozin, *Which Training Methods for GANs do actually Converge?*
        (2018); the generator has the logistic loss of the opposite label.

        Args:
          mode: How the critic is differentiated with respect to points.

        Returns:
          A loss of parameters, state, real points and noise. Its value means little: the two
          networks pull it up and down.
        """
        derivative = {"reverse": jax.grad, "forward": jax.jacfwd}[mode]

        def loss_fn(
            params: Any, model_state: Any, real: jax.Array, noise: jax.Array
        ) -> tuple[jax.Array, Any]:
            def logits(params: Any, points: jax.Array) -> jax.Array:
                return self.critic.apply({"params": params["critic"]}, points)[..., 0]  # pyright: ignore

            points = self.generated(params, noise)
            given = jax.lax.stop_gradient(points)
            slopes = jax.vmap(derivative(lambda point: logits(params, point)))
            squares = [(slopes(some) ** 2).sum(axis=-1).mean() for some in (real, given)]
            critic = jnp.mean(
                jax.nn.softplus(-logits(params, real)) + jax.nn.softplus(logits(params, given))
            )
            fooled = jax.nn.softplus(-logits(jax.lax.stop_gradient(params), points)).mean()
            return critic + PENALTY / 2 * sum(squares) + fooled, model_state

        return loss_fn

    def distance(self, real: np.ndarray, noise: np.ndarray) -> Metric:
        """The metric that is `wasserstein` between points and what is generated from noise."""
        generated = jax.jit(self.generated)

        def metric(params: Any, model_state: Any) -> float:
            return wasserstein(np.asarray(generated(params, noise)), real)

        return metric


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """The 1-Wasserstein distance of as many points: the mean way in the best one-to-one pairing.

    It is infinite if a coordinate is not finite.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.inf
    apart = a[:, None].astype(np.float64) - b[None]
    ways = np.linalg.norm(apart, axis=-1)
    return float(ways[linear_sum_assignment(ways)].mean())


def ring(rng: np.random.Generator, number: int) -> Split:
    """Points around eight places on a circle, and the noise that others are generated from."""
    angles = 2 * np.pi * rng.integers(MODES, size=number) / MODES
    centres = RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    points = centres + DEVIATION * rng.normal(size=(number, 2))
    return Split(points.astype(np.float32), rng.normal(size=(number, NOISE)).astype(np.float32))
