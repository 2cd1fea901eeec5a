"""The experiments' multi-layer perceptron, trained by plain NumPy in float64."""

import numpy as np


def layers_of(params):
    """Flax's parameters as pairs of kernel and bias."""
    return [
        (np.float64(layer["kernel"]), np.float64(layer["bias"]))
        for _, layer in sorted(params["params"].items())
    ]


def train(params, x, y, batches, rate, damping=None):
    """SGD, or with damping C-SGD: the batches' losses, the last weights."""
    layers, losses = layers_of(params), []
    for batch in batches:
        inputs, logits = forward(layers, x[batch])
        n, p = len(batch), softmax(logits)
        losses.append(mean_loss(logits, y[batch]))
        dz = (p - np.eye(p.shape[1])[y[batch]]) / n
        for i in reversed(range(len(layers))):
            kernel, bias = layers[i]
            rows = np.concatenate([inputs[i], np.ones((n, 1))], axis=1)
            if damping is None:
                update = rows.T @ dz
            else:  # Paeedeh and Ghiasi-Shirazi, Eq. 63
                update = n * rows.T @ np.linalg.solve(rows @ rows.T + damping * np.eye(n), dz)
            layers[i] = (kernel - rate * update[:-1], bias - rate * update[-1])
            dz = (dz @ kernel.T) * (inputs[i] > 0)
    return np.array(losses), layers


def forward(layers, x):
    """Every layer's input, and the logits."""
    inputs = [np.float64(x).reshape(len(x), -1)]
    for kernel, bias in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ kernel + bias, 0))
    return inputs, inputs[-1] @ layers[-1][0] + layers[-1][1]


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def mean_loss(logits, y):
    """The mean cross-entropy."""
    return -np.log(softmax(logits)[np.arange(len(y)), y]).mean()


def accuracy(logits, y):
    return (logits.argmax(axis=1) == y).mean()
