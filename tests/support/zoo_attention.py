"""Zoo: attention, embeddings, transformer blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import references as ref
from zoo_base import Case, biases, fill, flax_regression, kernels, squared_reference

HEADS = ("query", "key", "value", "out")
NORM = {
    "scale": "LayerNorm scale enters elementwise",
    "bias": "LayerNorm bias is added to no site's output",
}


class Attention(nn.Module):
    """Self-attention with two heads."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x)


def _attention(params, x, linear):
    return ref.self_attention(linear, "params/attention", x, params["params"]["attention"])


class Block(nn.Module):
    """A pre-norm transformer block."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm_in")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(h)
        h = nn.Dense(6, name="up")(nn.LayerNorm(name="norm_out")(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(h))


class Transformer(nn.Module):
    """Two rematerialised blocks and a Dense."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.remat(Block)(name=f"block_{i}")(x)
        return nn.Dense(2, name="last")(x)


def _block(linear, path, x, p):
    h = ref.layer_norm(x, p["norm_in"])
    x = x + ref.self_attention(linear, f"{path}/attention", h, p["attention"])
    h = ref.dense(linear, f"{path}/up", ref.layer_norm(x, p["norm_out"]), p["up"])
    return x + ref.dense(linear, f"{path}/down", ref.gelu(h), p["down"])


def _transformer(params, x, linear):
    p = params["params"]
    for i in range(2):
        x = _block(linear, f"params/block_{i}", x, p[f"block_{i}"])
    return ref.dense(linear, "params/last", x, p["last"])


BLOCK_LAYERS = ("up", "down", *(f"attention/{head}" for head in HEADS))
TRANSFORMER_LAYERS = ("last", *(f"block_{i}/{n}" for i in range(2) for n in BLOCK_LAYERS))


class Tied(nn.Module):
    """A language model whose output layer is its embedding, transposed."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 3, name="embed")
        h = nn.tanh(nn.Dense(3, name="mix")(embed(tokens)))
        return embed.attend(h)


class Lookup(nn.Module):
    """An embedding, and another table for the output."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(5, name="mix")(jnp.tanh(nn.Embed(5, 3, name="embed")(tokens)))


def tokens_and_labels(model):
    """`make` for a model of tokens, with cross-entropy."""

    def loss(params, tokens, labels):
        log_p = jax.nn.log_softmax(model.apply(params, tokens))
        return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))

    def make(dtype=jnp.float32):
        rng = np.random.default_rng(0)
        # The last token of the vocabulary does not occur.
        tokens = jnp.asarray(rng.integers(0, 4, (3, 4)), jnp.int32)
        labels = jnp.asarray(rng.integers(0, 5, (3, 4)), jnp.int32)
        params = fill(jax.eval_shape(model.init, jax.random.key(0), tokens), rng, dtype)
        return loss, params, (tokens, labels)

    return make


def _tied_reference(params, args, linear):
    tokens, labels = args
    p = params["params"]
    h = ref.embed(linear, "params/embed", tokens, p["embed"])
    h = np.tanh(ref.dense(linear, "params/mix", h, p["mix"]))
    table = p["embed"]["embedding"]
    logits = ref.contract(linear, "params/embed/embedding#attend", h, table.T)
    return ref.cross_entropy(logits, labels)


def _lookup_reference(params, args, linear):
    tokens, labels = args
    p = params["params"]
    h = np.tanh(ref.embed(linear, "params/embed", tokens, p["embed"]))
    return ref.cross_entropy(ref.dense(linear, "params/mix", h, p["mix"]), labels)


CASES = [
    Case(
        name="embed",
        make=tokens_and_labels(Lookup()),
        reference=_lookup_reference,
        covered=kernels("mix") | {"params/embed/embedding"},
        biases=biases("mix"),
    ),
    Case(
        name="attention",
        make=flax_regression(Attention(), (2, 3, 4)),
        reference=squared_reference(_attention),
        covered=kernels(*HEADS, root="params/attention"),
        biases=biases(*HEADS, root="params/attention"),
    ),
    Case(
        name="embed_tied",
        make=tokens_and_labels(Tied()),
        reference=_tied_reference,
        covered=kernels("mix") | {"params/embed/embedding"},
        biases=biases("mix"),
        layouts={"params/embed/embedding#attend": lambda matrix, shape: matrix[0].T},
    ),
    Case(
        name="transformer_remat",
        make=flax_regression(Transformer(), (2, 2, 4)),
        reference=squared_reference(_transformer),
        covered=kernels(*TRANSFORMER_LAYERS),
        biases=biases(*TRANSFORMER_LAYERS),
        uncovered={
            f"params/block_{i}/{norm}/{leaf}": reason
            for i in range(2)
            for norm in ("norm_in", "norm_out")
            for leaf, reason in NORM.items()
        },
    ),
]
