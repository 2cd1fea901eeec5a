"""The networks of the everyday work, in Flax Linen with its usual first weights."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import TransformerBlock

HEAD, FIRST = "head", "first"
"""Names of the last layer, and of the first if it is a convolution."""


class Language(nn.Module):
    """A transformer that predicts each next symbol: pre-normalised blocks, learned positions."""

    symbols: int
    width: int = 64
    blocks: int = 2
    heads: int = 4
    tied: bool = False
    """Whether the table of the symbols' embeddings is the last layer, too."""

    @nn.compact
    def __call__(self, symbols: jax.Array) -> jax.Array:
        """Return the logits `(n, length, symbols)` of texts `(n, length)`."""
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (symbols.shape[-1], self.width)
        )
        embed = nn.Embed(self.symbols, self.width)
        x = embed(symbols) + positions
        x = nn.LayerNorm()(self.repeated(x))
        return embed.attend(x) if self.tied else nn.Dense(self.symbols, name=HEAD)(x)

    def repeated(self, x: jax.Array) -> jax.Array:
        """Apply the blocks."""
        for _ in range(self.blocks):
            x = TransformerBlock(self.heads, causal=True)(x)
        return x


class Autoencoder(nn.Module):
    """ReLU layers down to a linear code and up again, in the same widths."""

    widths: Sequence[int] = (256, 128, 64)
    code: int = 16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, pixels)` of the pixels of images `(n, pixels)`."""
        x = images
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        x = nn.Dense(self.code)(x)
        for width in reversed(self.widths):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(images.shape[-1], name=HEAD)(x)


class ConvNet(nn.Module):
    """3 x 3 convolutions with batch normalisation; pooling after each second one; dense layers."""

    channels: Sequence[int] = (16, 16, 32, 32)
    hidden: int = 64
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, channels)`."""
        x = images
        for number, channels in enumerate(self.channels):
            name = None if number else FIRST
            x = nn.Conv(channels, (3, 3), use_bias=False, name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            if number % 2:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes, name=HEAD)(x)


class Coordinates(nn.Module):
    """ReLU layers on the sines and cosines of random multiples of the coordinates."""

    frequencies: int = 128
    scale: float = 6.0
    width: int = 128
    depth: int = 3
    outputs: int = 3

    @nn.compact
    def __call__(self, places: jax.Array) -> jax.Array:
        """Return the values `(n, outputs)` at places `(n, dimensions)` in [0, 1]."""
        shape = places.shape[-1], self.frequencies
        waves = self.scale * jax.random.normal(jax.random.key(0), shape)
        angles = 2 * jnp.pi * places @ waves
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return Dense(self.width, self.depth, self.outputs)(x)


class Dense(nn.Module):
    """Equal hidden layers of ReLUs."""

    width: int
    depth: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the outputs for examples `(n, ...)`."""
        x = x.reshape(len(x), -1)
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.outputs, name=HEAD)(x)
