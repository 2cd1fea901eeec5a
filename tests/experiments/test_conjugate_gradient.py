"""Conjugate gradients and Adam, against NumPy on the quadratic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run

from experiments.conjugate_gradient import network, rosenbrock, valley

BETAS = ("fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conjugate_gradient")
    return *run("conjugate_gradient", folder), folder


@pytest.fixture(scope="module")
def quadratic():
    """The matrix and the start that the curves are of."""
    with jax.enable_x64(True):
        key = jax.random.split(jax.random.key(1), (2, 2))[1, 0]
        f, x = valley(key)
        return np.array(jax.hessian(f)(x)), np.array(x)


def conjugate_gradients(matrix, x, steps):
    """The textbook's method: its values."""
    values, r = [], -matrix @ x
    p = r
    for _ in range(steps):
        values.append(0.5 * x @ matrix @ x)
        x = x + (r @ r) / (p @ matrix @ p) * p
        new = -matrix @ x
        r, p = new, new + (new @ new) / (r @ r) * p
    return np.array(values)


def test_the_valley(quadratic):
    matrix, _ = quadratic
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), np.geomspace(1, 100, 10), rtol=1e-9)


def test_all_four_are_conjugate_gradients_on_a_quadratic(ran, quadratic):
    values = conjugate_gradients(*quadratic, 10)
    methods = ran[0]["results"]["quadratic valley"]["methods"]
    for beta in BETAS:
        found = methods[beta]["first_setting"]
        assert found["setting"] == 1e-6
        np.testing.assert_allclose(found["curve"][1][:10], values / values[0], rtol=1e-5)
        assert found["steps"] == [10, 10]


def test_adam_is_numpys(ran, quadratic):
    (matrix, x), (m, v) = quadratic, (0.0, 0.0)
    found, values = ran[0]["results"]["quadratic valley"]["methods"]["Adam"], []
    for step in range(1, 301):
        values.append(0.5 * x @ matrix @ x)
        g = matrix @ x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - found["setting"] * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    evaluations, curve = np.array(found["curve"])
    expected = np.array(values)[evaluations.astype(int) - 1] / values[0]
    np.testing.assert_allclose(curve, expected, rtol=1e-6)
    there = np.flatnonzero(np.array(values) <= 1e-8 * values[0])
    assert found["evaluations"][0] == (there[0] + 1 if len(there) else None)


def test_each_method_has_the_best_of_six_settings(ran):
    for result in ran[0]["results"].values():
        for found in result["methods"].values():
            assert len(found["settings"]) == len(found["tuning_evaluations"]) == 6
            at = [n if n is not None else np.inf for n in found["tuning_evaluations"]]
            assert at[found["settings"].index(found["setting"])] == min(at)
            for steps, evaluations in zip(found["steps"], found["evaluations"], strict=True):
                assert (steps is None) == (evaluations is None)
                assert steps is None or steps < evaluations <= 300


def test_functions_have_their_minimum_where_they_should():
    key = jax.random.key(0)
    f, start = rosenbrock(key)
    assert f(jnp.ones(2)) == 0 < f(start)
    loss, params = network(key)
    assert [p.shape for p in params] == [(2, 8), (8,), (8,), ()]
    x = np.array(jax.random.uniform(jax.random.key(0), (100, 2), minval=-1.0))
    y = np.sin(3 * x[:, 0]) * x[:, 1]
    w1, b1, w2, b2 = map(np.float64, params)
    error = np.tanh(x @ w1 + b1) @ w2 + b2 - y
    assert float(loss(params)) == pytest.approx(np.mean(error**2) / 2, rel=1e-5)


def test_the_page_and_the_figure(ran):
    content, page, folder = ran
    check_page(content, page, claims=7)
    check_figure(folder / "progress.png", panels=2)
    assert [claim["holds"] for claim in content["claims"][:3]] == ["yes"] * 3


def test_bad_options(capsys):
    message = refused(["conjugate_gradient", "--budget=0"], capsys)
    assert "--budget must be at least 1" in message
