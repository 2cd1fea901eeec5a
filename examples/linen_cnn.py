"""A Linen CNN with batch normalisation, a TrainState, and C-Adam with a schedule."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax
from cqjax.training import TrainState


class CNN(nn.Module):
    """Two convolutions, each with batch normalisation and pooling, and a dense layer."""

    @nn.compact
    def __call__(self, x, train):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class State(TrainState):
    """Flax's TrainState, whose `apply_gradients` takes `captures=`, and the running averages."""

    batch_stats: Any


@jax.jit
def train_step(state, x, labels):
    """One step: the new state, and the loss."""

    def loss_fn(params, x, labels):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, new["batch_stats"]

    differentiate = cqjax.value_and_grad(loss_fn, has_aux=True)
    (loss, batch_stats), grads, captures = differentiate(state.params, x, labels)
    return state.apply_gradients(grads=grads, captures=captures, batch_stats=batch_stats), loss


def main(steps=200, figure="linen_cnn.png", rate=1e-1, ours=3e-2):
    """Compares Adam and C-Adam, each at the best of its peaks of the same schedule."""
    _, axes = plt.subplots()
    images, labels = load_digits(return_X_y=True)
    x, labels = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8, 1) / 16, jnp.asarray(labels)
    model, curves = CNN(), {}
    for name, rule, peak in (("Adam", optax.adam, rate), ("C-Adam", cqjax.cadam, ours)):
        tx = rule(optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 20, 1), steps))
        variables = model.init(jax.random.key(0), x[:1], train=False)
        state, losses = State.create(apply_fn=model.apply, tx=tx, **variables), []
        for key in track(jax.random.split(jax.random.key(1), steps), name):
            batch = jax.random.choice(key, 1400, (64,))
            state, loss = train_step(state, x[batch], labels[batch])
            losses.append(float(loss))
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        found = model.apply(variables, x[1400:], train=False).argmax(-1)
        print(f"{name}: loss {loss:.2g}, test accuracy {(found == labels[1400:]).mean():.1%}")
        curves[name] = losses
        axes.semilogy(losses, label=name)
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.legend()
    axes.figure.savefig(figure)
    return curves


if __name__ == "__main__":
    main()
