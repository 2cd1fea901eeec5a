"""Float64 NumPy versions of layers, written as plainly as possible.

Every function that applies a weight takes ``linear(site, x, w) -> z``, which computes
``z = x @ w`` for x (B, n, d) and w (B, d, o). The caller decides what else ``linear`` does:
record x, or perturb z to differentiate by finite differences.
"""

import itertools
import math

import numpy as np


def plain_linear(site, x, w):
    """z = x @ w, nothing recorded."""
    return x @ w


# Activations and losses.


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    """The tanh approximation, Flax's default."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def squared_error(prediction, target):
    """Sum over outputs, mean over the leading (batch) dimension."""
    return np.sum((prediction - target) ** 2) / len(target)


def cross_entropy(logits, labels):
    """Mean over every position of -log softmax(logits)[label]."""
    p = softmax(logits).reshape(-1, logits.shape[-1])
    total = 0.0
    for row, label in zip(p, labels.reshape(-1), strict=True):
        total -= np.log(row[label])
    return total / len(p)


# Dense layers.


def contract(linear, site, x, kernel, axes=1):
    """Contracts the last `axes` axes of x with the first `axes` axes of the kernel."""
    lead, inner, outer = x.shape[: x.ndim - axes], kernel.shape[:axes], kernel.shape[axes:]
    d = math.prod(inner)
    z = linear(site, x.reshape(1, -1, d), kernel.reshape(1, d, -1))
    return z[0].reshape(lead + outer)


def dense(linear, path, x, layer, axes=1):
    """A Flax Dense or DenseGeneral layer {"kernel": ..., "bias": ... or absent}."""
    z = contract(linear, f"{path}/kernel", x, layer["kernel"], axes)
    return z + layer.get("bias", 0.0)


def grouped_dense(linear, path, x, layer):
    """Separate kernels for separate groups: x (B, n, d), kernel (B, d, o), bias (B, o)."""
    z = linear(f"{path}/kernel", x, layer["kernel"])
    return z + layer["bias"][:, None] if "bias" in layer else z


def one_hot(tokens, size):
    out = np.zeros((tokens.size, size))
    for row, token in zip(out, tokens.reshape(-1), strict=True):
        row[token] = 1.0
    return out


def embed(linear, path, tokens, layer):
    """A table lookup as the product of one-hot rows with the table."""
    table = layer["embedding"]
    x = one_hot(tokens, len(table))
    z = linear(f"{path}/embedding", x[None], table[None])
    return z[0].reshape(tokens.shape + table.shape[1:])


# Convolutions.


def same_padding(size, kernel, stride=1, dilation=1):
    """(low, high) padding of one axis under "SAME"."""
    out = -(-size // stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def dilate(x, factors):
    """Puts factor - 1 zeros between neighbours on the spatial axes of (N, *spatial, C)."""
    spatial = [(s - 1) * f + 1 for s, f in zip(x.shape[1:-1], factors, strict=True)]
    out = np.zeros((len(x), *spatial, x.shape[-1]))
    for position in itertools.product(*map(range, x.shape[1:-1])):
        target = tuple(p * f for p, f in zip(position, factors, strict=True))
        out[(slice(None), *target)] = x[(slice(None), *position)]
    return out


def im2col(x, kernel_size, stride, padding, dilation):
    """Patches of x (N, *spatial, C): (N, *output, *kernel_size, C), by explicit loops."""
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    output = [
        (size - (k - 1) * dil - 1) // s + 1
        for size, k, s, dil in zip(x.shape[1:-1], kernel_size, stride, dilation, strict=True)
    ]
    patches = np.zeros((len(x), *output, *kernel_size, x.shape[-1]))
    for out in itertools.product(*map(range, output)):
        for tap in itertools.product(*map(range, kernel_size)):
            steps = zip(out, stride, tap, dilation, strict=True)
            at = tuple(o * s + t * dil for o, s, t, dil in steps)
            patches[(slice(None), *out, *tap)] = x[(slice(None), *at)]
    return patches


def split_groups(matrix, groups):
    """A Flax kernel (*taps, C/groups, O), as (groups, taps * C/groups, O/groups)."""
    flat = matrix.reshape(-1, groups, matrix.shape[-1] // groups)
    return flat.transpose(1, 0, 2)


def join_groups(matrix, shape):
    """The inverse of split_groups."""
    return matrix.transpose(1, 0, 2).reshape(shape)


def conv(
    linear, path, x, layer, stride=None, padding=None, dilation=None, groups=1, input_dilation=None
):
    """A Flax Conv on (N, *spatial, C); `padding` is a list of (low, high), or None for none."""
    kernel = layer["kernel"]
    rank = kernel.ndim - 2
    ones = (1,) * rank
    if input_dilation is not None:
        x = dilate(x, input_dilation)
    size, per_group = kernel.shape[:rank], kernel.shape[rank]
    patches = im2col(x, size, stride or ones, padding or [(0, 0)] * rank, dilation or ones)
    lead = patches.shape[: rank + 1]
    columns = patches.reshape(math.prod(lead), math.prod(size), groups, per_group)
    columns = columns.transpose(2, 0, 1, 3).reshape(groups, math.prod(lead), -1)
    z = linear(f"{path}/kernel", columns, split_groups(kernel, groups))
    return z.transpose(1, 0, 2).reshape(*lead, kernel.shape[-1]) + layer.get("bias", 0.0)


# Normalisation and attention.


def layer_norm(x, layer, epsilon=1e-6):
    mean = x.mean(axis=-1, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * layer["scale"] + layer["bias"]


def batch_norm(x, layer, epsilon=1e-5):
    """Normalises by the batch's own statistics, over every axis but the last."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axis=axes)
    var = ((x - mean) ** 2).mean(axis=axes)
    return (x - mean) / np.sqrt(var + epsilon) * layer["scale"] + layer["bias"]


def attend(q, k, v):
    """Dot-product attention on (batch, time, heads, head features), by loops."""
    out = np.zeros_like(q)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        scores = q[b, :, h] @ k[b, :, h].T / math.sqrt(q.shape[-1])
        out[b, :, h] = softmax(scores) @ v[b, :, h]
    return out


def self_attention(linear, path, x, layer):
    """Flax's MultiHeadDotProductAttention of x (batch, time, features) with itself."""
    q, k, v = (dense(linear, f"{path}/{n}", x, layer[n]) for n in ("query", "key", "value"))
    return dense(linear, f"{path}/out", attend(q, k, v), layer["out"], axes=2)


# Recurrent cells: (carry, input) -> carry, all with Flax's parameter names.


def simple_cell(linear, path, h, x, layer):
    return np.tanh(
        dense(linear, f"{path}/i", x, layer["i"]) + dense(linear, f"{path}/h", h, layer["h"])
    )


def gru_cell(linear, path, h, x, layer):
    i = {g: dense(linear, f"{path}/i{g}", x, layer[f"i{g}"]) for g in "rzn"}
    s = {g: dense(linear, f"{path}/h{g}", h, layer[f"h{g}"]) for g in "rzn"}
    r, z = sigmoid(i["r"] + s["r"]), sigmoid(i["z"] + s["z"])
    n = np.tanh(i["n"] + r * s["n"])
    return (1.0 - z) * n + z * h


def lstm_cell(linear, path, carry, x, layer):
    c, h = carry
    a = {
        g: dense(linear, f"{path}/i{g}", x, layer[f"i{g}"])
        + dense(linear, f"{path}/h{g}", h, layer[f"h{g}"])
        for g in "ifgo"
    }
    c = sigmoid(a["f"]) * c + sigmoid(a["i"]) * np.tanh(a["g"])
    return c, sigmoid(a["o"]) * np.tanh(c)
