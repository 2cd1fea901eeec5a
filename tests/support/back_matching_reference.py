"""Back-matching, written from Zhang, Chen and Liu as loops over layers, in float64 NumPy.

A network is a list of layers, bottom to top. Each has `forward(params, a)`, which returns its
output b, and `backward(db, matched)`, which returns the signal on its input: δa of ordinary
backpropagation (Eq. 3), or δ'a of back-matching. Both keep what `gradients` needs. Parameters
are {path: array} in the layouts of Flax; rows are examples where the paper has columns.
"""

import itertools
import math

import numpy as np
from references import softmax


def divide(numerator, denominator):
    """Their quotient, and 0 where the denominator is 0: the least-squares problem's smallest."""
    denominator = np.broadcast_to(denominator, numerator.shape)
    return np.divide(numerator, denominator, np.zeros_like(numerator), where=denominator != 0)


class Layer:
    """A layer without parameters; the shape of its output is that of its input by default."""

    paths = ()

    def gradients(self, n, damping):
        return {}

    def parts(self):
        """The layers that this one consists of."""
        return [self]


class Elementwise(Layer):
    """b = f(a): as in backpropagation, δa = δb f'(a) (Eqs. 29 to 31)."""

    def __init__(self, function, derivative):
        self.function, self.derivative = function, derivative

    def forward(self, params, a):
        self.a = a
        return self.function(a)

    def backward(self, db, matched):
        return db * self.derivative(self.a)


def relu():
    return Elementwise(lambda a: np.maximum(a, 0.0), lambda a: (a > 0).astype(a.dtype))


def tanh():
    return Elementwise(np.tanh, lambda a: 1.0 - np.tanh(a) ** 2)


class Reshape(Layer):
    """To (examples, *shape)."""

    def __init__(self, *shape):
        self.shape = shape

    def forward(self, params, a):
        self.a = a
        return a.reshape(len(a), *self.shape)

    def backward(self, db, matched):
        return db.reshape(self.a.shape)


class Pool(Layer):
    """Maximum or mean over windows that do not overlap; as in backpropagation."""

    def __init__(self, window, kind="max"):
        self.window, self.kind = window, kind

    def windows(self):
        counts = [s // k for s, k in zip(self.a.shape[1:-1], self.window, strict=True)]
        for out in itertools.product(*map(range, counts)):
            places = zip(out, self.window, strict=True)
            yield (slice(None), *out), (slice(None), *(slice(o * k, o * k + k) for o, k in places))

    def forward(self, params, a):
        self.a = a
        counts = [s // k for s, k in zip(a.shape[1:-1], self.window, strict=True)]
        b = np.zeros((len(a), *counts, a.shape[-1]))
        axes = tuple(range(1, a.ndim - 1))
        for out, window in self.windows():
            b[out] = (np.max if self.kind == "max" else np.mean)(a[window], axis=axes)
        return b

    def backward(self, db, matched):
        da = np.zeros_like(self.a)
        for out, window in self.windows():
            if self.kind == "mean":
                signal = db[out] / math.prod(self.window)
                da[window] += signal.reshape(len(da), *(1,) * len(self.window), -1)
                continue
            for n, c in itertools.product(range(len(da)), range(da.shape[-1])):
                values = self.a[window][n, ..., c]
                first = np.unravel_index(np.argmax(values), values.shape)
                da[window][(n, *first, c)] += db[out][n, c]
        return da


class Product(Layer):
    """b = Wa + bias. Subclasses say what the rows and columns of the matrix form are."""

    def __init__(self, path):
        self.path = path

    def take(self, params):
        self.kernel = params[f"{self.path}/kernel"]
        self.bias = params.get(f"{self.path}/bias")
        return 0.0 if self.bias is None else self.bias

    def gradients(self, n, damping):
        """Eq. 7 and 21; with `damping`, Eq. 13 and 23: n (XᵀX + λI)⁻¹ Xᵀδb, X with a 1 for a bias.

        `n` examples, since the loss is a mean: δb holds 1/n.
        """
        x, db = self.rows()
        solutions, biases = [], []
        for rows, signal in zip(x, db, strict=True):
            if self.bias is not None:
                rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
            u = rows.T @ signal
            if damping is not None:
                u = n * np.linalg.solve(rows.T @ rows + damping * np.eye(rows.shape[1]), u)
            if self.bias is not None:
                u, biases = u[:-1], [*biases, u[-1]]
            solutions.append(u)
        found = {f"{self.path}/kernel": self.join(solutions)}
        if biases:
            found[f"{self.path}/bias"] = np.concatenate(biases).reshape(self.bias.shape)
        return found


class Dense(Product):
    """b = Wa over the last `axes` axes of a; the kernel's other axes are the output's."""

    def __init__(self, path, axes=1):
        super().__init__(path)
        self.axes = axes

    def forward(self, params, a):
        bias = self.take(params)
        self.shape, self.a = a.shape, a.reshape(-1, math.prod(a.shape[a.ndim - self.axes :]))
        self.w = self.kernel.reshape(self.a.shape[1], -1)
        lead = a.shape[: a.ndim - self.axes]
        return (self.a @ self.w).reshape(lead + self.kernel.shape[self.axes :]) + bias

    def backward(self, db, matched):
        self.db = db.reshape(len(self.a), -1)
        da = np.zeros_like(self.a)
        for j, w in enumerate(self.w):  # w: the weights emanating from input j
            da[:, j] = self.db @ w  # Eq. 6
            if matched:
                da[:, j] = divide(da[:, j], w @ w)  # Eq. 12
        return da.reshape(self.shape)

    def rows(self):
        return [self.a], [self.db]

    def join(self, solutions):
        return solutions[0].reshape(self.kernel.shape)


class Conv(Product):
    """A convolution (cross-correlation) of (examples, *positions, features)."""

    def __init__(self, path, stride=None, padding=None, dilation=None, groups=1, spread=None):
        """`padding` (low, high) per axis; `spread` puts spread - 1 zeros between inputs."""
        super().__init__(path)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.spread = groups, spread

    def touches(self):
        """(output position, kernel position, input position) of all products in the sum, Eq. 16."""
        taps, sizes = self.kernel.shape[: self.rank], self.a.shape[1:-1]
        for out in itertools.product(*map(range, self.out)):
            for tap in itertools.product(*map(range, taps)):
                at = [
                    o * s + t * d - low
                    for o, s, t, d, (low, _) in zip(
                        out, self.stride, tap, self.dilation, self.padding, strict=True
                    )
                ]
                if any(i % f for i, f in zip(at, self.spread, strict=True)):
                    continue  # between two inputs
                at = [i // f for i, f in zip(at, self.spread, strict=True)]
                if all(0 <= i < size for i, size in zip(at, sizes, strict=True)):
                    yield out, tap, tuple(at)

    def group(self, g):
        """The features of group g, as slices: of the input and of the output."""
        m, n = self.kernel.shape[-2], self.kernel.shape[-1] // self.groups
        return slice(g * m, g * m + m), slice(g * n, g * n + n)

    def forward(self, params, a):
        bias = self.take(params)
        self.a, self.rank = a, a.ndim - 2
        ones = (1,) * self.rank
        self.stride, self.dilation = self.stride or ones, self.dilation or ones
        self.spread, self.padding = self.spread or ones, self.padding or [(0, 0)] * self.rank
        self.out = [
            ((size - 1) * f + 1 + low + high - (k - 1) * d - 1) // s + 1
            for size, f, (low, high), k, d, s in zip(
                a.shape[1:-1],
                self.spread,
                self.padding,
                self.kernel.shape,
                self.dilation,
                self.stride,
                strict=False,
            )
        ]
        b = np.zeros((len(a), *self.out, self.kernel.shape[-1]))
        for out, tap, at in self.touches():
            for g in range(self.groups):
                m, n = self.group(g)
                b[(..., *out, n)] += a[(..., *at, m)] @ self.kernel[tap][:, n]
        return b + bias

    def backward(self, db, matched):
        self.db = db
        da, norm = np.zeros_like(self.a), np.zeros(self.a.shape[1:])
        for out, tap, at in self.touches():
            for g in range(self.groups):
                m, n = self.group(g)
                w = self.kernel[tap][:, n]
                da[(..., *at, m)] += db[(..., *out, n)] @ w.T  # Eq. 20
                norm[(*at, m)] += np.sum(w * w, axis=1)
        return divide(da, norm) if matched else da  # Eq. 22

    def rows(self):
        """im2col: rows are examples and output positions, columns kernel positions and features."""
        taps, (m, _) = self.kernel.shape[: self.rank], self.kernel.shape[-2:]
        patches = np.zeros((len(self.a), *self.out, *taps, self.a.shape[-1]))
        for out, tap, at in self.touches():
            patches[(slice(None), *out, *tap)] = self.a[(slice(None), *at)]
        count = len(self.a) * math.prod(self.out)
        x, db = [], []
        for g in range(self.groups):
            inner, outer = self.group(g)
            x.append(patches[..., inner].reshape(count, math.prod(taps) * m))
            db.append(self.db[..., outer].reshape(count, -1))
        return x, db

    def join(self, solutions):
        shape = (*self.kernel.shape[:-1], -1)
        return np.concatenate([u.reshape(shape) for u in solutions], -1)


class Norm(Layer):
    """b = r (a - mean) + β, r = γ / √(Var + ε): Eqs. 24 to 26.

    `over`: the axes of the statistics. `groups`: of the last axis, each with its own statistics.
    `statistics`: (mean, Var) where they do not come from a. `centred`: whether there is a mean.
    """

    def __init__(self, path, over, epsilon, groups=None, statistics=None, centred=True):
        self.path, self.over, self.epsilon, self.groups = path, over, epsilon, groups
        self.statistics, self.centred = statistics, centred

    def split(self, a):
        return a if self.groups is None else a.reshape(*a.shape[:-1], self.groups, -1)

    def mean(self, a):
        return np.mean(a, axis=self.over, keepdims=True)

    def forward(self, params, a):
        self.scale = params.get(f"{self.path}/scale", np.ones(a.shape[-1]))
        self.shift = params.get(f"{self.path}/bias", np.zeros(a.shape[-1]))
        self.has = [k for k in ("scale", "bias") if f"{self.path}/{k}" in params]
        c = self.split(a)
        mean = self.mean(c) if self.centred else np.zeros(())
        var = self.mean((c - mean) ** 2)
        if self.statistics is not None:
            mean, var = self.statistics
        self.deviation = np.sqrt(var + self.epsilon)
        self.normal = ((c - mean) / self.deviation).reshape(a.shape)
        return self.normal * self.scale + self.shift

    def backward(self, db, matched):
        self.db = db
        dn = self.split(db * self.scale)
        if matched:
            return divide((self.split(db) * self.deviation).reshape(db.shape), self.scale)
        if self.statistics is not None:
            return dn / self.deviation
        normal = self.split(self.normal)
        da = dn - normal * self.mean(dn * normal)  # Eq. 25, its terms put together
        return ((da - self.mean(dn) if self.centred else da) / self.deviation).reshape(db.shape)

    def gradients(self, n, damping):
        axes = tuple(range(self.db.ndim - 1))
        found = {"scale": np.sum(self.db * self.normal, axes), "bias": np.sum(self.db, axes)}
        return {f"{self.path}/{k}": found[k] for k in self.has}


class Residual(Layer):
    """b = a + f(a): the signals of the two readers of a add up."""

    def __init__(self, *layers):
        self.layers = layers

    def forward(self, params, a):
        return a + forward(self.layers, params, a)

    def backward(self, db, matched):
        return db + backward(self.layers, db, matched)

    def parts(self):
        return [part for layer in self.layers for part in layer.parts()]


class SelfAttention(Layer):
    """Flax's MultiHeadDotProductAttention of (examples, time, features)."""

    def __init__(self, path):
        self.q, self.k, self.v = (Dense(f"{path}/{name}") for name in ("query", "key", "value"))
        self.out = Dense(f"{path}/out", axes=2)

    def forward(self, params, a):
        values = (layer.forward(params, a) for layer in (self.q, self.k, self.v))
        self.values = q, k, v = [np.moveaxis(x, 2, 1) for x in values]  # (examples, heads, time, _)
        self.p = softmax(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]))
        return self.out.forward(params, np.moveaxis(self.p @ v, 1, 2))

    def backward(self, db, matched):
        """The products of q, k and v have no weight: as in backpropagation."""
        q, k, v = self.values
        d = np.moveaxis(self.out.backward(db, matched), 2, 1)
        dp = d @ v.swapaxes(2, 3)
        ds = self.p * (dp - np.sum(dp * self.p, -1, keepdims=True)) / math.sqrt(q.shape[-1])
        signals = ds @ k, ds.swapaxes(2, 3) @ q, self.p.swapaxes(2, 3) @ d
        layers = zip((self.q, self.k, self.v), signals, strict=True)
        return sum(layer.backward(np.moveaxis(s, 1, 2), matched) for layer, s in layers)

    def parts(self):
        return [self.q, self.k, self.v, self.out]


def forward(layers, params, a):
    for layer in layers:
        a = layer.forward(params, a)
    return a


def backward(layers, db, matched):
    for layer in reversed(layers):
        db = layer.backward(db, matched)
    return db


def squared_error(z, y):
    """(value, δz): mean over examples of half the squared error."""
    return 0.5 * np.sum((z - y) ** 2) / len(z), (z - y) / len(z)


def cross_entropy(z, labels):
    """(value, δz) of the mean over examples of -log softmax(z)[label]."""
    p = softmax(z)
    value = -sum(math.log(row[i]) for row, i in zip(p, labels, strict=True)) / len(z)
    return value, (p - np.eye(z.shape[-1])[labels]) / len(z)


def differentiate(layers, params, x, y, loss, *, matched=True, damping=None):
    """(value, {path: gradient}, {layer's path: signal on its output}, signal on x).

    Weights get Eq. 7 without `damping`, and Eq. 13 with it.
    """
    value, db = loss(forward(layers, params, x), y)
    dx = backward(layers, db, matched)
    parts = [part for layer in layers for part in layer.parts()]
    gradients, signals = {}, {}
    for part in parts:
        gradients |= part.gradients(len(x), damping)
        if hasattr(part, "path"):
            signals[part.path] = part.db
    return value, gradients, signals, dx
