"""The contest where weights are used both ways, run small: who runs, the page, the verdicts."""

import io
from contextlib import redirect_stdout

import jax
import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run, untimed

from experiments.pages import pinn as pages
from experiments.pinn.equations import POISSON
from experiments.pinn.experiment import KINDS, Pinn

NAMES = ["Adam", "L-BFGS", "C-SGD", "C-Adam", "C-Adam, untuned", "C-Adam, defaults"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON file, the page, the folder, what was printed."""
    folder = tmp_path_factory.mktemp("pinn")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("experiments.pipeline.measure", untimed)
        jax.config.update("jax_disable_most_optimizations", True)
        content, page = run("pinn", folder, "--mode=forward", "--kinds", "poisson", "gan")
        jax.config.update("jax_disable_most_optimizations", False)
    return content, page, folder, printed.getvalue()


def test_the_contests(ran):
    contests = ran[0]["results"]["contests"]
    assert list(contests["poisson"]["entrants"]) == NAMES
    assert list(contests["gan"]["entrants"]) == [NAMES[0], *NAMES[3:]]
    for contest in contests.values():
        adam = contest["entrants"]["Adam"]["runs"][0]
        assert contest["target"] == {"entrant": "Adam", "test_error": adam["test_error"]}
        assert adam["to_target"]["step"] <= contest["effort"]["steps"] == 15
        for entrant in contest["entrants"].values():
            assert np.isfinite([run["test_error"] for run in entrant["runs"]]).all()


def test_the_page_and_the_figures(ran):
    content, page, folder, printed = ran
    check_page(content, page, claims=4)
    assert all(claim["holds"] == "open" for claim in content["claims"])
    assert "`jax.jvp`: each of their weights is used forwards alone" in page
    for file in ("steps.png", "seconds.png"):
        check_figure(folder / file, panels=2)
    assert list(content["results"]["fields"]) == ["poisson"]
    assert "![The solutions, and the errors of Adam and C-Adam" in page
    check_figure(folder / "fields.png", panels=3)
    adam = content["results"]["fields"]["poisson"]["Adam"]
    error = np.linalg.norm(np.array(adam) - POISSON.solution(POISSON.grid(31)))
    error /= np.linalg.norm(POISSON.solution(POISSON.grid(31)))
    stored = content["results"]["contests"]["poisson"]["entrants"]["Adam"]["runs"][0]["test_error"]
    assert error == pytest.approx(stored, rel=0.1)  # another grid, the same parameters


def outcome(error, share, untuned):
    """A contest in which Adam ends with the error 1 after 100 steps."""

    def entrant(error, step, role):
        to = {"step": step, "seconds": step / 10, "seconds_with_compilation": step / 10 + 1}
        ends = {"train_loss": 1.0, "validation_loss": 1.0, "test_error": error}
        whole = {"steps": 100, "seconds": 10.0, "seconds_with_compilation": 11.0}
        return {
            "role": role,
            "rate": 0.01,
            "tuning": [],
            "runs": [whole | ends | {"to_target": to}],
        }

    entrants = {
        "Adam": entrant(1.0, 100, "baseline"),
        "L-BFGS": entrant(0.4, 20, "other"),
        "C-Adam": entrant(error, 100 * share, "ours"),
        "C-Adam, 0.01": entrant(error / 2, 50 * share, "ours"),
        "C-Adam, untuned": entrant(untuned, 100, "untuned"),
    }
    return {
        "entrants": entrants,
        "effort": {"steps": 100, "batch_size": 4, "seeds": 1},
        "target": {"entrant": "Adam", "test_error": 1.0},
        "seconds_per_step": dict.fromkeys(entrants, 0.1),
    }


@pytest.mark.parametrize(
    ("posed", "share", "others", "untuned", "verdicts"),
    [
        ((0.5, 0.2), 0.9, 0.9, 0.9, ["yes"] * 6),
        ((0.5, 0.6), 1.0, 1.1, 1.1, ["partly", "no", "yes", "yes", "no", "no"]),
        ((0.6, 0.9), 1.1, 0.9, 0.9, ["no", "no", "yes", "yes", "yes", "yes"]),
    ],
)
def test_verdicts(posed, share, others, untuned, verdicts):
    errors = dict(zip(KINDS, (*posed, others, others), strict=True))
    held = {kind: outcome(error, share, untuned) for kind, error in errors.items()}
    page = pages.page(Pinn(dampings=(0.01,)).filled(), {"contests": held, "fields": {}})
    assert [claim.holds for claim in page.claims] == verdicts
    assert page.claims[0].measured.startswith(f"poisson {posed[0]:.2f}, burgers {posed[1]:.2f}")
    lost = f"poisson, C-Adam: error {posed[0]:.4g} (better: L-BFGS 0.4); steps to the target"
    assert any(line.startswith(lost) for line in page.behind)


BAD_OPTIONS = {
    "--kinds gan gan": "none twice",
    "--adam-rates 0.1 0.1": "--adam-rates must be at least --tries, 2, different rates",
    "--lbfgs-memories 10 10": "--lbfgs-memories must be at least --tries, 2, different rates",
    "--lbfgs-memories 0.1 10": "--lbfgs-memories must be at least 1",
    "--length=0": "--length must be positive",
    "--side=0": "--side must be at least 1",
    "--dataset=digits": "--dataset",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, capsys, tmp_path):
    command = ["pinn", "--preset=smoke", f"--output={tmp_path}", *options.split()]
    assert BAD_OPTIONS[options] in refused(command, capsys)


def test_presets_are_whole():
    for preset in ("cpu", "paper"):
        settings = Pinn(preset=preset).filled()
        assert None not in vars(settings).values()
        assert settings.seeds >= 3 and settings.kinds == KINDS and settings.mode == "reverse"
