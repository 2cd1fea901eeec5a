"""A Keras 3 model on JAX, trained in a loop of its own by way of `stateless_call`."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported

import jax
import jax.numpy as jnp
import keras
import matplotlib.pyplot as plt
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax


def main(steps=150, figure="keras_cnn.png"):
    """Trains on scikit-learn's digits, draws the loss, and writes the weights back."""
    images, labels = load_digits(return_X_y=True)
    x, labels = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8, 1) / 16, jnp.asarray(labels)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )
    params = [variable.value for variable in model.trainable_variables]
    rest = [variable.value for variable in model.non_trainable_variables]

    def loss_fn(params, rest, x, labels):
        logits, rest = model.stateless_call(params, rest, x, training=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, rest

    tx = cqjax.cadam()

    @jax.jit
    def step(params, rest, state, x, labels):
        differentiate = cqjax.value_and_grad(loss_fn, has_aux=True)
        (loss, rest), grads, captures = differentiate(params, rest, x, labels)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), rest, state, loss

    state, losses = tx.init(params), []
    for key in track(jax.random.split(jax.random.key(1), steps)):
        batch = jax.random.choice(key, 1400, (64,))
        params, rest, state, loss = step(params, rest, state, x[batch], labels[batch])
        losses.append(float(loss))
    for variable, value in zip(model.trainable_variables, params, strict=True):
        variable.assign(value)
    for variable, value in zip(model.non_trainable_variables, rest, strict=True):
        variable.assign(value)
    found = model(x[1400:], training=False).argmax(-1)
    print(f"loss {losses[-1]:.2g}, test accuracy {(found == labels[1400:]).mean():.1%}")
    _, axes = plt.subplots()
    axes.semilogy(losses)
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.figure.savefig(figure)
    return losses


if __name__ == "__main__":
    main()
