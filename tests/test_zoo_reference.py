"""The zoo's NumPy references agree with JAX, and its finite differences with calculus."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from zoo_backward import BACKWARD

NAMES = [case.name for case in zoo.CASES]
FLOAT64_TOLERANCE = 1e-6


def assert_close(actual, expected, tolerance, what):
    assert np.shape(actual) == np.shape(expected), what
    scale = max(np.max(np.abs(expected), initial=0.0), 1e-3)
    error = np.max(np.abs(np.asarray(actual) - expected), initial=0.0) / scale
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


@functools.cache
def solved(name):
    """(params_np, args_np, loss, gradients by path, captures) in float64."""
    case = zoo.by_name(name)
    with jax.enable_x64(True):
        loss_fn, params, args = zoo.made(name, jnp.float64)
        value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=case.has_aux))
        loss, grads = value_and_grad(params, *args)
        loss = loss[0] if case.has_aux else loss
        params_np, args_np = zoo.numpy_inputs(case, params, args)
        loss, grads = float(loss), zoo.numpy_tree(grads)
    captures = zoo.reference_captures(case, params_np, args_np)
    return params_np, args_np, loss, zoo.flatten(grads), captures


def tolerance(case):
    return case.rtol if case.low_precision else FLOAT64_TOLERANCE


@pytest.mark.parametrize("name", BACKWARD)
def test_finite_differences_equal_a_backward_pass_by_hand(name):
    params, args, _, _, captures = solved(name)
    by_hand = BACKWARD[name](params, args)
    assert by_hand.keys() == captures.keys()
    for site, [(_, dz, _)] in captures.items():
        assert_close(dz, by_hand[site], 1e-8, site)


def test_cond_cases_take_different_branches():
    yes, no = (solved(name)[-1].keys() for name in ("cond", "cond_other_branch"))
    assert yes ^ no == {"params/yes/kernel", "params/no/kernel"}


def test_names_are_unique():
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_classified_once(name):
    case = zoo.by_name(name)
    _, params, _ = zoo.made(name)
    listed = [*case.covered, *case.biases, *case.partly, *case.uncovered]
    assert sorted(listed) == sorted(zoo.flatten(params))


@pytest.mark.parametrize("name", NAMES)
def test_reference_equals_the_loss(name):
    case = zoo.by_name(name)
    params, args, loss, _, captures = solved(name)
    reference = case.reference(params, args, lambda site, x, w: x @ w)
    assert reference == pytest.approx(loss, rel=case.rtol if case.low_precision else 1e-10)
    sites = {zoo.path_of(site) for site in captures}
    assert sites <= case.covered | case.partly.keys()
    assert sum(dz.size for entries in captures.values() for _, dz, _ in entries) <= 400


@pytest.mark.parametrize("name", NAMES)
def test_float32_loss(name):
    case = zoo.by_name(name)
    loss_fn, params, args = zoo.made(name)
    loss = jax.jit(loss_fn)(params, *args)
    loss = loss[0] if case.has_aux else loss
    reference = case.reference(*zoo.numpy_inputs(case, params, args), lambda site, x, w: x @ w)
    assert float(loss) == pytest.approx(reference, rel=case.rtol)


@pytest.mark.parametrize("name", NAMES)
def test_captures_reassemble_into_kernel_gradients(name):
    case = zoo.by_name(name)
    params, _, _, grads, captures = solved(name)
    weights = zoo.flatten(params)
    gradients = zoo.site_gradients(case, params, captures)
    for path in case.covered:
        expected = grads[path]
        actual = gradients.get(path, np.zeros_like(expected))
        if path in case.direct:
            actual = actual + case.direct[path](weights[path])
        assert_close(actual, expected, tolerance(case), path)


@pytest.mark.parametrize("name", NAMES)
def test_bias_gradients_are_sums_of_output_gradients(name):
    case = zoo.by_name(name)
    _, _, _, grads, captures = solved(name)
    for path in case.biases:
        parent, leaf = path.rsplit("/", 1)
        site = f"{parent}/{ {'bias': 'kernel', 'b': 'w'}[leaf] }"
        sums = [dz.sum(axis=1).reshape(grads[path].shape) for _, dz, _ in captures.get(site, [])]
        assert_close(sum(sums, np.zeros_like(grads[path])), grads[path], tolerance(case), path)
