"""Inputs with a mean far above their deviation: float32 updates against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_layer import squared_error

import cqjax


@pytest.mark.parametrize("n,d", [(128, 32), (32, 128)])
@pytest.mark.parametrize("absolute,relative", [(1e-3, 0.0), (0.0, 0.1)])
def test_the_update_is_the_defined_one_or_an_event(n, d, absolute, relative):
    """Relative damping bounds rounding. With a small λ it is an event, where it is large."""
    rng = np.random.default_rng(0)
    deviations, y = (np.float32(rng.normal(size=(n, k))) for k in (d, 3))
    params = {"w": jnp.zeros((d, 3)), "b": jnp.zeros(3)}
    tx = cqjax.scale_by_consequentialism(damping=absolute, relative_damping=relative)

    @jax.jit
    def update(x):
        _, grads, captures = cqjax.value_and_grad(squared_error)(params, x, y)
        updates, state = tx.update(grads, tx.init(params), params, captures=captures)
        return updates, state.fallbacks.sum()

    events = []
    for mean in (0, 30, 100, 300, 1000):
        x = np.float32(deviations + mean)
        updates, event = update(x)
        a = np.hstack([x.astype(np.float64), np.ones((n, 1))])
        left, values, right = np.linalg.svd(a, full_matrices=False)
        damping = absolute + relative * np.mean(values**2)
        want = -(right.T * (values / (values**2 + damping))) @ (left.T @ y)
        got = np.vstack([updates["w"], updates["b"][None]]).astype(np.float64)
        events.append(int(event))
        if not event:
            tolerance = 1e-3 if relative else 0.03
            error = np.linalg.norm(a @ (got - want)) / np.linalg.norm(a @ want)
            assert error < tolerance, (mean, error)
    assert events == ([0, 0, 0, 0, 0] if relative else [0, 0, 0, 1, 1])
