"""The networks of the experiments, in Flax Linen."""

import flax.linen as nn
import jax


class MLP(nn.Module):
    """The paper's fully-connected network: equal hidden layers of ReLUs (seed 000, section 5.3).

    Kernels start from Kaiming He's normal distribution, biases from zero.
    """

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
            x = nn.relu(nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(self.classes, kernel_init=nn.initializers.he_normal())(x)
