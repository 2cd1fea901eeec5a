"""The Gram matrix of a convolution's patches against the patches themselves, taken in NumPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from cqjax.linalg import conv_gram, gram, windows
from cqjax.linalg.windows import Window
from cqjax.program import jaxprs
from cqjax.program.matrix_form import matrix_form


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def window(shape, strides=1, padding=0, lhs_dilation=1, rhs_dilation=1):
    """A window; a number stands for itself along every axis, in the padding at both ends too."""

    def each(value):
        return (value,) * len(shape) if isinstance(value, int) else tuple(value)

    ends = tuple((p, p) if isinstance(p, int) else p for p in each(padding))
    return Window(shape, each(strides), ends, each(lhs_dilation), each(rhs_dilation))


def im2col(x, window, groups):
    """X of the definition: one entry of the input, or a zero, at a time."""
    batch, *spatial, channels = x.shape
    extents = [(s - 1) * i + 1 for s, i in zip(spatial, window.lhs_dilation, strict=True)]
    positions = [
        range(0, extent + lo + hi - (k - 1) * r, s)
        for extent, (lo, hi), k, r, s in zip(
            extents, window.padding, window.shape, window.rhs_dilation, window.strides, strict=True
        )
    ]
    rows = []
    for example, p in itertools.product(range(batch), itertools.product(*positions)):
        row = np.zeros((*window.shape, channels))
        for u in itertools.product(*map(range, window.shape)):
            at = [
                i + j * r - lo
                for i, j, r, (lo, _) in zip(p, u, window.rhs_dilation, window.padding, strict=True)
            ]
            if all(
                0 <= a < extent and a % step == 0
                for a, extent, step in zip(at, extents, window.lhs_dilation, strict=True)
            ):
                entry = (a // step for a, step in zip(at, window.lhs_dilation, strict=True))
                row[u] = x[(example, *entry)]
        rows.append(np.split(row, groups, -1))
    features = math.prod(window.shape) * channels // groups
    return np.reshape(rows, (len(rows), groups, features)).swapaxes(0, 1)


def check(shape, window, groups=1, seed=0):
    """X, XᵀX and [X, h]ᵀ[X, h], compiled, against NumPy."""
    x = np.random.default_rng(seed).normal(size=shape)
    rows = im2col(x, window, groups)
    got = jax.jit(
        lambda x: (
            windows.patches(x, window, groups),
            conv_gram.correlation(x, window, groups),
            conv_gram.inner(x, window, groups, 0.5),
        )
    )(x)
    np.testing.assert_array_equal(got[0], rows)
    full = np.concatenate([rows, np.full((*rows.shape[:2], 1), 0.5)], -1)
    for product, factor in zip(got[1:], (rows, full), strict=True):
        want = factor.swapaxes(1, 2) @ factor
        np.testing.assert_allclose(product, want, rtol=1e-12, atol=1e-12)


CASES = {
    "SAME": ((2, 5, 6, 2), window((3, 3), padding=1)),
    "VALID": ((2, 5, 6, 2), window((3, 3))),
    "one-sided": ((2, 6, 5, 2), window((2, 3), padding=[(0, 1), (2, 0)])),
    "cropped": ((2, 7, 6, 1), window((3, 2), padding=[(-1, 2), (0, -2)])),
    "wider than the input": ((2, 2, 3, 2), window((5, 4), padding=3)),
    "one entry": ((1, 1, 1, 2), window((3, 3), padding=1)),
    "seen from afar": ((2, 2, 2, 1), window((2, 3), padding=5)),
    "zeros alone": ((2, 2, 2, 1), window((2, 2), padding=[(-3, 7), (1, 1)])),
    "no position": ((2, 2, 2, 1), window((3, 3))),
    "pointwise": ((2, 3, 4, 3), window((1, 1))),
    "strides": ((2, 9, 10, 1), window((5, 3), (2, 3), [(2, 1), (0, 4)])),
    "stride beyond the window": ((2, 9, 7, 1), window((2, 1), (3, 2))),
    "dilated": ((2, 8, 9, 1), window((3, 2), 1, [(2, 2), (3, 0)], rhs_dilation=(2, 3))),
    "dilated, strides": ((1, 16, 17, 1), window((3, 3), (4, 3), [(3, 4), (1, 9)], 1, (6, 2))),
    "transposed": ((2, 4, 3, 1), window((3, 4), 1, [(2, 1), (2, 2)], 2)),
    "all at once": ((1, 6, 5, 1), window((3, 2), (2, 3), [(-1, 4), (3, 3)], (2, 3), (3, 2))),
    "groups": ((2, 4, 5, 6), window((3, 2), padding=1), 3),
    "depthwise": ((2, 5, 4, 3), window((3, 3), (1, 2), 1), 3),
    "line": ((3, 11, 2), window((4,), padding=[(3, 0)])),
    "line, strides": ((2, 11, 2), window((5,), 2, [(1, 3)], rhs_dilation=3)),
    "space": ((2, 3, 4, 3, 2), window((3, 2, 3), padding=[(1, 1), (0, 0), (0, 2)])),
    "space, strides": ((1, 5, 3, 4, 1), window((3, 2, 2), (2, 1, 1), 1, 1, (1, 2, 1))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gram(case):
    check(*case)


@st.composite
def problems(draw):
    """An input's shape, a window over it, and groups."""
    ndim = draw(st.integers(1, 2))

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * ndim))

    spatial, groups = each(1, 6), draw(st.integers(1, 2))
    padding = draw(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * ndim))
    shape = (draw(st.integers(1, 2)), *spatial, groups * draw(st.integers(1, 2)))
    return shape, Window(each(1, 4), each(1, 3), padding, each(1, 2), each(1, 4)), groups


@given(case=problems(), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_window(case, seed):
    check(*case, seed)


@pytest.mark.parametrize(
    "numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHNW", "IHOW", "HWNC")]
)
def test_patches_are_the_rows_of_the_matrix_form(numbers):
    """The order of the columns is that in which a kernel is laid out as W."""
    sizes = dict(N=2, H=5, W=6, C=4), dict(H=3, W=2, I=2, O=6)
    x, kernel = (
        np.random.default_rng(0).normal(size=[sizes[i][axis] for axis in numbers[i]])
        for i in range(2)
    )
    over = window((3, 2), (2, 1), [(1, 0), (2, 1)], 1, (1, 2))
    jaxpr = jax.make_jaxpr(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x,
            kernel,
            over.strides,
            over.padding,
            over.lhs_dilation,
            over.rhs_dilation,
            numbers,
            feature_group_count=2,
        )
    )(x, kernel)
    form = matrix_form(jaxprs.equation(jaxpr.eqns[0]), 1)
    inputs = jnp.asarray(x).transpose([numbers[0].index(axis) for axis in "NHWC"])
    np.testing.assert_array_equal(windows.patches(inputs, over, 2), form.rows(jnp.asarray(x)))


SAME = window((3, 3), padding=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_accumulates_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(1, 1, (63, 9, 7, 4)), dtype)
    rows = im2col(np.asarray(x, np.float64), SAME, 1)
    full = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], -1)
    got = jax.jit(lambda x: conv_gram.inner(x, SAME, 1, jnp.ones((), dtype)))(x)
    assert got.dtype == jnp.float32
    want = full.swapaxes(1, 2) @ full
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_sums_over_many_positions_are_accurate():
    """In float32, where one running sum over 131,072 positions has an error of 6e-6."""
    x = np.random.default_rng(0).uniform(size=(128, 32, 32, 2)).astype(np.float32)
    window = Window((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    rows = np.asarray(windows.patches(jnp.asarray(x), window), np.float64)[0]
    got = conv_gram.correlation(jnp.asarray(x), window)[0]
    np.testing.assert_allclose(got, rows.T @ rows, rtol=0, atol=1e-6 * (rows**2).sum(0).max())


def test_transformations():
    """vmap, scan and derivatives give what they give for the patches."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 5, 4)))
    over = window((3, 2), (1, 2), [(1, 1), (0, 1)])

    def by_patches(x):
        return gram.inner(windows.patches(x, over, 2))

    def by_correlation(x):
        return conv_gram.correlation(x, over, 2)

    def scanned(function):
        return lambda x: jax.lax.scan(lambda i, x: (i + 1, function(x)), 0, x)[1]

    def derivative(function):
        return jax.grad(lambda x: jnp.sin(jax.vmap(function)(x)).sum())

    for transformation in (jax.vmap, scanned, derivative):
        got, want = (jax.jit(transformation(f))(x) for f in (by_correlation, by_patches))
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for parameter in eqn.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if isinstance(inner, core.Jaxpr):
                yield from equations(inner)


def traced(function, shape):
    return list(equations(jax.make_jaxpr(function)(jnp.zeros(shape)).jaxpr))


def largest(function, shape):
    """The number of entries of the largest array in a program."""
    return max(v.aval.size for eqn in traced(function, shape) for v in eqn.outvars)


@pytest.mark.parametrize(
    "over",
    [window((5, 5), padding=2), window((5, 5), padding=0), window((6, 6), 2, 2)],
    ids=["SAME", "VALID", "strides"],
)
def test_needs_no_memory_for_patches(over):
    shape = (16, 24, 24, 4)
    size = math.prod(shape)
    assert largest(lambda x: conv_gram.inner(x, over, 1, 1.0), shape) < 1.4 * size
    assert largest(lambda x: windows.patches(x, over), shape) > 8 * size


CHOICES = {
    "3 x 3, 32 x 32 x 16": ((128, 32, 32, 16), SAME, True),
    "3 x 3, 16 x 16 x 32": ((128, 16, 16, 32), SAME, True),
    "3 x 3, 8 x 8 x 64": ((128, 8, 8, 64), SAME, True),
    "5 x 5 of few channels": ((128, 28, 28, 1), window((5, 5)), True),
    "the first of a ResNet": ((16, 112, 112, 3), window((7, 7), 2, 3), True),
    "pointwise": ((128, 16, 16, 32), window((1, 1)), False),
    "strides of 2 and a window of 3": ((128, 16, 16, 32), window((3, 3), 2, (0, 1)), False),
    "patches that do not overlap": ((128, 16, 16, 32), window((2, 2), 2), False),
    "window as large as the input": ((128, 6, 6, 32), window((6, 6)), False),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_the_cheaper_way_is_taken(choice):
    *problem, correlates = choice
    costs = conv_gram.correlation_cost(*problem), conv_gram.patches_cost(*problem)
    assert (costs[0] < costs[1]) == correlates
    shape, over = problem
    names = {eqn.primitive.name for eqn in traced(lambda x: conv_gram.inner(x, over), shape)}
    assert ("conv_general_dilated" in names) == correlates


@pytest.mark.parametrize("case", ["SAME", "line", "space", "strides", "groups"])
def test_convolutions_are_in_the_layout_that_xla_computes_in(case):
    """In another, or along a third axis, they take a hundred times as long on the CPU in a loop."""
    shape, *over = CASES[case]
    program = traced(lambda x: conv_gram.correlation(x, *over), shape)
    found = [eqn.params for eqn in program if eqn.primitive.name == "conv_general_dilated"]
    assert found
    for params in found:
        numbers, last = params["dimension_numbers"], len(params["window_strides"]) + 1
        spatial = tuple(range(1, last))
        assert last <= 3 and params["feature_group_count"] == 1
        assert numbers.lhs_spec == numbers.out_spec == (0, last, *spatial)
        assert numbers.rhs_spec == (last, last - 1, *range(last - 1))
