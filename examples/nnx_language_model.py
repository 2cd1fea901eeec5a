"""A transformer language model in NNX: trained, saved by Orbax, and resumed in a new model."""

import argparse
import tempfile

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import track

import cqjax

LENGTH, WIDTH = 32, 64


class Transformer(nnx.Module):
    """Predicts the next character by a layer of attention and an MLP."""

    def __init__(self, rngs):
        self.characters = nnx.Embed(128, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.head = nnx.Linear(4 * WIDTH, 128, rngs=rngs)

    def __call__(self, text):
        x = self.characters(text) + self.places(jnp.arange(LENGTH))
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(text))
        return self.head(nnx.gelu(self.hidden(self.norms[1](x))))


def loss_fn(model, text):
    """The mean cross-entropy of the next characters."""
    return optax.softmax_cross_entropy_with_integer_labels(model(text[:, :-1]), text[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, text):
    """Updates both in place, and returns the loss."""
    loss, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model, text)
    optimizer.update(model, grads, captures=captures)
    return loss


def batches(steps, first=0):
    """Pieces of the text of a module of Python, from the step `first` on."""
    text = np.fromfile(argparse.__file__, np.uint8).astype(np.int32)
    for number in track(range(first, first + steps)):
        starts = np.random.default_rng(number).integers(0, len(text) - LENGTH - 1, (16, 1))
        yield text[starts + np.arange(LENGTH + 1)] % 128


def main(steps=150, figure="nnx_language_model.png", tx=None):
    """Trains for half of the steps, saves, and goes on with what a new process would restore."""
    tx, model = tx or cqjax.cadam(), Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(train_step(model, optimizer, text)) for text in batches(steps)]
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/state", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        model = Transformer(nnx.Rngs(1))  # other first weights, all of which are replaced
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        now = nnx.state((model, optimizer))
        nnx.update((model, optimizer), checkpointer.restore(f"{folder}/state", now))
    losses += [float(train_step(model, optimizer, text)) for text in batches(steps, steps)]
    print(f"when saved {np.mean(losses[steps - 10 : steps]):.2f}, now {np.mean(losses[-10:]):.2f}")
    _, axes = plt.subplots()
    axes.plot(losses)
    axes.axvline(steps, color="grey")
    axes.set(xlabel="steps", ylabel="loss", title="Grey: saved, and resumed in a new model")
    axes.figure.savefig(figure)
    return losses


if __name__ == "__main__":
    main()
