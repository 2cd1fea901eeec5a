"""Trains a small network on scikit-learn's digits, by Adam and by C-Adam, and draws both curves."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax


def init(key, widths=(64, 128, 128, 128, 10)):
    """A weight and a bias for each layer."""
    shapes = list(zip(widths[:-1], widths[1:], strict=True))
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5, "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def logits_fn(params, x):
    """The network: nothing in it knows of cqjax."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def loss_fn(params, x, labels):
    """The mean cross-entropy of a batch."""
    logits = logits_fn(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, x, labels, steps):
    """Trains for some steps with batches of 64: the parameters, and each step's loss."""

    @jax.jit
    def step(params, state, x, labels):
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, labels)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss

    params, losses = init(jax.random.key(0)), []
    state = tx.init(params)
    for key in track(jax.random.split(jax.random.key(1), steps)):
        batch = jax.random.choice(key, len(x), (64,))
        params, state, loss = step(params, state, x[batch], labels[batch])
        losses.append(float(loss))
    return params, losses


def main(steps=300, figure="getting_started.png", rate=3e-3):
    """Compares Adam, at the best of five rates, with C-Adam as it comes."""
    _, axes = plt.subplots()
    images, labels = load_digits(return_X_y=True)
    x, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    rules = {"Adam": optax.with_extra_args_support(optax.adam(rate)), "C-Adam": cqjax.cadam()}
    curves = {}
    for name, tx in rules.items():
        params, curves[name] = train(tx, x[:1400], labels[:1400], steps)
        accuracy = (logits_fn(params, x[1400:]).argmax(-1) == labels[1400:]).mean()
        print(f"{name}: loss {curves[name][-1]:.2g}, test accuracy {accuracy:.1%}")
        axes.semilogy(curves[name], label=name)
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.legend()
    axes.figure.savefig(figure)
    return curves


if __name__ == "__main__":
    main()
