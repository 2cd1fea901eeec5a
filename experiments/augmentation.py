"""Random flips and rotations of images, as a part of the compiled training step."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from experiments.training import Augment


def augmenter(seed: int, *, flip: bool = True, degrees: float = 0.0) -> Augment:
    """Random changes of the images of a step, which depend on the seed and the step alone.

    Args:
      seed: The seed of the random numbers.
      flip: Mirror an image, left to right, with probability 1/2.
      degrees: Rotate an image about its centre, by an angle uniform in `[-degrees, degrees]`, with
        bilinear interpolation. Pixels from outside the image repeat its border.

    Returns:
      A function of a step's number and its images `(n, height, width, channels)`.
    """

    def augment(number: jax.Array, images: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), number)
        flips, angles, _ = jax.random.split(key, 3)
        n = len(images)
        if flip:
            flipped = jax.random.bernoulli(flips, shape=(n, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        if degrees:
            angle = jnp.deg2rad(jax.random.uniform(angles, (n,), minval=-degrees, maxval=degrees))
            images = jax.vmap(rotated)(images, angle)
        return images

    return augment


def rotated(image: jax.Array, angle: jax.Array) -> jax.Array:
    """An image `(height, width, channels)`, turned about its centre from rows to columns."""
    height, width, _ = image.shape
    y = jnp.arange(height)[:, None] - (height - 1) / 2
    x = jnp.arange(width)[None, :] - (width - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    at = [cos * y - sin * x + (height - 1) / 2, sin * y + cos * x + (width - 1) / 2]
    return jax.vmap(lambda channel: map_coordinates(channel, at, order=1, mode="nearest"), -1, -1)(
        image
    )
