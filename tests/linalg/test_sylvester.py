"""Sylvester equations against dense solutions of their Kronecker form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqjax.linalg import ridge, sylvester
from cqjax.linalg.sylvester import Equation

SIZES = {"eigenvectors": (12, 10), "few outputs": (12, 3), "few features": (2, 11), "one": (1, 1)}


def semidefinite(rng, batch, size, rows):
    x = rng.normal(size=(batch, rows, size))
    return x.swapaxes(1, 2) @ x


def dense(left, right, damping, h):
    """vec(A U + U B + λU) = (A ⊗ I + I ⊗ B + λI) vec(U), with vec by rows."""
    left = np.diag(left) if left.ndim == 1 else left
    right = np.diag(right) if right.ndim == 1 else right
    d, o = h.shape
    matrix = np.kron(left, np.eye(o)) + np.kron(np.eye(d), right) + damping * np.eye(d * o)
    return np.linalg.solve(matrix, h.ravel()).reshape(d, o)


def equation(rng, size, batch=3, diagonal=False):
    d, o = size
    left = rng.uniform(0, 5, (batch, d)) if diagonal else semidefinite(rng, batch, d, d // 2 + 1)
    right = semidefinite(rng, batch, o, o // 2 + 1)
    arrays = left, right, rng.uniform(0.1, 1, batch), rng.normal(size=(batch, d, o))
    return Equation(*map(jnp.asarray, arrays))


@pytest.mark.parametrize("diagonal", [False, True])
def test_all_sizes_together(float64, diagonal):
    rng = np.random.default_rng(0)
    equations = [equation(rng, size, diagonal=diagonal) for size in SIZES.values()]
    solutions = jax.jit(sylvester.solve)(equations)
    for eq, found in zip(equations, solutions, strict=True):
        expected = np.stack([dense(*each) for each in zip(*map(np.asarray, eq), strict=True)])
        np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-11 * abs(expected).max())
        assert not found.repaired.any() and found.known.all()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_float32_is_as_exact_as_its_condition_allows(size):
    eq = equation(np.random.default_rng(1), size)
    eq = Equation(*(part.astype(jnp.float32) for part in eq))
    (found,) = sylvester.solve([eq])
    arrays = (np.asarray(part, np.float64) for part in eq)
    expected = np.stack([dense(*each) for each in zip(*arrays, strict=True)])
    assert found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.value, expected, atol=3e-5 * abs(expected).max())


@pytest.mark.parametrize("size", [(12, 10), (12, 3)])
def test_a_singular_equation_is_repaired_and_counted(float64, size):
    eq = equation(np.random.default_rng(2), size)._replace(damping=jnp.array([0.0, 0.5, 0.0]))
    (found,) = sylvester.solve([eq])
    assert found.repaired.tolist() == [True, False, True]
    arrays = [np.asarray(part)[1] for part in eq]
    np.testing.assert_allclose(found.value[1], dense(*arrays), rtol=1e-9)
    if size == (12, 10):  # λ is raised for the whole equation
        raised = [np.asarray(part)[0] for part in eq]
        mean = np.trace(raised[0]) / 12 + np.trace(raised[1]) / 10
        expected = dense(*raised[:2], ridge.REPAIR_DAMPING * mean, raised[3])
        np.testing.assert_allclose(found.value[0], expected, rtol=1e-9)
    assert jnp.isfinite(found.value).all()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_known(size, bad):
    eq = equation(np.random.default_rng(3), size)
    (clean,) = sylvester.solve([eq])
    (found,) = sylvester.solve([eq._replace(right=eq.right.at[1, 0, 0].set(bad))])
    assert found.known.tolist() == [True, False, True]
    np.testing.assert_allclose(found.value[::2], clean.value[::2], rtol=1e-4, atol=1e-5)
