"""Fine-tuning with LoRA in NNX: the weights stay, two thin matrices beside each of them learn."""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits

import cqjax

THIN, FULL = nnx.LoRAParam, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


class Net(nnx.Module):
    """A classifier of digits; each layer has a LoRA of rank 4 beside its weight."""

    def __init__(self, rngs):
        self.hidden = nnx.List([nnx.LoRALinear(n, 128, lora_rank=4, rngs=rngs) for n in (64, 128)])
        self.last = nnx.LoRALinear(128, 10, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.last(x)


def loss_fn(model, x, labels):
    """The mean cross-entropy of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def train(model, wrt, x, labels, steps):
    """Trains those variables that `wrt` selects: each step's loss."""

    @nnx.jit
    def train_step(model, optimizer, x, labels):
        differentiate = cqjax.nnx.value_and_grad(loss_fn, wrt=wrt)
        loss, grads, captures = differentiate(model, x, labels)
        optimizer.update(model, grads, captures=captures)
        return loss

    optimizer, losses = nnx.Optimizer(model, cqjax.cadam(3e-3), wrt=wrt), []
    for number in track(range(steps)):
        batch = np.random.default_rng(number).choice(len(x), 64)
        losses.append(float(train_step(model, optimizer, x[batch], labels[batch])))
    return losses


def main(steps=150, figure="lora.png"):
    """Pretrains on digits, and fine-tunes on the same digits lying on their side."""
    images, labels = load_digits(return_X_y=True)
    upright, labels = jnp.asarray(images, jnp.float32) / 16, jnp.asarray(labels)
    lying = jnp.rot90(upright.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    model, losses = Net(nnx.Rngs(0)), []
    for what, wrt, x in (("pretrained", FULL, upright), ("fine-tuned", THIN, lying)):
        losses += train(model, wrt, x[:1400], labels[:1400], steps)
        count = sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(model, wrt)).leaves)
        found = model(lying[1400:]).argmax(-1)
        accuracy = (found == labels[1400:]).mean()
        print(f"{what}: {count:,} parameters trained, {accuracy:.1%} of lying digits right")
    _, axes = plt.subplots()
    axes.semilogy(losses)
    axes.axvline(steps, color="grey", label="from here on: lying digits, LoRA alone")
    axes.set(xlabel="steps", ylabel="loss of the batch")
    axes.legend()
    axes.figure.savefig(figure)
    return losses


if __name__ == "__main__":
    main()
