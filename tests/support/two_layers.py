"""A network of two layers: its loss for JAX, and its gradient and updates in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from across_batches import quickly

import cqjax

DAMPING = 0.3
LAYERS = ("a", "c")


def loss_fn(params, x, y):
    """Mean over examples of half the squared error; `gain` is no weight of a product."""
    hidden = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) * params["gain"]
    z = hidden @ params["c"]["w"] + params["c"]["b"]
    return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))


def problem(sizes=(6, 6, 6), seed=0):
    """(params, batches of these sizes)."""
    rng = np.random.default_rng(seed)

    def layer(d, o):
        return {"w": rng.normal(size=(d, o)), "b": rng.normal(size=o)}

    params = {"a": layer(5, 4), "c": layer(4, 2), "gain": rng.normal(size=4)}
    batches = [(rng.normal(size=(n, 5)), rng.normal(size=(n, 2))) for n in sizes]
    return jax.tree.map(jnp.asarray, (params, batches))


def gradient(params, x, y):
    """The gradient, and each layer's rows [X, 1]."""
    p, x, y = jax.tree.map(np.asarray, (params, x, y))
    t = np.tanh(x @ p["a"]["w"] + p["a"]["b"])
    hidden = t * p["gain"]
    dz = (hidden @ p["c"]["w"] + p["c"]["b"] - y) / len(x)
    back = dz @ p["c"]["w"].T
    da = back * p["gain"] * (1 - t**2)
    grads = {
        "a": {"w": x.T @ da, "b": da.sum(0)},
        "c": {"w": hidden.T @ dz, "b": dz.sum(0)},
        "gain": (back * t).sum(0),
    }
    ones = np.ones((len(x), 1))
    return grads, {"a": np.concatenate([x, ones], 1), "c": np.concatenate([hidden, ones], 1)}


def precondition(updates, moments, n, damping=DAMPING):
    """N (XᵀX + λI)⁻¹ H of the layers that have XᵀX among the moments."""
    new = jax.tree.map(np.asarray, updates)
    for layer, xx in moments.items():
        h = np.concatenate([new[layer]["w"], new[layer]["b"][None]])
        u = n * np.linalg.solve(xx + damping * np.eye(len(xx)), h)
        new[layer] = {"w": u[:-1], "b": u[-1]}
    return new


def direction(params, batch, damping=DAMPING, change=lambda grads: grads):
    """U of a batch; `change` is what happens to the gradient before."""
    grads, rows = gradient(params, *batch)
    moments = {layer: rows[layer].T @ rows[layer] for layer in LAYERS}
    return precondition(change(grads), moments, len(batch[0]), damping)


def by_hand(rule, params, batches, damping=lambda t: DAMPING):
    """The parameters after each batch: NumPy's U, then a rule of Optax's."""
    state, visited = rule.init(params), []
    for t, batch in enumerate(batches):
        updates, state = rule.update(direction(params, batch, damping(jnp.int32(t))), state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params)
    return visited


def stepper(tx, **options):
    """(params, state, x, y) -> (params, state), jitted; `value_fn` and its like are passed too."""
    differentiate = cqjax.value_and_grad(loss_fn, **options)

    def step(params, state, x, y):
        value, grads, captures = differentiate(params, x, y)

        def value_fn(params, captures=None):  # Optax's searches refuse what it does not take
            return loss_fn(params, x, y)

        extra = {"value": value, "grad": grads, "value_fn": value_fn}
        updates, state = tx.update(grads, state, params, captures=captures, **extra)
        return optax.apply_updates(params, updates), state

    return quickly(step)


def train(tx, params, batches, **options):
    """The parameters after each batch, and the last state."""
    step, state, visited = stepper(tx, **options), tx.init(params), []
    for batch in batches:
        params, state = step(params, state, *batch)
        visited.append(params)
    return visited, state


def assert_close(got, want, rtol=1e-9):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
