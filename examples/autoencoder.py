"""A deep autoencoder, the classic hard case for first-order methods: images before and after."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax

WIDTHS = (64, 128, 64, 32, 6, 32, 64, 128, 64)


def init(key):
    """A weight and a bias for each layer."""
    shapes = list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(k, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def network(params, x):
    """Images from a code of six numbers: (n, 64) -> (n, 64)."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params, x):
    """Half the squared error: a sum over pixels, and a mean over images."""
    return 0.5 * jnp.mean(jnp.sum((network(params, x) - x) ** 2, -1))


def train(tx, x, steps):
    """Trains for some steps with batches of 128: the parameters, and each step's loss."""

    @jax.jit
    def step(params, state, x):
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss

    params, losses = init(jax.random.key(0)), []
    state = tx.init(params)
    for key in track(jax.random.split(jax.random.key(1), steps)):
        params, state, loss = step(params, state, x[jax.random.choice(key, len(x), (128,))])
        losses.append(float(loss))
    return params, losses


def main(steps=400, figure="autoencoder.png", rate=1e-2):
    """Compares Adam, at the best of four rates, with C-Adam at its default: same schedule."""
    x = jnp.asarray(load_digits().data, jnp.float32) / 16
    rises_and_falls = optax.warmup_cosine_decay_schedule
    adam = optax.adam(rises_and_falls(0.0, rate, steps // 20, steps))
    cadam = cqjax.cadam(rises_and_falls(0.0, 1e-2, steps // 20, steps))
    rules = {"Adam": optax.with_extra_args_support(adam), "C-Adam": cadam}
    panels = plt.figure(figsize=(6.4, 6), layout="constrained").subplots(2, 1)
    rows, curves = [x[1400:1410]], {}
    for name, tx in rules.items():
        params, curves[name] = train(tx, x[:1400], steps)
        print(f"{name}: loss {curves[name][-1]:.3f}, of new images {loss_fn(params, x[1400:]):.3f}")
        rows.append(network(params, x[1400:1410]))
        panels[0].semilogy(curves[name], label=name)
    panels[0].set(xlabel="steps", ylabel="loss of the batch")
    panels[0].legend()
    images = np.pad(np.stack(rows).reshape(3, -1, 8, 8), ((0, 0), (0, 0), (2, 2), (2, 2)))
    panels[1].imshow(images.transpose(0, 2, 1, 3).reshape(36, -1), cmap="gray_r", vmin=0, vmax=1)
    panels[1].set(xticks=[], yticks=[5.5, 17.5, 29.5], yticklabels=["new images", *rules])
    plt.savefig(figure)
    return curves


if __name__ == "__main__":
    main()
