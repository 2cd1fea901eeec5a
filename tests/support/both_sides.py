"""Weights that a loss uses both ways: models, their products by hand, and dense least squares.

Each model is written twice. `loss` is as people write it, with derivatives by `jax.grad`.
`by_hand` has every product of it, forwards and backwards, with something added to each. So the
gradients at the products are known without any knowledge of how a program came about.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Product(NamedTuple):
    """A product of a loss.

    Attributes:
      weight: the weight's name.
      rows: X of Z = XW, or D of Y = DWᵀ: (n, k).
      transposed: whether it is Y = DWᵀ.
      bias: the name of what is added to the result; None if nothing is.
    """

    weight: str
    rows: Any
    transposed: bool = False
    bias: str | None = None


class Recorder:
    """Multiplies, adds what it is given to each result, and remembers the rows."""

    def __init__(self, params: Mapping[str, Any], added: Mapping[int, Any] | None = None):
        self.params, self.added, self.products = params, added, []

    def __call__(self, x, weight, transposed=False, bias=None):
        w = self.params[weight].T if transposed else self.params[weight]
        z = x @ w
        if bias is not None:
            z = z + self.params[bias]
        if self.added is not None:
            z = z + self.added[len(self.products)]
        self.products.append(Product(weight, x, transposed, bias))
        return z


class Model(NamedTuple):
    """A loss with weights used both ways.

    Attributes:
      params: its parameters.
      loss: it, of (params, *args).
      args: its other arguments.
      by_hand: it, of (recorder, *args).
      terms: N.
    """

    params: dict[str, np.ndarray]
    loss: Callable[..., Any]
    args: tuple[Any, ...]
    by_hand: Callable[..., Any]
    terms: int


def updates(model: Model, damping: Callable[[np.ndarray], float]) -> dict[str, np.ndarray]:
    """What is subtracted from each parameter, at a rate of 1."""
    recorder = Recorder(model.params)
    results = []

    def keep(x, weight, transposed=False, bias=None):
        z = recorder(x, weight, transposed, bias)
        results.append(z.shape)
        return z

    model.by_hand(keep, *model.args)
    zeros = {i: jnp.zeros(shape) for i, shape in enumerate(results)}
    gradients = jax.grad(lambda added: model.by_hand(Recorder(model.params, added), *model.args))(
        zeros
    )
    found = {}
    for name in dict.fromkeys(p.weight for p in recorder.products):
        own = [(p, gradients[i]) for i, p in enumerate(recorder.products) if p.weight == name]
        found |= _least_squares(name, model, own, damping)
    return found


def _least_squares(name, model, products, damping):
    """Minimises Σ‖XU - NZ̄‖² + Σ‖DUᵀ - NȲ‖² + λ‖U‖² over U and the biases, as one dense problem."""
    d, o = model.params[name].shape
    biases = list(dict.fromkeys(p.bias for p, _ in products if p.bias is not None))
    starts, columns = {}, d * o
    for bias in biases:
        starts[bias] = columns
        columns += len(model.params[bias])
    rows, targets = [], []
    for product, gradient in products:
        for x, target in zip(np.asarray(product.rows), np.asarray(gradient), strict=True):
            for j, wanted in enumerate(target):
                equation = np.zeros(columns)
                weight = equation[: d * o].reshape(d, o)
                (weight.T if product.transposed else weight)[:, j] = x
                if product.bias is not None:
                    equation[starts[product.bias] + j] = 1
                rows.append(equation)
                targets.append(model.terms * wanted)
    matrix, target = np.array(rows), np.array(targets)
    normal = matrix.T @ matrix
    solution = np.linalg.solve(normal + damping(normal) * np.eye(columns), matrix.T @ target)
    found = {name: solution[: d * o].reshape(d, o)}
    for bias, start in starts.items():
        found[bias] = solution[start : start + len(model.params[bias])]
    return found


def mean_eigenvalue(normal: np.ndarray) -> float:
    """The mean of a matrix's eigenvalues that are not zero."""
    values = np.linalg.eigvalsh(normal)
    return float(values[values > 1e-9 * values.max()].mean())


def _network(rng: np.random.Generator) -> dict[str, np.ndarray]:
    sizes = {"w1": (2, 5), "b1": (5,), "w2": (5, 4), "b2": (4,), "w3": (4, 1), "b3": (1,)}
    return {name: rng.normal(size=size) / 2 for name, size in sizes.items()}


def network(params: Mapping[str, Any], x: Any) -> Any:
    """A scalar of one point x, (2,)."""
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    h = jnp.tanh(h @ params["w2"] + params["b2"])
    return (h @ params["w3"] + params["b3"])[0]


def _slopes(times, x):
    """The network's outputs and its gradients at the points x, by hand."""
    h1 = jnp.tanh(times(x, "w1", bias="b1"))
    h2 = jnp.tanh(times(h1, "w2", bias="b2"))
    back2 = times(jnp.ones((len(x), 1)), "w3", transposed=True)
    back1 = times((1 - h2**2) * back2, "w2", transposed=True)
    return h2, times((1 - h1**2) * back1, "w1", transposed=True)


def gradient_penalty(rng: np.random.Generator) -> Model:
    """A critic whose gradients' lengths are to be 1."""

    def loss(params, x):
        values = jax.vmap(lambda x: network(params, x))(x)
        slopes = jax.vmap(jax.grad(lambda x: network(params, x)))(x)
        return jnp.mean(values + 3 * (jnp.sqrt(jnp.sum(slopes**2, -1)) - 1) ** 2)

    def by_hand(times, x):
        h2, slopes = _slopes(times, x)
        values = times(h2, "w3", bias="b3")[:, 0]
        return jnp.mean(values + 3 * (jnp.sqrt(jnp.sum(slopes**2, -1)) - 1) ** 2)

    return Model(_network(rng), loss, (rng.normal(size=(9, 2)),), by_hand, 9)


def energy(rng: np.random.Generator) -> Model:
    """Energies, and forces, which are their negative gradients."""

    def loss(params, x, energies, forces):
        one = jax.value_and_grad(lambda x: network(params, x))
        found, slopes = jax.vmap(one)(x)
        return jnp.mean((found - energies) ** 2 + jnp.sum((slopes + forces) ** 2, -1))

    def by_hand(times, x, energies, forces):
        h2, slopes = _slopes(times, x)
        found = times(h2, "w3", bias="b3")[:, 0]
        return jnp.mean((found - energies) ** 2 + jnp.sum((slopes + forces) ** 2, -1))

    args = rng.normal(size=(7, 2)), rng.normal(size=7), rng.normal(size=(7, 2))
    return Model(_network(rng), loss, args, by_hand, 7)


def pinn(rng: np.random.Generator) -> Model:
    """Δu = f, by gradients of the gradient; and u = 0 at the same points."""

    def loss(params, x, f):
        def residual(x, f):
            return jnp.trace(jax.jacrev(jax.grad(lambda x: network(params, x)))(x)) - f

        values = jax.vmap(lambda x: network(params, x))(x)
        return jnp.mean(jax.vmap(residual)(x, f) ** 2 + values**2)

    def by_hand(times, x, f):
        h1 = jnp.tanh(times(x, "w1", bias="b1"))
        h2 = jnp.tanh(times(h1, "w2", bias="b2"))
        values = times(h2, "w3", bias="b3")[:, 0]
        one, slope1, slope2 = jnp.ones((len(x), 1)), 1 - h1**2, 1 - h2**2
        back2 = times(one, "w3", transposed=True)
        back1 = times(slope2 * back2, "w2", transposed=True)
        total = 0.0
        for i in range(2):
            # The gradient of the i-th slope with respect to x goes forwards along the weights as
            # far as the derivatives of tanh, and back again.
            forward1 = times(jnp.eye(2)[jnp.full(len(x), i)], "w1")
            forward2 = times(slope1 * forward1, "w2")
            bar2 = -2 * h2 * slope2 * back2 * forward2
            bar1 = times(bar2, "w2", transposed=True)
            bar1 = slope1 * bar1 - 2 * h1 * slope1 * back1 * forward1
            total += times(bar1, "w1", transposed=True)[:, i]
        return jnp.mean((total - f) ** 2 + values**2)

    args = rng.normal(size=(8, 2)), rng.normal(size=8)
    return Model(_network(rng), loss, args, by_hand, 8)


def tied_embedding(rng: np.random.Generator) -> Model:
    """A table that is looked up, and whose transpose makes the logits."""

    def loss(params, tokens, targets):
        h = jnp.tanh(params["table"][tokens] @ params["w"] + params["b"])
        logits = jax.nn.log_softmax(h @ params["table"].T)
        return -jnp.mean(jnp.take_along_axis(logits, targets[:, None], 1))

    def by_hand(times, tokens, targets):
        h = jnp.tanh(times(times(jax.nn.one_hot(tokens, 11), "table"), "w", bias="b"))
        logits = jax.nn.log_softmax(times(h, "table", transposed=True))
        return -jnp.mean(jnp.take_along_axis(logits, targets[:, None], 1))

    sizes = {"table": (11, 4), "w": (4, 4), "b": (4,)}
    params = {name: rng.normal(size=size) for name, size in sizes.items()}
    args = rng.integers(0, 11, 15), rng.integers(0, 11, 15)
    return Model(params, loss, args, by_hand, 15)


def tied_autoencoder(rng: np.random.Generator) -> Model:
    """A decoder whose weight is the encoder's transpose; each has its bias."""

    def loss(params, x):
        h = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.mean(jnp.sum((h @ params["w"].T + params["c"] - x) ** 2, -1))

    def by_hand(times, x):
        h = jnp.tanh(times(x, "w", bias="b"))
        return jnp.mean(jnp.sum((times(h, "w", transposed=True, bias="c") - x) ** 2, -1))

    sizes = {"w": (6, 3), "b": (3,), "c": (6,)}
    params = {name: rng.normal(size=size) for name, size in sizes.items()}
    return Model(params, loss, (rng.normal(size=(10, 6)),), by_hand, 10)


MODELS = {
    model.__name__: model
    for model in (gradient_penalty, energy, pinn, tied_embedding, tied_autoencoder)
}
