"""Networks that are timed and not trained elsewhere, with Flax's usual first weights."""

from typing import Any

import flax.linen as nn
import jax

from experiments.everyday.networks import Language
from experiments.models import TransformerBlock


class ActorCritic(nn.Module):
    """The network that reads Atari's screens: three convolutions, a dense layer and two heads."""

    actions: int = 6
    hidden: int = 512

    @nn.compact
    def __call__(self, screens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return logits `(n, actions)` and values `(n,)` of screens `(n, 84, 84, 4)`."""
        x = screens
        for channels, window, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.Conv(channels, (window, window), (stride, stride), padding="VALID")(x)
            x = nn.relu(x)
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.actions)(x), nn.Dense(1)(x)[:, 0]


class ScannedLanguage(Language):
    """`Language`, whose blocks are one block that `nn.scan` repeats."""

    def repeated(self, x: jax.Array) -> jax.Array:
        """Apply the blocks."""
        axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(_Block, length=self.blocks, **axes)(self.heads)(x, None)
        return x


class _Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return TransformerBlock(self.heads, causal=True)(x), None
