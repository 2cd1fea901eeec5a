"""Adam and C-Adam on weights that a loss makes of parameters: weight normalisation, and MADE.

Each optimizer has the same five rates, picked on validation data, with a linear decay to zero.
Prints for each: the rate, and of three seeds the medians of the last training loss (the mean of the
last 20 steps), of the validation loss, of the steps that C-Adam needs to come to Adam's last
training loss, and of the time of a step.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import cqjax

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STEPS, BATCH, SEEDS = 400, 128, 3
SIZE, HIDDEN = 64, 128


class WeightNormed(nn.Module):
    """64-128-128-10 with weight normalisation in each layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        for _ in range(2):
            x = nn.relu(nn.WeightNorm(nn.Dense(HIDDEN))(x))
        return nn.WeightNorm(nn.Dense(10))(x)

    def loss(self, params, x, labels):
        """The mean cross entropy."""
        logits = self.apply(params, x)
        assert isinstance(logits, jax.Array)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Made(nn.Module):
    """A masked autoencoder for distribution estimation of 64 binary pixels, one hidden layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits, each of the pixels before its own."""
        degree = np.arange(HIDDEN) % (SIZE - 1)
        masks = (np.arange(SIZE)[:, None] <= degree, degree[:, None] < np.arange(SIZE))
        for i, mask in enumerate(masks):
            kernel = self.param(f"kernel{i}", nn.initializers.lecun_normal(), mask.shape)
            bias = self.param(f"bias{i}", nn.initializers.zeros, mask.shape[1])
            x = (nn.relu(x) if i else x) @ (kernel * mask) + bias
        return x

    def loss(self, params, x, labels):
        """The mean negative log-likelihood."""
        pixels = (x > 0).astype(x.dtype)
        logits = self.apply(params, pixels)
        return optax.sigmoid_binary_cross_entropy(logits, pixels).sum(-1).mean()


OPTIMIZERS = {
    "Adam": (optax.adam, "uncovered"),
    "C-Adam, uncovered": (cqjax.cadam, "uncovered"),
    "C-Adam, nearest": (cqjax.cadam, "nearest"),
}


@functools.cache
def data():
    """Training and validation data: images with entries in [-1, 1], and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 8 - 1).astype(np.float32), labels[order].astype(np.int32)
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(model, name, rate, seed):
    """Training losses, and the validation loss in the end."""
    (images, labels), validation = jax.tree.map(jnp.asarray, data())
    make, reparametrized = OPTIMIZERS[name]
    tx = make(lambda count: rate * (1 - count / STEPS))
    params = model.init(jax.random.key(seed), images[:1])

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, len(images), (BATCH,), replace=False)
        batch = images[rows], labels[rows]
        if name == "Adam":
            loss, grads = jax.value_and_grad(model.loss)(params, *batch)
            updates, state = tx.update(grads, state, params)
        else:
            differentiate = cqjax.value_and_grad(
                model.loss, reparametrized=reparametrized, on_uncovered="fallback"
            )
            loss, grads, captures = differentiate(params, *batch)
            updates, state = tx.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(jax.random.key(seed + 100), STEPS)
    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return losses, model.loss(params, *validation)


def main():
    """Trains all, and prints a table."""
    for model in (WeightNormed(), Made()):
        goal = None
        for name in OPTIMIZERS:
            runs = {}
            for rate in RATES:
                found = [train(model, name, rate, seed) for seed in range(SEEDS)]
                runs[rate] = [np.stack(each) for each in zip(*found, strict=True)]
            best = min(RATES, key=lambda rate: np.nan_to_num(np.median(runs[rate][1]), nan=np.inf))
            losses, valid = runs[best]
            last = float(np.median(losses[:, -20:].mean(1)))
            goal = goal or last
            smooth = np.stack([np.convolve(each, np.ones(20) / 20, "valid") for each in losses])
            reached = np.median(np.where((smooth <= goal).any(1), (smooth <= goal).argmax(1), -20))
            start = time.perf_counter()
            jax.block_until_ready(train(model, name, best, 0))
            each = (time.perf_counter() - start) / STEPS * 1e3
            print(
                f"{type(model).__name__:13} {name:18} rate {best:<6} training {last:.4f} "
                f"validation {np.median(valid):.4f} Adam's after {int(reached) + 20} steps, "
                f"{each:.2f} ms a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
