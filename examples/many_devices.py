"""Data-parallel training: the step is that of one device, and only the arrays' placement differs.

One device? Ask for simulated ones: JAX_NUM_CPU_DEVICES=8 python many_devices.py
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax


def init(key, widths=(64, 128, 128, 10)):
    """A weight and a bias for each layer."""
    shapes = list(zip(widths[:-1], widths[1:], strict=True))
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5, "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def loss_fn(params, x, labels):
    """The mean cross-entropy of the whole batch, on however many devices it lies."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = x @ last["w"] + last["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(steps=150, figure="many_devices.png"):
    """Trains on one device and on all of them, and compares the losses."""
    _, axes = plt.subplots()
    images, labels = load_digits(return_X_y=True)
    x, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    tx = cqjax.cadam(3e-3)

    @jax.jit
    def step(params, state, x, labels):
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, labels)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss

    curves = {}
    for count in (1, jax.device_count()):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        params = jax.device_put(init(jax.random.key(0)), everywhere)
        state, losses = jax.device_put(tx.init(params), everywhere), []
        for key in track(jax.random.split(jax.random.key(1), steps)):
            rows = jax.random.choice(key, len(x), (128,))
            batch = jax.device_put((x[rows], labels[rows]), split)
            params, state, loss = step(params, state, *batch)
            losses.append(float(loss))
        curves[f"{count} devices"] = losses
        print(f"{count} devices: loss {losses[-1]:.4g}")
        axes.semilogy(losses, label=f"{count} devices", linestyle="-" if count == 1 else "--")
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.legend()
    axes.figure.savefig(figure)
    return curves


if __name__ == "__main__":
    main()
