"""A transformer language model in NNX: trained, saved by Orbax, and resumed in a new model."""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import track

import cqjax

LENGTH, WIDTH = 32, 64


class Block(nnx.Module):
    """Attention and an MLP, each with a normalisation before it."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Predicts the next character."""

    def __init__(self, rngs):
        self.characters = nnx.Embed(128, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 128, rngs=rngs)

    def __call__(self, text):
        x = self.characters(text) + self.places(jnp.arange(LENGTH))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model, text):
    """The mean cross-entropy of the next characters."""
    logits = model(text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, text):
    """Updates both in place, and returns the loss."""
    loss, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model, text)
    optimizer.update(model, grads, captures=captures)
    return loss


def batches(steps, first=0):
    """Pieces of the text of a module of Python, from the step `first` on."""
    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
    for number in track(range(first, first + steps)):
        starts = np.random.default_rng(number).integers(0, len(text) - LENGTH - 1, (16, 1))
        yield text[starts + np.arange(LENGTH + 1)] % 128


def main(steps=150, figure="nnx_language_model.png", tx=None):
    """Trains for half of the steps, saves, and goes on with what a new process would restore."""
    tx, losses = tx or cqjax.cadam(), []
    model = Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses += [float(train_step(model, optimizer, text)) for text in batches(steps)]
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/state", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        model = Transformer(nnx.Rngs(1))  # other first weights, all of which are replaced
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = checkpointer.restore(f"{folder}/state", nnx.state((model, optimizer)))
        nnx.update((model, optimizer), state)
    losses += [float(train_step(model, optimizer, text)) for text in batches(steps, steps)]
    print(f"loss {losses[0]:.2f}, at the checkpoint {losses[steps - 1]:.2f}, now {losses[-1]:.2f}")
    plt.plot(losses)
    plt.axvline(steps, color="grey", label="saved, and resumed in a new model")
    plt.xlabel("steps")
    plt.ylabel("loss of the batch")
    plt.legend()
    plt.savefig(figure)
    return losses


if __name__ == "__main__":
    main()
