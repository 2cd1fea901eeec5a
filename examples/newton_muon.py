"""Newton-Muon: our solve before Optax's Muon. The two lines are those of `solve` and `tx`."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from optax.contrib import MuonDimensionNumbers, muon
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax

WIDTHS = (64, 128, 64, 32, 6, 32, 64, 128, 64)
NAMES = [f"layer{i}" for i in range(len(WIDTHS) - 1)]


def init(key):
    """A weight and a bias for each layer."""
    shapes = zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
    keys = jax.random.split(key, len(NAMES))
    return {
        name: {"w": jax.random.normal(k, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for name, k, shape in zip(NAMES, keys, shapes, strict=True)
    }


def loss_fn(params, x):
    """A deep autoencoder's: half the squared error."""
    z = x
    for name in NAMES[:-1]:
        z = jnp.tanh(z @ params[name]["w"] + params[name]["b"])
    z = z @ params["layer7"]["w"] + params["layer7"]["b"]
    return 0.5 * jnp.mean(jnp.sum((z - x) ** 2, -1))


def train(tx, x, steps):
    """Trains for some steps with batches of 128: each step's loss."""

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
    return losses


def main(steps=400, figure="newton_muon.png", rate=0.03, ours=0.03):
    """Compares Muon with Newton-Muon, each at the best of five rates."""
    _, axes = plt.subplots()
    x = jnp.asarray(load_digits().data, jnp.float32) / 16
    # Muon is for the hidden weights; biases and the last layer have Adam, and the plain gradient.
    chosen = {name: {"w": name != "layer7", "b": False} for name in NAMES}
    numbers = jax.tree.map(lambda hidden: MuonDimensionNumbers() if hidden else None, chosen)

    def by_muon(rate):
        schedule = optax.cosine_decay_schedule(rate, steps)
        return muon(schedule, adam_learning_rate=3e-3, muon_weight_dimension_numbers=numbers)

    solve = cqjax.scale_by_consequentialism(relative_damping=0.2)
    tx = optax.chain(optax.masked(solve, chosen), by_muon(ours))
    curves = {}
    for name, rule in (("Muon", optax.with_extra_args_support(by_muon(rate))), ("Newton-Muon", tx)):
        curves[name] = train(rule, x, steps)
        print(f"{name}: loss {curves[name][-1]:.3f}")
        axes.semilogy(curves[name], label=name)
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.legend()
    axes.figure.savefig(figure)
    return curves


if __name__ == "__main__":
    main()
