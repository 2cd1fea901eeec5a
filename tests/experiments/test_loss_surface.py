"""The paths of two weights, against closed forms."""

import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run

X, OPTIMUM, START = np.array([0.5, 2.0]), np.array([2.0, 1.0]), np.array([-1.0, 2.5])
RATES = (0.49, 0.05)
METHODS = ["C-SGD", "SGD", "SGD with momentum"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss_surface")
    return *run("loss_surface", folder), folder


@pytest.mark.parametrize(("i", "rate"), list(enumerate(RATES)))
def test_paths_are_those_of_closed_forms(ran, i, rate):
    results, k = ran[0]["results"], np.arange(60)[:, None]
    assert list(results) == METHODS
    paths = {method: np.array(results[method]["paths"][i]) for method in METHODS}
    sgd = OPTIMUM + (1 - rate * X**2) ** k * (START - OPTIMUM)
    np.testing.assert_allclose(paths["SGD"], sgd, atol=1e-5)
    ours = OPTIMUM + (1 - rate * X**2 / (X**2 + 1e-3)) ** k * (START - OPTIMUM)
    np.testing.assert_allclose(paths["C-SGD"], ours, atol=1e-5)
    w, v, momentum = START, np.zeros(2), []
    for _ in range(60):
        momentum.append(w)
        v = 0.9 * v + X**2 * (w - OPTIMUM)
        w = w - rate * v
    np.testing.assert_allclose(paths["SGD with momentum"], momentum, atol=1e-4)


def test_what_is_said_of_a_path(ran):
    for method, result in ran[0]["results"].items():
        assert len(result["rates"]) == 7
        for path, at in zip(result["paths"], result["rates"], strict=False):
            error = np.array(path) - OPTIMUM
            distance = np.linalg.norm(error, axis=1)
            first = next((i for i in range(60) if all(distance[i:] <= 0.01 * distance[0])), None)
            assert at["steps"] == first, method
            length = np.linalg.norm(np.diff(error, axis=0), axis=1).sum() / distance[0]
            assert at["length"] == pytest.approx(length, rel=1e-4)
            crossed = np.sign(error[:first, 1])
            assert at["crossings"][1] == (crossed[1:] != crossed[:-1]).sum()


def test_the_page_and_the_figure(ran):
    content, page, folder = ran
    check_page(content, page, claims=6)
    check_figure(folder / "paths.png", panels=3)


def test_verdicts_follow_the_numbers(ran, tmp_path):
    def verdicts(content):
        return {claim["claim"]: claim["holds"] for claim in content["claims"]}

    passes = "but makes the other weight pass its optimum"
    direct = "C-SGD moves the weights directly towards the optimum, whatever the rate"
    assert verdicts(ran[0])[passes] == verdicts(ran[0])[direct] == "yes"
    changed, _ = run("loss_surface", tmp_path, "--momentum=0", "--damping=1")
    assert verdicts(changed)[passes] == verdicts(changed)[direct] == "no"


@pytest.mark.parametrize("option", ["--steps=0", "--momentum=1", "--rates 0.1 0", "--damping=-1"])
def test_bad_options(option, capsys):
    message = refused(["loss_surface", *option.split()], capsys)
    assert f"{option.split('=')[0].split()[0]} must be" in message
