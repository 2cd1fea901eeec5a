"""Gram matrices and damped solves against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from cqjax.linalg import definite, gram, joined, ridge
from cqjax.linalg.products import einsum

inverses = jax.jit(ridge.inverses)
inverted = jax.jit(definite.inverse)


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


@pytest.mark.parametrize("subscripts", ["bnd,bmd->bnm", "bnd,bno->bdo", "bn,bno->bo", "bo,bo->b"])
def test_einsum(subscripts):
    rng, sizes = np.random.default_rng(0), dict(zip("bnmdo", (2, 3, 4, 5, 6), strict=True))
    axes = subscripts.split("->")[0].split(",")
    a, b = (rng.normal(size=[sizes[i] for i in each]).astype(np.float32) for each in axes)
    got = einsum(subscripts, jnp.asarray(a), jnp.asarray(b), precision="highest")
    np.testing.assert_allclose(got, np.einsum(subscripts, a, b), rtol=1e-5, atol=1e-5)


def system(seed, size, batch=1, rank=None, damping=0.1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, size, rank or 2 * size))
    matrix = x @ x.transpose(0, 2, 1)
    arrays = (matrix, np.full(batch, damping))
    return ridge.System(*(jnp.asarray(a, jnp.float32) for a in arrays), rank=size)


def exact(system, damping):
    matrix = np.asarray(system.matrix, np.float64)
    return np.linalg.inv(matrix + np.asarray(damping)[:, None, None] * np.eye(matrix.shape[-1]))


def assert_close(got, want, rtol=1e-4):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


def test_systems_of_all_shapes_are_inverted_in_place():
    shapes = [(4, 1), (3, 2), (4, 3), (1, 1)]
    systems = [system(i, size, batch) for i, (size, batch) in enumerate(shapes)]
    for s, inverse in zip(systems, inverses(systems), strict=True):
        assert_close(inverse.value, exact(s, s.damping))
        np.testing.assert_array_equal(inverse.damping, s.damping)
        assert not inverse.repaired.any() and not inverse.failed.any()


def test_about_equal_shapes_are_factorised_together():
    """Once each, the second attempt included: it is what takes long to compile."""
    systems = [system(i, 40) for i in range(3)] + [system(i, 39) for i in range(2)] + [system(9, 3)]
    jaxpr = jax.make_jaxpr(lambda s: [i.value for i in ridge.inverses(s)])(systems)
    factorised = [shape for name, shape in primitives(jaxpr) if name == "cholesky"]
    assert sorted(factorised) == [(1, 3, 3), (5, 40, 40)]
    for s, inverse in zip(systems, inverses(systems), strict=True):
        assert_close(inverse.value, exact(s, s.damping))


def test_what_fails_is_repaired_alone():
    """Of the matrices of one system, too: they are layers of their own."""
    good, singular = system(0, 4), system(1, 4, rank=1, damping=-1e-3)
    both = ridge.System(
        jnp.concatenate([good.matrix, singular.matrix]),
        jnp.concatenate([good.damping, singular.damping]),
        rank=4,
    )
    first, second, third = inverses([good, singular, both])
    assert_close(first.value, exact(good, good.damping))
    trace = np.trace(np.asarray(singular.matrix), axis1=1, axis2=2)
    raised = np.asarray(singular.damping) + ridge.REPAIR_DAMPING * trace / 4
    np.testing.assert_allclose(second.damping, raised, rtol=1e-6)
    assert_close(second.value, exact(singular, raised), 1e-3)
    assert not first.repaired and second.repaired and not second.failed
    for together, *alone in zip(third, first, second, strict=True):
        np.testing.assert_array_equal(together, np.concatenate(alone))


def test_what_is_of_no_use_is_repaired():
    s = system(0, 4)._replace(solvable=jnp.asarray(False), gain=3.0)
    (inverse,) = inverses([s])
    assert inverse.repaired and not inverse.failed
    assert_close(inverse.value, 3 * exact(s, inverse.damping))
    assert inverse.damping > s.damping


@pytest.mark.parametrize(("size", "rank"), [(6, 3), (40, 20)])
def test_what_is_singular_is_repaired_whether_or_not_it_was_factorised(size, rank):
    """Rounding makes the smallest pivots positive as often as not."""
    s = system(size, size, batch=50, rank=rank, damping=0.0)._replace(rank=rank)
    factorised = jnp.isfinite(inverted(s.matrix)).all((1, 2))
    (inverse,) = inverses([s])
    assert size == 40 or factorised.any()
    assert inverse.repaired.all() and not inverse.failed.any()
    assert_close(inverse.value, exact(s, inverse.damping), 1e-3)


def test_features_of_different_scales_are_no_failure():
    """Only what depends on the others is: Cholesky's factorisation does not mind scales."""
    s, scales = system(0, 4, damping=0.0), 10.0 ** np.array([-9, -3, 3, 9])
    (inverse,) = inverses([s._replace(matrix=s.matrix * scales * scales[:, None])])
    assert not inverse.repaired
    assert_close(np.asarray(inverse.value, np.float64) * scales * scales[:, None], exact(s, [0.0]))


def test_a_trace_may_overflow():
    """Where the mean eigenvalue does not."""
    s = system(0, 4, rank=2, damping=0.0)
    s = s._replace(matrix=s.matrix / s.matrix.max() * 3e38, rank=2)
    assert np.isinf(np.asarray(jnp.trace(s.matrix[0])))
    (inverse,) = inverses([s])
    assert inverse.repaired and not inverse.failed and np.isfinite(inverse.damping)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("size", [1, 3])
def test_a_system_that_is_not_finite_gives_zero(size, bad):
    hopeless = system(0, size)._replace(gain=7.0)
    hopeless = hopeless._replace(matrix=hopeless.matrix.at[0, 0, 0].set(bad))
    (inverse,) = inverses([hopeless])
    np.testing.assert_array_equal(inverse.value[0], np.zeros((size, size)))
    assert inverse.failed and inverse.repaired


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_right_hand_side_that_is_not_finite_is_noticed(bad):
    (inverse,) = inverses([system(0, 3, batch=2)])
    right = jnp.ones((2, 3, 2)).at[1, 2, 0].set(bad)
    solution = ridge.solve(inverse.value, right)
    np.testing.assert_array_equal(jnp.isfinite(solution.sum((1, 2))), [True, False])
    want = np.asarray(inverse.value) @ np.ones((2, 3, 2))
    assert_close(solution[0], want[0])
    assert_close(solution[1, :, 1], want[1, :, 1])
    assert not np.isfinite(solution[1, :, 0]).any()


@pytest.mark.parametrize("size", [1, 3, 24, 25, 129, 500])
def test_inverse(size):
    """By pivots, by blocks, and in halves; on other devices than CPUs, by Cholesky."""
    x = np.random.default_rng(size).normal(size=(2, size, 2 * size))
    matrix = x @ x.transpose(0, 2, 1)
    for function in (inverted, definite._by_cholesky):
        assert_close(function(jnp.asarray(matrix, jnp.float32)), np.linalg.inv(matrix))


@pytest.mark.parametrize("size", [32, 64, 320])
def test_solutions_of_rows_with_a_common_mean(size):
    """As exact as those of LAPACK's `potrs`, which is stable: full elimination lost 1,000 times."""
    rng = np.random.default_rng(size)
    x = np.float32(rng.uniform(size=(1, 784)) + 0.05 * rng.normal(size=(size, 784)))
    matrix = x @ x.T + np.float32(1e-3) * np.eye(size, dtype=np.float32)
    z = np.float32(rng.normal(size=(size, 10)))
    want = x.T @ np.linalg.solve(matrix.astype(float), z)

    def error(solution):
        return np.linalg.norm(x.T @ np.float64(solution) - want) / np.linalg.norm(want)

    lapack = scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix), z)
    assert error(np.asarray(inverted(matrix[None]))[0] @ z) < 4 * error(lapack)


@pytest.mark.parametrize("size", [3, 60, 500])
@pytest.mark.parametrize("pivot", [0.0, -1.0, np.nan])
def test_what_is_not_positive_definite_has_no_inverse(size, pivot):
    """Wherever the pivot is, and though no other row depends on it."""
    for at in (0, size // 2, size - 1):
        matrix = np.eye(size)
        matrix[at, at] = pivot
        for function in (inverted, definite._by_cholesky):
            got = function(jnp.asarray(matrix[None], jnp.float32))
            assert np.isnan(np.diagonal(got, axis1=1, axis2=2)).any()


def test_a_column_is_added():
    """[X, h][X, h]ᵀ of XXᵀ and h, beside a system of the same size that has none."""
    s, h = system(0, 4), np.arange(4.0)[None]
    with_column, without = inverses([s._replace(column=jnp.asarray(h, jnp.float32)), s])
    whole = s._replace(matrix=s.matrix + h[:, :, None] * h[:, None])
    assert_close(with_column.value, exact(whole, s.damping))
    assert_close(without.value, exact(s, s.damping))


def test_relative_damping():
    s = system(0, 4, damping=0.1)._replace(relative=0.5, rank=3)
    (inverse,) = inverses([s])
    mean = np.trace(np.asarray(s.matrix), axis1=1, axis2=2) / 3
    np.testing.assert_allclose(inverse.damping, 0.1 + 0.5 * mean, rtol=1e-6)
    assert_close(inverse.value, exact(s, inverse.damping))


def test_functions_of_many_arrays():
    """Each has its own result, whatever its shape is."""
    arrays = [jnp.arange(2.0), jnp.ones((3, 2)), jnp.arange(3.0)]
    found = joined.batched(lambda a, b: 2 * a + b, arrays, arrays)
    for array, three in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(three, 3 * array)
    assert joined.batched(jnp.sin, []) == []


def test_gain():
    s = system(0, 4)._replace(gain=3.0)
    (inverse,) = inverses([s])
    assert_close(inverse.value, 3 * exact(s, s.damping))


@pytest.mark.parametrize("size", [32, 500])
def test_what_is_called_on_which_platform(size):
    """A CPU calls no LAPACK, whose threads fight XLA's; a GPU has one factorisation, no loops."""
    function = jax.jit(lambda systems: ridge.inverses(systems)[0].value)
    traced = function.trace([system(0, size)])
    cpu, gpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))
    assert "custom_call" not in cpu
    assert gpu.count("potrf") == 1 and gpu.count("stablehlo.while") == 1  # that of the repairs


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
    assert ridge.inverses([]) == []
