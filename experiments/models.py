"""The networks of the experiments, in Flax Linen.

Kernels start from Kaiming He's normal distribution, the transformer's from Flax's default. Biases
start from zero. Batch normalisation is as in Zhang, Chen and Liu: it stands before each ReLU and
has no parameters, and such a network has no biases. With `train=True` it normalises by the batch's
statistics, and updates the running averages, the collection `batch_stats`. Without, it uses them.
"""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

_Dense = partial(nn.Dense, use_bias=False, kernel_init=nn.initializers.he_normal())
_Conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


class MLP(nn.Module):
    """The network of Paeedeh and Ghiasi-Shirazi, section 5.3: equal hidden layers of ReLUs."""

    width: int
    """Neurons of a hidden layer."""
    depth: int
    """Number of hidden layers."""
    classes: int
    """Number of outputs."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, ...)`."""
        x = images.reshape(len(images), -1)
        for _ in range(self.depth):
            x = nn.relu(_Dense(self.width, use_bias=True)(x))
        return _Dense(self.classes, use_bias=True)(x)


class LeNet(nn.Module):
    """LeNet with batch normalisation: Zhang, Chen and Liu, section 3.3.

    The paper does not print the layers' sizes. The defaults are those of LeNet-5. On 32 x 32 images
    they give the output positions that the paper prints, 25 and 196 after pooling.
    """

    channels: tuple[int, int] = (6, 16)
    """Output channels of the two convolutions, 5 x 5."""
    hidden: tuple[int, int] = (120, 84)
    """Neurons of the two hidden fully-connected layers."""
    classes: int = 10
    """Number of outputs."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, channels)`."""
        x = images
        for number, channels in enumerate(self.channels, start=1):
            x = _Conv(channels, (5, 5), padding="VALID", name=f"cv{number}")(x)
            x = _pool(nn.relu(_normalise(x, train)))
        x = x.reshape(len(x), -1)
        for number, width in enumerate(self.hidden, start=1):
            x = nn.relu(_normalise(_Dense(width, name=f"fc{number}")(x), train))
        return _Dense(self.classes, name="fc3")(x)


class VGG(nn.Module):
    """VGG with one fully-connected layer and batch normalisation: Zhang, Chen and Liu, section 4.

    Five stages of 3 x 3 convolutions take 32 x 32 images to one position of 512 channels. A stage
    ends with 2 x 2 pooling. Smaller images arrive at one position earlier, and are pooled no more.
    """

    depth: Literal[11, 13, 16, 19]
    """The number in the network's name. It counts two dense layers that are left out here."""
    classes: int = 10
    """Number of outputs."""
    width: int = 64
    """Channels of the first stage. The last two stages have eight times as many."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, channels)`."""
        convolutions = {
            11: (1, 1, 2, 2, 2),
            13: (2, 2, 2, 2, 2),
            16: (2, 2, 3, 3, 3),
            19: (2, 2, 4, 4, 4),
        }[self.depth]
        x = images
        for stage, times in enumerate((1, 2, 4, 8, 8)):
            for number in range(convolutions[stage]):
                x = _Conv(times * self.width, (3, 3), name=f"conv{stage + 1}_{number + 1}")(x)
                x = nn.relu(_normalise(x, train))
            if min(x.shape[1:3]) > 1:
                x = _pool(x)
        return _Dense(self.classes, name="fc")(x.reshape(len(x), -1))


class ResNet(nn.Module):
    """The residual network for CIFAR-10 of He et al. (2016): three stages of 6n + 2 layers in all.

    A block is two 3 x 3 convolutions and a shortcut past them. The stages have `width`, twice and
    four times as many channels, and the second and third halve the image. There, the first block's
    shortcut takes every second position and appends zero channels (the paper's option A).
    """

    depth: int = 20
    """Number of layers, 6n + 2."""
    width: int = 16
    """Channels of the first stage."""
    classes: int = 10
    """Number of outputs."""
    batch_norm: bool = True
    """Whether there is batch normalisation."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Return the logits `(n, classes)` of images `(n, height, width, channels)`."""

        def normalise(x: jax.Array) -> jax.Array:
            return _normalise(x, train) if self.batch_norm else x

        x = nn.relu(normalise(_Conv(self.width, (3, 3), name="conv")(images)))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                name = f"stage{stage + 1}_block{block + 1}"
                channels, stride = self.width << stage, 2 if stage and not block else 1
                y = _Conv(channels, (3, 3), stride, name=f"{name}_conv1")(x)
                y = _Conv(channels, (3, 3), name=f"{name}_conv2")(nn.relu(normalise(y)))
                if stride == 2:
                    x = jnp.pad(x[:, ::2, ::2], ((0, 0),) * 3 + ((0, channels // 2),))
                x = nn.relu(x + normalise(y))
        return _Dense(self.classes, name="fc")(x.mean(axis=(1, 2)))


class TransformerBlock(nn.Module):
    """One block of a pre-normalised transformer: self-attention, then two dense layers."""

    heads: int = 8
    """Heads of the attention."""
    causal: bool = False
    """Whether each position attends only to itself and those before it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Take sequences `(n, length, width)` to sequences of the same shape."""
        width = x.shape[-1]
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))


def _pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2 x 2 block, as `nn.max_pool` has it.

    On CPUs the gradient of `nn.max_pool` is slow: VGG-11's step took 1.4 times as long with it.
    """
    height, width = (size // 2 * 2 for size in x.shape[1:3])
    x = jnp.maximum(x[:, 0:height:2], x[:, 1:height:2])
    return jnp.maximum(x[:, :, 0:width:2], x[:, :, 1:width:2])


def _normalise(x: jax.Array, train: bool) -> jax.Array:
    """Batch normalisation without parameters."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, use_bias=False, use_scale=False
    )(x)
