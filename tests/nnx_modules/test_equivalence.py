"""Losses of NNX modules against the same losses of Linen modules and plain functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo_nnx import CASES, Y

import cqjax

SOLVERS = {"primal": {"solver": "primal"}, "dual": {"solver": "dual"}}
MATCHED = {"matched": {"signal": "matched"}}
OPTIONS = {name: SOLVERS for name in CASES}
OPTIONS |= {name: SOLVERS | MATCHED for name in ("conv", "scanned", "bridged")}
TX = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)


def loss_fn(model, x, y):
    return jnp.mean(jnp.sum((model(x) - y) ** 2, -1))


def joined(tree):
    """{path: array}, of keys joined by "/"."""
    leaves = jax.tree.leaves_with_path(nnx.as_pure(tree))
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def nested(params):
    """A tree of dictionaries, of pure state; a key may hold a "/" where Linen's name does."""
    tree = nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params
    if "other" in tree:
        tree = {"one": tree["one"], "other/0": tree["other"][0]}
    return tree


@functools.cache
def evaluated(name):
    """{option: (loss, grads, updates)} of the NNX module and of its likeness, each jitted."""
    case = CASES[name]

    def results(differentiate, model, *args):
        found = {}
        for option, kwargs in OPTIONS[name].items():
            loss, grads, captures = differentiate(kwargs)(model, *args)
            grads = nnx.as_pure(grads)
            updates, state = TX.update(grads, TX.init(grads), captures=captures)
            found[option] = loss, grads, updates, jnp.sum(state.fallbacks)
        return found

    @nnx.jit
    def of_module(model, x):
        def differentiate(kwargs):
            return cqjax.nnx.value_and_grad(loss_fn, **kwargs)

        return results(differentiate, model, x, Y)

    @jax.jit
    def of_function(params, rest, x):
        def loss(params, x, y):
            return loss_fn(lambda x: case.apply(params, rest, x), x, y)

        return results(lambda kwargs: cqjax.value_and_grad(loss, **kwargs), params, x, Y)

    _, params, rest = nnx.split(case.model(), nnx.Param, ...)
    pure = nested(nnx.as_pure(params)), nnx.to_pure_dict(nnx.as_pure(rest))
    return of_module(case.model(), case.x), of_function(*pure, case.x)


@pytest.mark.parametrize(("name", "option"), [(n, o) for n in CASES for o in OPTIONS[n]])
def test_the_same_as_elsewhere(name, option):
    ours, theirs = (results[option] for results in evaluated(name))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for got, expected in zip(map(joined, ours[1:3]), map(joined, theirs[1:3]), strict=True):
        assert got.keys() == expected.keys()
        for path, value in got.items():
            scale = 1e-3 + np.abs(expected[path]).max()
            np.testing.assert_allclose(value, expected[path], atol=1e-3 * scale, err_msg=path)
    assert ours[3] == 0


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_state_are_those_of_nnx(name):
    case = CASES[name]
    ours, theirs = case.model(), case.model()
    loss, grads, _ = nnx.jit(cqjax.nnx.value_and_grad(loss_fn))(ours, case.x, Y)
    expected_loss, expected = nnx.jit(nnx.value_and_grad(loss_fn))(theirs, case.x, Y)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for got, wanted in ((grads, expected), (nnx.state(ours), nnx.state(theirs))):
        got, wanted = joined(got), joined(wanted)
        assert got.keys() == wanted.keys()
        for path, value in got.items():
            if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(value, wanted[path], 1e-5, 1e-6, err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_plans_name_paths_and_layers(name):
    case = CASES[name]
    plan = cqjax.nnx.plan(loss_fn)(case.model(), case.x, Y)
    described = {p.path: p for p in plan.parameters}
    assert set(described) == set(joined(nnx.state(case.model(), nnx.Param)))
    for path, layer in case.layers.items():
        assert described[path].layer == layer.__name__, path
    for path, parameter in described.items():
        if path.endswith(("kernel", "weights/0", "weights/1", "embedding")):
            assert parameter.status == "covered", parameter
    some = {layer for path, layer in case.layers.items() if described[path].status == "covered"}
    for layer in some:
        selected = cqjax.nnx.plan(loss_fn, only=layer)(case.model(), case.x, Y)
        covered = {p.path for p in selected.parameters if p.status == "covered"}
        assert covered
        assert covered <= {path for path, p in described.items() if p.layer == layer.__name__}
