"""float64 models: both solvers agree, and N is as precise as the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_layer import first_step, problem

import cqjax

pytestmark = pytest.mark.usefixtures("float64")

# Rates at which the bound shortens steps, and does not before Adam's.
ALIASES = {
    "cnesterov": lambda: cqjax.cnesterov(0.1),
    "cadam": lambda: cqjax.cadam(0.3),
    "csgd": lambda: cqjax.csgd(2.0, max_change=0.05),
}


def trained(alias, solver, rows, steps=5):
    """(parameters, how often updates were shortened) of two layers after some batches.

    Of up to 512 rows none is left out where lengths are measured. Of more, rows are sampled where
    they were captured, and XᵀX has all of them: the solvers' bounds then differ by design.
    """
    rng = np.random.default_rng(0)
    sizes = {"w": (6, 12), "b": (12,), "v": (12, 10), "c": (10,)}
    params = {key: jnp.asarray(rng.normal(size=s) / 3) for key, s in sizes.items()}
    tx = ALIASES[alias]()

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.mean(jnp.sum((hidden @ params["v"] + params["c"] - y) ** 2, -1))

    @jax.jit
    def step(params, state, x, y):
        _, grads, captures = cqjax.value_and_grad(loss, solver=solver)(params, x, y)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, *(rng.normal(size=(rows, k)) for k in (6, 10)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    clipped = [
        int(leaf.sum())
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if ".clipped" in jax.tree_util.keystr(path)
    ]
    return params, sum(clipped)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("alias", ALIASES)
def test_the_solvers_agree_with_the_bound_on(alias, rows):
    """With fewer rows than features, and with more."""
    (dual, shortened), (primal, too) = (trained(alias, s, rows) for s in ("dual", "primal"))
    assert shortened == too > 0
    for key, right in primal.items():
        np.testing.assert_allclose(dual[key], right, rtol=1e-10, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_computed_number_of_terms(solver):
    """N = Σ w of a weighted mean that is no whole number, in float64."""
    params, x, y = problem(5, 7, 2)
    weights = jnp.full(5, 0.7) + 0.1 * jnp.arange(5)

    def loss(params, x, y):
        errors = jnp.sum((x @ params["w"] - y) ** 2, -1)
        return 0.5 * jnp.sum(weights * errors) / jnp.sum(weights)

    tx = cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0)
    grads, _, updates, _ = first_step(tx, loss, params, x, y, solver=solver)
    a, total = np.asarray(x), float(weights.sum())
    g = a.T @ (np.asarray(weights)[:, None] * (a @ np.asarray(params["w"]) - np.asarray(y))) / total
    np.testing.assert_allclose(grads["w"], g, rtol=1e-10, atol=1e-12)
    want = total * np.linalg.solve(a.T @ a + 0.1 * np.eye(7), g)
    np.testing.assert_allclose(updates["w"], want, rtol=1e-10, atol=1e-12)
