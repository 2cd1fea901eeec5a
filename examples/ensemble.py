"""An ensemble: `jax.vmap` of the whole training step. Each member is solved for by itself."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax

MEMBERS, WIDTHS = 8, (64, 32, 32, 10)


def init(key):
    """A weight and a bias for each layer."""
    shapes = list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5, "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def logits_fn(params, x):
    """One member."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def loss_fn(params, x, labels):
    """The mean cross-entropy of a batch."""
    logits = logits_fn(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(steps=200, figure="ensemble.png"):
    """Trains all members at once, each with batches of its own."""
    images, labels = load_digits(return_X_y=True)
    x, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    tx = cqjax.cadam(3e-3)

    def step(params, state, key):
        batch = jax.random.choice(key, 1400, (64,))
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x[batch], labels[batch])
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss

    all_steps = jax.jit(jax.vmap(step))
    params = jax.vmap(init)(jax.random.split(jax.random.key(0), MEMBERS))
    state, losses = jax.vmap(tx.init)(params), []
    for key in track(jax.random.split(jax.random.key(1), steps)):
        params, state, loss = all_steps(params, state, jax.random.split(key, MEMBERS))
        losses.append(loss)
    logits = jax.vmap(logits_fn, (0, None))(params, x[1400:])  # (members, n, 10)
    right = (logits.argmax(-1) == labels[1400:]).mean(-1)
    together = jax.nn.softmax(logits).mean(0).argmax(-1)
    print(f"members: {right.min():.1%} to {right.max():.1%} of new digits right")
    print(f"together: {(together == labels[1400:]).mean():.1%}")
    losses = jnp.stack(losses)
    _, axes = plt.subplots()
    axes.semilogy(losses)
    axes.set(xlabel="steps", ylabel="loss of each member's batch")
    axes.figure.savefig(figure)
    return losses.mean(-1).tolist()


if __name__ == "__main__":
    main()
