"""Gram matrices and damped solves against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqjax.linalg import gram, ridge, triangular


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gram(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 7)), dtype)
    h = jnp.asarray([[1, 1, 0, 1, 0]] * 2, dtype)
    full = np.concatenate([np.asarray(x, np.float64), np.asarray(h, np.float64)[..., None]], -1)
    for rows, coordinate in ((full[..., :-1], None), (full, h)):
        for got, want in (
            (gram.outer(x, coordinate), rows @ rows.transpose(0, 2, 1)),
            (gram.inner(x, coordinate), rows.transpose(0, 2, 1) @ rows),
        ):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def system(seed, size, outputs, batch=1, rank=None, damping=0.1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, size, rank or 2 * size))
    matrix = x @ x.transpose(0, 2, 1)
    right = rng.normal(size=(batch, size, outputs))
    arrays = (matrix, np.full(batch, damping), right)
    return ridge.System(*(jnp.asarray(a, jnp.float32) for a in arrays), rank=size)


def exact(system, damping):
    matrix = np.asarray(system.matrix, np.float64)
    eye = np.asarray(damping)[:, None, None] * np.eye(matrix.shape[-1])
    return np.linalg.solve(matrix + eye, np.asarray(system.right, np.float64))


def test_systems_of_all_shapes_are_solved_in_place():
    shapes = [(4, 1), (3, 2), (4, 3), (1, 1)]
    systems = [system(i, size, i + 1, batch) for i, (size, batch) in enumerate(shapes)]
    solutions, fallbacks = ridge.solve(systems)
    assert fallbacks == 0
    for s, solution in zip(systems, solutions, strict=True):
        np.testing.assert_allclose(solution.value, exact(s, s.damping), rtol=1e-4, atol=1e-5)
        assert not solution.failed


def test_equal_shapes_are_factorised_together():
    systems = [system(i, 4, 2) for i in range(5)] + [system(9, 3, 2)]
    text = jax.jit(lambda s: ridge.solve(s)[0][0].value).lower(systems).as_text()
    assert text.count("lapack_spotrf_ffi") + text.count("stablehlo.cholesky") <= 4


def test_a_failed_system_is_repaired_alone():
    good, singular = system(0, 4, 2), system(1, 4, 2, rank=1, damping=-1e-3)
    (first, second), fallbacks = ridge.solve([good, singular])
    np.testing.assert_allclose(first.value, exact(good, good.damping), rtol=1e-4, atol=1e-5)
    trace = np.trace(np.asarray(singular.matrix), axis1=1, axis2=2)
    raised = np.asarray(singular.damping) + ridge.REPAIR_DAMPING * trace / 4
    np.testing.assert_allclose(second.damping, raised, rtol=1e-6)
    np.testing.assert_allclose(second.value, exact(singular, raised), rtol=1e-3, atol=1e-4)
    assert fallbacks == 1 and not second.failed


def test_a_hopeless_system_gives_its_right_hand_side():
    hopeless = system(0, 3, 2)
    hopeless = hopeless._replace(
        matrix=hopeless.matrix.at[0, 0, 0].set(jnp.nan),
        right=hopeless.right.at[0, 1, 1].set(jnp.inf),
    )
    (solution,), fallbacks = jax.jit(ridge.solve)([hopeless])
    want = np.asarray(hopeless.right).copy()
    want[0, 1, 1] = 0
    np.testing.assert_array_equal(solution.value, want)
    assert solution.failed and fallbacks == 1


@pytest.mark.parametrize("size", [1, 3, 128, 129, 300])
def test_inverse_factor(size):
    """Blocks of 128, 256 and 512 rows, full and not."""
    x = np.random.default_rng(size).normal(size=(2, size, 2 * size))
    matrix = x @ x.transpose(0, 2, 1)
    upper = np.triu(np.full((size, size), np.nan), 1)
    inverse = triangular.inverse_factor(jnp.asarray(np.where(np.isnan(upper), upper, matrix)))
    want = np.linalg.inv(np.linalg.cholesky(matrix))
    np.testing.assert_allclose(inverse, want, rtol=1e-3, atol=1e-5 * np.abs(want).max())
    assert not np.triu(inverse, 1).any()


def test_inverse_factor_of_no_positive_matrix():
    matrix = np.eye(300)
    matrix[200, 200] = -1
    assert not np.isfinite(triangular.inverse_factor(jnp.asarray(matrix[None]))).all()


def test_gain():
    s = system(0, 4, 2)._replace(gain=3.0)
    (solution,), _ = ridge.solve([s])
    np.testing.assert_allclose(solution.value, 3 * exact(s, s.damping), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 50])
def test_triangular_inverse(size):
    rng = np.random.default_rng(size)
    factor = np.tril(rng.normal(size=(3, size, size))) + 3 * np.eye(size)
    inverse = triangular.inverse_lower(jnp.asarray(factor, jnp.float32))
    np.testing.assert_allclose(inverse, np.linalg.inv(factor), rtol=1e-4, atol=1e-4)
    assert not np.triu(inverse, 1).any()


@pytest.mark.parametrize("size", [32, 300])
def test_solves_use_no_lapack_threads(size):
    """Larger calls of LAPACK would run in threads of its own, which fight XLA's for the cores."""
    jaxpr = jax.make_jaxpr(lambda s: ridge.solve([s])[0][0].value)(system(0, size, 64))
    factorised = [shape for name, shape in primitives(jaxpr) if name == "cholesky"]
    assert factorised and max(shape[-1] for shape in factorised) <= triangular.BLOCK
    assert "triangular_solve" not in dict(primitives(jaxpr))


def primitives(jaxpr):
    """Every equation's primitive and its first operand's shape, in all bodies."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn.primitive.name, getattr(eqn.invars[0].aval, "shape", ()) if eqn.invars else ()
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from primitives(value)


def is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_no_systems():
    assert ridge.solve([])[0] == []
