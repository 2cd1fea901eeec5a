"""Backward passes by hand, for the cases that prove the zoo's finite differences right.

Each takes (params_np, args_np) and gives {site: dz (1, n, o)}.
"""

import itertools
import math

import numpy as np
import references as ref


def _rows(dz, axes=1):
    return dz.reshape(1, -1, math.prod(dz.shape[dz.ndim - axes :]))


def _output_gradient(out, y):
    return 2.0 * (out - y) / len(y)


def mlp(params, args):
    """Dense, ReLU, Dense, squared error."""
    x, y = args
    first, last = params["params"]["Dense_0"], params["params"]["Dense_1"]
    z = x @ first["kernel"] + first["bias"]
    out = ref.relu(z) @ last["kernel"] + last["bias"]
    d_out = _output_gradient(out, y)
    d_z = (d_out @ last["kernel"].T) * (z > 0)
    return {"params/Dense_0/kernel": _rows(d_z), "params/Dense_1/kernel": _rows(d_out)}


def conv_same(params, args):
    """A padded convolution, tanh, an unpadded convolution, squared error."""
    x, y = args
    first, last = params["params"]["first"], params["params"]["last"]
    padding = [ref.same_padding(size, 3) for size in x.shape[1:3]]
    h = np.tanh(ref.conv(ref.plain_linear, "", x, first, padding=padding))
    d_out = _output_gradient(ref.conv(ref.plain_linear, "", h, last), y)
    d_h = np.zeros_like(h)
    taps, positions = last["kernel"].shape[:2], d_out.shape[1:3]
    for i, j in itertools.product(*map(range, positions)):
        for a, b in itertools.product(*map(range, taps)):
            d_h[:, i + a, j + b] += d_out[:, i, j] @ last["kernel"][a, b].T
    d_z = d_h * (1.0 - h**2)
    return {"params/first/kernel": _rows(d_z), "params/last/kernel": _rows(d_out)}


def attention(params, args):
    """Multi-head self-attention, squared error."""
    x, y = args
    p = params["params"]["attention"]
    q, k, v = (ref.dense(ref.plain_linear, "", x, p[n]) for n in ("query", "key", "value"))
    out = ref.dense(ref.plain_linear, "", ref.attend(q, k, v), p["out"], axes=2)
    d_out = _output_gradient(out, y)
    d_context = np.einsum("bto,hfo->bthf", d_out, p["out"]["kernel"])
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = 1.0 / math.sqrt(q.shape[-1])
    for b, h in itertools.product(range(len(x)), range(q.shape[2])):
        at = (b, slice(None), h)
        weights = ref.softmax(q[at] @ k[at].T * scale)
        d_weights = d_context[at] @ v[at].T
        inner = np.sum(d_weights * weights, axis=1, keepdims=True)
        d_scores = weights * (d_weights - inner) * scale
        d_q[at], d_k[at], d_v[at] = d_scores @ k[at], d_scores.T @ q[at], weights.T @ d_context[at]
    heads = {"query": d_q, "key": d_k, "value": d_v}
    sites = {f"params/attention/{name}/kernel": _rows(d, axes=2) for name, d in heads.items()}
    return sites | {"params/attention/out/kernel": _rows(d_out)}


BACKWARD = {"mlp": mlp, "conv_same": conv_same, "attention": attention}
