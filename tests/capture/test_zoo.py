"""Every model of the zoo: gradients, captures and updates against NumPy in float64."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import cqjax

DAMPING = 1e-2
SIZE = 7
NAMES = [case.name for case in zoo.CASES]
EXACT = [case.name for case in zoo.CASES if not case.low_precision]
# One table is read by row and contracted by column: judged in transforms/test_both_sides.
BOTH_WAYS = {"embed_tied": {"params/embed/embedding"}}
JUDGED_BY_UPDATES = {"kernel_slices"}
# Their loss uses every weight outside its products too: judged in test_consequentialism.
INEXACT = {"l2_term", "partly_covered"}


@functools.cache
def reference(name):
    case = zoo.by_name(name)
    with jax.enable_x64(True):
        _, params, args = zoo.made(name, jnp.float64)
        params_np, args_np = zoo.numpy_inputs(case, params, args)
    return params_np, zoo.reference_captures(case, params_np, args_np)


class Evaluated(NamedTuple):
    grads: Any
    captures: cqjax.Captures
    updates: Any
    updates_of_changed: Any
    state: Any


@functools.cache
def evaluated(name):
    """(params, args, {solver: Evaluated}), in float64, compiled as one program."""
    case = zoo.by_name(name)
    tx = cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0)

    def evaluate(params, *args):
        results = {}
        for solver in ("dual", "primal"):
            kwargs = {"batch_size": SIZE, **case.kwargs, "solver": solver}
            fn = cqjax.value_and_grad(loss_fn, case.has_aux, **kwargs)
            _, grads, captures = fn(params, *args)
            updates, state = tx.update(grads, tx.init(params), captures=captures)
            changed = jax.tree.map(lambda g, p: 0.5 * g + 0.01 * p, grads, params)
            of_changed, _ = tx.update(changed, tx.init(params), captures=captures)
            results[solver] = Evaluated(grads, captures, updates, of_changed, state)
        return results

    with jax.enable_x64(True):
        loss_fn, params, args = zoo.made(name, jnp.float64)
        return params, args, quickly(evaluate)(params, *args)


def compiled(fn, *args):
    """`fn` for arguments like these, compiled in little time since it runs once or twice."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fn).lower(*args).compile(options)


def quickly(fn):
    """`fn` under jit, for one call."""
    return lambda *args: compiled(fn, *args)(*args)


def covered(case):
    return case.covered | case.biases | set(case.partly)


@pytest.mark.parametrize("name", NAMES)
def test_loss_aux_and_gradients_are_those_of_jax(name):
    case = zoo.by_name(name)
    loss_fn, params, args = zoo.made(name)
    fn = cqjax.value_and_grad(loss_fn, case.has_aux, **case.kwargs)
    result = quickly(fn)(params, *args)
    expected = quickly(jax.value_and_grad(loss_fn, has_aux=case.has_aux))(params, *args)
    assert jax.tree.structure(result[:2]) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(result[:2]), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_coverage(name):
    case = zoo.by_name(name)
    loss_fn, params, args = zoo.made(name)
    plan = cqjax.plan(loss_fn if not case.has_aux else (lambda *a: loss_fn(*a)[0]))(params, *args)
    status = {p.path: p.status for p in plan.parameters}
    partly = {path for path, s in status.items() if s == "partly covered"}
    assert {p for p, s in status.items() if s in ("covered", "partly covered")} == covered(case)
    assert partly == set(case.partly) | (set(case.direct) & case.covered)
    assert set(plan.uncovered()) == set(case.uncovered)
    assert all(plan.uncovered().values()), "a reason is missing"


@pytest.mark.parametrize("name", EXACT)
def test_gradients_rebuilt_from_rows(name):
    """XᵀZ̄ of the captured rows is the gradient, but for what the weights get directly."""
    case = zoo.by_name(name)
    params, _, results = evaluated(name)
    grads, captures, *_ = results["dual"]
    params = zoo.flatten(params)
    rebuilt = {path: np.zeros(p.shape) for path, p in params.items()}
    lookups = set()
    with jax.enable_x64(True):
        for capture in captures.blocks:
            if capture.block.solver in ("diagonal", "both sides"):
                lookups.update(capture.block.paths)
                continue
            rows = capture.rows()
            weight = np.einsum("bnd,bno->bdo", rows.x, rows.dz)
            bias = None if rows.h is None else np.einsum("bn,bno->bo", rows.h, rows.dz)
            scattered = capture.block.scatter(*jax.tree.map(jnp.asarray, (weight, bias)))
            for path, array in scattered.items():
                rebuilt[path] += np.asarray(array)
    for path, gradient in zoo.flatten(grads).items():
        if path in covered(case) - lookups - set(case.partly):
            direct = case.direct.get(path, np.zeros_like)(np.asarray(params[path]))
            np.testing.assert_allclose(rebuilt[path] + direct, gradient, atol=1e-9)


def pooled(entries):
    """Rows of all calls that share a weight: (B, n, d) and (B, n, o)."""
    return (np.concatenate([e[i] for e in entries], 1) for i in (0, 1))


def sibling(path, paths):
    """The bias that belongs to the weight at `path`: the one below the same keys."""
    owner = path.rsplit("/", 1)[0]
    found = [p for p in paths if p.rsplit("/", 1)[0] == owner]
    return found[0] if found else None


@pytest.mark.parametrize("name", EXACT)
def test_captured_statistics(name):
    """Second moments of X, X and dz, and dz, weighed by random weights, equal NumPy's."""
    case = zoo.by_name(name)
    params_np, expected = reference(name)
    params, args, results = evaluated(name)
    rng = np.random.default_rng(0)
    probe = jax.tree.map(lambda p: rng.normal(size=p.shape), params_np)
    weights = _weights(case, probe, args, params)
    dual, primal = results["dual"].captures, results["primal"].captures
    compared = 0
    for capture, second in zip(dual.blocks, primal.blocks, strict=True):
        block = capture.block
        unlike = block.solver in ("diagonal", "both sides")
        if unlike or len(block.view.paths) > 1 or len(dual[block.name]) > 1:
            continue  # lookups, joined and sliced weights are judged by their updates, below
        compared += 1
        rows = capture.rows()
        wanted = np.zeros(3)
        for site in (s for s in expected if zoo.path_of(s) in block.view.paths):
            x, dz = pooled(expected[site])
            z = x @ weights[site]
            wanted += ((z**2).sum(), (z * dz).sum(), (dz**2).sum())
        with jax.enable_x64(True):
            weight = np.asarray(block.weight_matrix(zoo.flatten(probe)))
            xx = np.asarray(second.second_moment())[:, : block.features, : block.features]
        z, dz = np.asarray(rows.x) @ weight, np.asarray(rows.dz)
        got = ((z**2).sum(), (z * dz).sum(), (dz**2).sum())
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-9)
        form = np.einsum("bdo,bde,beo->", weight, xx, weight)
        np.testing.assert_allclose(form, wanted[0], rtol=1e-5, atol=1e-9)
    assert compared or name in JUDGED_BY_UPDATES


def _weights(case, probe, args, params):
    """{site: w}, the weights that the NumPy model makes of the parameters `probe`."""
    with jax.enable_x64(True):
        _, args_np = zoo.numpy_inputs(case, params, args)
    seen = {}

    def linear(site, x, w):
        seen.setdefault(site, []).append(w)
        return x @ w

    case.reference(probe, args_np, linear)
    return {
        site: np.concatenate(ws[: case.stacked[site]]) if site in case.stacked else ws[0]
        for site, ws in seen.items()
    }


def expected_updates(case, params_np, captures_np, block, size):
    """N X̃ᵀ(X̃X̃ᵀ + λI)⁻¹Z̄ of a block, in NumPy, for each of its parameters."""
    shapes = {path: leaf.shape for path, leaf in zoo.flatten(params_np).items()}
    updates = {path: np.zeros(shapes[path]) for path in block.paths}
    biases = block.bias.view.paths if block.bias else ()
    for site, entries in captures_np.items():
        path = zoo.path_of(site)
        if path not in block.view.paths:
            continue
        x, dz = pooled(entries)
        bias = sibling(path, biases)
        if bias:
            x = np.concatenate([x, np.ones_like(x[..., :1])], -1)
        kernel = x @ x.transpose(0, 2, 1) + DAMPING * np.eye(x.shape[1])
        u = size * x.transpose(0, 2, 1) @ np.linalg.solve(kernel, dz)
        if bias:
            updates[bias] += u[:, -1].reshape(shapes[bias])
            u = u[:, :-1]
        updates[path] += case.to_kernel(site, u, shapes[path])
    return updates


@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("name", EXACT)
def test_updates(name, solver):
    """`scale_by_consequentialism` against NumPy; what is not covered keeps its gradient."""
    case = zoo.by_name(name)
    params_np, captures_np = reference(name)
    result = evaluated(name)[2][solver]
    updates, grads = zoo.flatten(result.updates), zoo.flatten(result.grads)
    assert result.state.fallbacks.sum() == 0
    for path in set(grads) - covered(case):
        np.testing.assert_array_equal(updates[path], grads[path])
    wanted = {}
    for block in (capture.block for capture in result.captures.blocks if capture.block.exact):
        size = int(result.captures.batch_size)
        for path, update in expected_updates(case, params_np, captures_np, block, size).items():
            wanted[path] = update  # of a weight in slices, the same whole for each of its blocks
    for path, update in wanted.items():
        np.testing.assert_allclose(updates[path], update, rtol=2e-5, atol=2e-6, err_msg=path)
    judged = covered(case) - BOTH_WAYS.get(name, set())
    assert (set(wanted) == judged) if name not in INEXACT else (not wanted)


@pytest.mark.parametrize("name", EXACT)
def test_primal_and_dual_agree_on_changed_updates(name):
    """Any update is preconditioned alike, whether or not it is still the gradient."""
    results = evaluated(name)[2]
    updates = [results[solver].updates_of_changed for solver in ("dual", "primal")]
    for a, b in zip(*map(jax.tree.leaves, updates), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
        assert np.abs(a).max() > 0


@pytest.mark.parametrize("name", EXACT)
def test_scan_over_steps_and_vmap_over_seeds(name):
    """Two steps of two networks in one program equal the same steps one by one."""
    case = zoo.by_name(name)
    tx = cqjax.csgd(0.05, damping=1.0, relative_damping=0.0, max_change=None)
    with jax.enable_x64(True):
        loss_fn, params, args = zoo.made(name, jnp.float64)
        fn = cqjax.value_and_grad(loss_fn, case.has_aux, **{"batch_size": SIZE, **case.kwargs})

        def step(params):
            _, grads, captures = fn(params, *args)
            updates, _ = tx.update(grads, tx.init(params), captures=captures)
            return optax.apply_updates(params, updates)

        def together(seeds):
            return jax.lax.scan(lambda c, _: (jax.vmap(step)(c), None), seeds, length=2)[0]

        other = jax.tree.map(lambda p: 0.9 * p, params)
        got = quickly(together)(jax.tree.map(lambda *p: jnp.stack(p), params, other))
        single = compiled(step, params)
        want = [single(single(p)) for p in (params, other)]
        for i, one in enumerate(want):
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-9)
