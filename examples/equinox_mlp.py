"""An Equinox model: its arrays are the parameters, the rest is put back within the loss."""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax


def main(steps=300, figure="equinox_mlp.png"):
    """Trains on scikit-learn's digits, and draws the loss."""
    images, labels = load_digits(return_X_y=True)
    x, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    model = eqx.nn.MLP(64, 10, width_size=128, depth=3, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, labels):
        model = eqx.combine(params, static)
        logits = jax.vmap(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = cqjax.cadam()

    @jax.jit
    def step(params, state, x, labels):
        loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, labels)
        updates, state = tx.update(grads, state, params, captures=captures)
        return eqx.apply_updates(params, updates), state, loss

    print(cqjax.plan(loss_fn)(params, x[:64], labels[:64]))
    state, losses = tx.init(params), []
    for key in track(jax.random.split(jax.random.key(1), steps)):
        batch = jax.random.choice(key, 1400, (64,))
        params, state, loss = step(params, state, x[batch], labels[batch])
        losses.append(float(loss))
    found = jax.vmap(eqx.combine(params, static))(x[1400:]).argmax(-1)
    print(f"loss {losses[-1]:.2g}, test accuracy {(found == labels[1400:]).mean():.1%}")
    _, axes = plt.subplots()
    axes.semilogy(losses)
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.figure.savefig(figure)
    return losses


if __name__ == "__main__":
    main()
