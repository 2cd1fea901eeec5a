"""A Haiku network: `hk.transform` gives a pure function, which is all that cqjax needs."""

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax


def main(steps=300, figure="haiku_mlp.png"):
    """Trains on scikit-learn's digits, and draws the loss."""
    images, labels = load_digits(return_X_y=True)
    x, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([128, 128, 128, 10])(x)))
    params = network.init(jax.random.key(0), x[:1])

    def loss_fn(params, x, labels):
        logits = network.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = cqjax.cadam()

    @jax.jit
    def step(params, state, x, labels):
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, labels)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss

    print(cqjax.plan(loss_fn)(params, x[:64], labels[:64]))
    state, losses = tx.init(params), []
    for key in track(jax.random.split(jax.random.key(1), steps)):
        batch = jax.random.choice(key, 1400, (64,))
        params, state, loss = step(params, state, x[batch], labels[batch])
        losses.append(float(loss))
    found = network.apply(params, x[1400:]).argmax(-1)
    print(f"loss {losses[-1]:.2g}, test accuracy {(found == labels[1400:]).mean():.1%}")
    _, axes = plt.subplots()
    axes.semilogy(losses)
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.figure.savefig(figure)
    return losses


if __name__ == "__main__":
    main()
