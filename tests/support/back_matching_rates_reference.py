"""Algorithm 1 of Zhang, Chen and Liu and the supplement's closed forms, in float64 NumPy.

Weights are in the paper's layout here: W (outputs, inputs) of a fully connected layer,
W (n, m, w, h) of a convolution from m to n features; `of_flax` brings them there.
"""

import numpy as np


def of_flax(kernel, groups=1):
    """A Flax kernel (d, o), or (w, h, m / groups, n), in the paper's layout; 0 across groups."""
    if kernel.ndim == 2:
        return kernel.T
    inner, n = kernel.shape[-2:]
    w = np.zeros((n, inner * groups, *kernel.shape[:-2]))
    for k in range(n):
        g = k // (n // groups)
        w[k, g * inner : g * inner + inner] = np.moveaxis(kernel[..., k], -1, 0)
    return w


def mu(matrix):
    """‖W‖²₂,μ: the mean over rows of the squared norm of a row."""
    return sum(row @ row for row in matrix) / len(matrix)


def row(w):
    """W_row (n, m w h)."""
    return w.reshape(len(w), -1)


def col(w):
    """W_col (m, n w h)."""
    return np.swapaxes(w, 0, 1).reshape(w.shape[1], -1)


def algorithm_1(layers):
    """{path: rate} of layers, bottom to top.

    Layers:
      ("fc", path, W);
      ("conv", path, W, input positions, output positions after the pooling that follows);
      ("bn", path or None, γ or None), after the layer whose output it normalises;
      ("relu",), ("pool",).
    """
    m, rates = 1.0, {}
    for i, (kind, *about) in reversed(list(enumerate(layers))):
        if kind == "fc":
            path, w = about
            rates[path] = 1.0 / m / 1.0
            ratio = mu(w.T)  # Eq. 34
        elif kind == "conv":
            path, w, before, after = about
            s, c = after, before / after
            rates[path] = 1.0 / m / s
            ratio = mu(col(w)) / c  # Eq. 35
        elif kind == "bn":
            path, scale = about
            below = next(layer for layer in reversed(layers[:i]) if layer[0] in ("fc", "conv"))
            if path is not None:  # not in the paper: a scale is shared as the weights below are
                rates[path] = 1.0 / m / (below[4] if below[0] == "conv" else 1.0)
            ratio = 1.0 / mu(row(below[2]))  # Eq. 36
            if scale is not None:  # not in the paper: δa / δ'a = r² = γ² / Var
                ratio *= np.mean(scale**2)
        else:
            ratio = 1.0  # Eq. 31
        m *= ratio  # Eq. 37
    return rates


def lenet_closed_forms(fc3, fc2, fc1, cv2, cv1):
    """The factors of δW in the supplement. The last denominator has ‖W_fcᵀ‖, as its m has."""
    return {
        "fc3": 1.0,
        "fc2": mu(fc2) / mu(fc3.T),
        "fc1": (mu(fc2) * mu(fc1)) / (mu(fc3.T) * mu(fc2.T)),
        "cv2": (mu(fc2) * mu(fc1) * mu(row(cv2))) / (25 * (mu(fc3.T) * mu(fc2.T) * mu(fc1.T))),
        "cv1": (mu(fc2) * mu(fc1) * mu(row(cv2)) * mu(row(cv1)))
        / (25 * (mu(fc3.T) * mu(fc2.T) * mu(fc1.T) * mu(col(cv2)))),
    }


def vgg_layers(kernels, size, pooled):
    """`algorithm_1`'s layers of a VGG net: convolutions with "SAME", and a last dense layer.

    `kernels`: {path: kernel in Flax's layout}; `pooled[i]`: whether convolution i is pooled by 2.
    """
    layers, (*convs, last) = [], kernels.items()
    for (path, kernel), pool in zip(convs, pooled, strict=True):
        after = size // 2 if pool else size
        layers += [("conv", path, of_flax(kernel), size**2, after**2), ("bn", None, None)]
        layers += [("relu",), ("pool",)] if pool else [("relu",)]
        size = after
    return [*layers, ("fc", last[0], of_flax(last[1]))]


def measured_factors(ordinary, matched):
    """1/m = ⟨δb, δ'b⟩ / ‖δb‖² of each layer's output: Eq. 37's factor by least squares."""
    return {
        path: np.vdot(ordinary[path], matched[path]) / np.vdot(ordinary[path], ordinary[path])
        for path in ordinary
    }


def momentum_sgd(params, slopes, rates, *, learning_rate, momentum, nesterov, weight_decay, steps):
    """{path: array} after steps in the order of section 3.2: decay, rates, then momentum.

    `slopes(params)` are the gradients, `rates(params)` one number a path.
    """
    trace = {path: np.zeros_like(p) for path, p in params.items()}
    for _ in range(steps):
        g, rate, after = slopes(params), rates(params), {}
        for path, p in params.items():
            modified = (g[path] + weight_decay * p) * rate[path]
            trace[path] = momentum * trace[path] + modified
            move = modified + momentum * trace[path] if nesterov else trace[path]
            after[path] = p - learning_rate * move
        params = after
    return params
