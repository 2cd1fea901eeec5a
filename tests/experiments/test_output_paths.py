"""The outputs' paths, against loops in NumPy."""

import jax
import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run

from experiments import output_paths

DAMPING = 1e-3


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output_paths")
    return *run("output_paths", folder), folder


def draws():
    for key in jax.random.split(jax.random.key(0), 3):
        yield tuple(np.float64(array) for array in output_paths.draw(key))


def direction(method, x):
    """What the errors of a batch are multiplied by."""
    if method == "C-SGD":
        return x.T @ np.linalg.inv(x @ x.T + DAMPING * np.eye(len(x)))
    if method == "NLMS":
        return x.T / (np.sum(x**2, axis=1) + DAMPING)
    return x.T


def outputs(method, rate, w, x, t, steps):
    """All outputs before each step, in float64."""
    z = []
    for _ in range(steps):
        z.append(x @ w)
        w = w - rate * direction(method, x) @ (x @ w - t)
    return np.array(z)


def test_the_outputs_are_numpys(ran):
    runs = ran[0]["results"]["runs"]
    rates = [(run["method"], run["rate"]) for run in runs]
    assert rates == [("C-SGD", 0.7), ("C-SGD", 0.1), ("C-SGD", 1.0), ("SGD", 0.03), ("SGD", 0.01),
                     ("NLMS", 0.7), ("NLMS", 0.1)]  # fmt: skip
    for found in runs:
        for i, (w, x, t) in enumerate(draws()):
            z = outputs(found["method"], found["rate"], w, x, t, 40)
            if i == 0:
                np.testing.assert_allclose(np.array(found["paths"]), z[:, :2], atol=2e-3)
            squares = np.sum((z - t) ** 2, axis=(1, 2))
            assert found["final"][i] == pytest.approx(squares[-1] / squares[0], rel=0.02, abs=1e-6)
            late = np.flatnonzero(squares > 0.01 * squares[0])[-1] + 1
            assert found["steps"][i] == (late if late < 40 else None)
            distance = np.linalg.norm(z - t, axis=-1)
            walked = np.linalg.norm(np.diff(z, axis=0), axis=-1).sum(axis=0)
            assert found["longest"][i] == pytest.approx(max(walked / distance[0]), rel=1e-3)


def test_nlms_is_unstable_where_its_matrix_says_so(ran):
    for (_, x, _), value in zip(
        draws(), ran[0]["results"]["nlms_largest_eigenvalues"], strict=True
    ):
        matrix = x @ direction("NLMS", x)  # of Eq. 54, with epsilon
        assert value == pytest.approx(np.abs(np.linalg.eigvals(matrix)).max(), rel=1e-3)


def test_mini_batches_take_turns(tmp_path):
    content, page = run("output_paths", tmp_path, "--batch-sizes=5", "--steps=6", "--seeds=1")
    assert "Mini-batches of 5" in page and "Mini-batches of 10" not in page
    w, x, t = next(draws())
    z = []
    for step in range(6):
        z.append(x @ w)
        half = slice(0, 5) if step % 2 == 0 else slice(5, 10)
        w = w - 0.7 * direction("C-SGD", x[half]) @ (x @ w - t)[half]
    np.testing.assert_allclose(
        content["results"]["runs"][0]["paths"], np.array(z)[:, :2], atol=2e-3
    )
    direct = content["claims"][0]
    assert direct["claim"].startswith("C-SGD steers") and direct["holds"] == "no"
    assert "In mini-batches of 5 C-SGD's paths are not straight" in page


def test_the_page_and_the_figure(ran):
    content, page, folder = ran
    check_page(content, page, claims=5)
    check_figure(folder / "paths.png", panels=4)
    assert content["claims"][0]["holds"] == "yes"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--batch-sizes 3", "must divide 10"),
        ("--seeds=0", "--seeds must be"),
        ("--steps=0", "least 1"),
    ],
)
def test_bad_options(option, message, capsys):
    assert message in refused(["output_paths", *option.split()], capsys)
