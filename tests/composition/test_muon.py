"""Muon after the solve, and Newton-Muon (arXiv 2604.01472): written out in float64 NumPy."""

import jax
import numpy as np
import optax
import pytest
from two_layers import assert_close, gradient, loss_fn, problem, train

import cqjax

pytestmark = pytest.mark.usefixtures("float64")

RATE, ADAM_RATE, BETA = 0.1, 0.01, 0.95
DAMPING, DECAY, CAPTURE_EVERY, UPDATE_EVERY = 0.2, 0.95, 2, 3
SIZES = (12, 14, 12, 13, 12)  # kept inverses are for batches of at least twice as many rows as d


def hidden(layers):
    """The mask of the weights that Muon is for."""
    params, _ = problem()
    mask = jax.tree.map(lambda _: False, params)
    for layer in layers:
        mask[layer]["w"] = True
    return mask


def muon(mask):
    dimensions = jax.tree.map(
        lambda chosen: optax.contrib.MuonDimensionNumbers() if chosen else None, mask
    )
    return optax.contrib.muon(
        RATE, adam_learning_rate=ADAM_RATE, muon_weight_dimension_numbers=dimensions
    )


def exact(plan):
    del plan
    return cqjax.scale_by_consequentialism(damping=0.0, relative_damping=DAMPING)


def newton(plan):
    return cqjax.scale_by_consequentialism(
        damping=0.0,
        relative_damping=DAMPING,
        ema_decay=DECAY,
        capture_every=CAPTURE_EVERY,
        update_every=UPDATE_EVERY,
        plan=plan,
    )


def orthogonalized(matrix):
    """Five steps of Newton-Schulz: the singular values come near one."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Exact:
    """N (XᵀX + λI)⁻¹, λ in units of the mean of the min(n, d) eigenvalues that may not be zero."""

    def __call__(self, x):
        xx, d = x.T @ x, x.shape[1]
        return len(x) * np.linalg.inv(xx + DAMPING * np.trace(xx) / min(len(x), d) * np.eye(d))


class Newton:
    """(M + λI)⁻¹ of an average M of XᵀX / N, taken and inverted now and then."""

    def __init__(self):
        self.count, self.total, self.weight = 0, 0.0, 0.0

    def __call__(self, x):
        if self.count % CAPTURE_EVERY == 0:
            self.total = DECAY * self.total + (1 - DECAY) * x.T @ x / len(x)
            self.weight = DECAY * self.weight + 1 - DECAY
        if self.count % UPDATE_EVERY == 0:
            mean, d = self.total / self.weight, x.shape[1]
            self.inverse = np.linalg.inv(mean + DAMPING * np.trace(mean) / d * np.eye(d))
        self.count += 1
        return self.inverse


def by_hand(inverse, mask, params, batches):
    """The parameters after each batch.

    Optax's Muon has Nesterov's momentum, for the parameters that get Adam too.
    """
    params = jax.tree.map(np.asarray, params)
    inverses = {layer: inverse() for layer in ("a", "c")}
    first = jax.tree.map(np.zeros_like, params)
    second, visited = first, []

    def direction(chosen, m, v, g, t):
        decay = BETA if chosen else 0.9
        m_hat = decay * m / (1 - decay ** (t + 1)) + (1 - decay) * g / (1 - decay**t)
        if not chosen:
            return ADAM_RATE * m_hat / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        d, o = g.shape
        return RATE * np.sqrt(max(1, o / d)) * orthogonalized(m_hat)

    for t, batch in enumerate(batches, 1):
        grads, rows = gradient(params, *batch)
        for layer in ("a", "c"):
            if mask[layer]["w"]:
                grads[layer]["w"] = inverses[layer](rows[layer][:, :-1]) @ grads[layer]["w"]

        def averaged(chosen, m, g):
            decay = BETA if chosen else 0.9
            return decay * m + (1 - decay) * g

        first = jax.tree.map(averaged, mask, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        updates = jax.tree.map(
            lambda *leaves, t=t: direction(*leaves, t), mask, first, second, grads
        )
        params = jax.tree.map(np.subtract, params, updates)
        visited.append(params)
    return visited


@pytest.mark.parametrize("layers", ["a", "ac"], ids=["one weight", "both weights"])
@pytest.mark.parametrize("ours, theirs", [(exact, Exact), (newton, Newton)])
def test_muon_after_the_solve(ours, theirs, layers):
    """Muon's weights get Newton-Schulz of the solved gradients' momentum; all others Adam."""
    mask = hidden(layers)
    params, batches = problem(SIZES)
    first = optax.masked(ours(cqjax.plan(loss_fn)(params, *batches[0])), mask)
    got, _ = train(optax.chain(first, muon(mask)), params, batches)
    for visited, expected in zip(got, by_hand(theirs, mask, params, batches), strict=True):
        assert_close(visited, expected, rtol=1e-8)


def test_few_rows():
    """The exact solve in its dual form."""
    mask = hidden("a")
    params, batches = problem((3, 4))
    got, _ = train(optax.chain(optax.masked(exact(None), mask), muon(mask)), params, batches)
    for visited, expected in zip(got, by_hand(Exact, mask, params, batches), strict=True):
        assert_close(visited, expected, rtol=1e-8)


def test_the_others_get_what_muon_gives_them():
    """Bit for bit what Optax's Muon makes of the plain gradient, with its Adam."""
    mask = hidden("a")
    params, (batch, *_) = problem(SIZES)
    (got,), _ = train(optax.chain(optax.masked(exact(None), mask), muon(mask)), params, [batch])
    (plain,), _ = train(optax.chain(optax.masked(exact(None), False), muon(mask)), params, [batch])
    for path in (("a", "b"), ("c", "w"), ("c", "b")):
        np.testing.assert_array_equal(got[path[0]][path[1]], plain[path[0]][path[1]])
    np.testing.assert_array_equal(got["gain"], plain["gain"])
    assert np.abs(got["a"]["w"] - plain["a"]["w"]).max() > 1e-3


def test_captures_of_the_same_weights():
    """`only=` in the place of the mask."""
    mask = hidden("a")
    params, batches = problem(SIZES)
    masked, _ = train(optax.chain(optax.masked(exact(None), mask), muon(mask)), params, batches)
    chosen, _ = train(optax.chain(exact(None), muon(mask)), params, batches, only="a/w")
    assert_close(chosen[-1], masked[-1])
