"""The contest on the paper's network, run small: its numbers against NumPy and its own lines."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import numpy_mlp
import pytest
from judged_experiment import check_figure, check_page, refused, run
from rich.console import Console

from experiments import data
from experiments.benchmarks import timing
from experiments.mlp import Mlp
from experiments.models import MLP
from experiments.page import median
from experiments.pages import mlp as pages
from experiments.training import State, shuffled_batches

NAMES = ["SGD", "Nesterov", "Adam", "C-SGD"]
near = partial(pytest.approx, rel=1e-6)  # of the digits that are stored
SMOKE = Mlp(preset="smoke").filled()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """With both inputs: the JSON file, the page, the folder, what was printed."""
    folder = tmp_path_factory.mktemp("mlp")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("experiments.pipeline.EFFORT", timing.Effort(2, 0.01, 1))
        jax.config.update("jax_disable_most_optimizations", True)
        content, page = run("mlp", folder, "--depth=1", "--inputs", "raw", "normalised")
        jax.config.update("jax_disable_most_optimizations", False)
    return content, page, folder, printed.getvalue()


@pytest.fixture(scope="module")
def lines(ran):
    """Of metrics.jsonl, by run."""
    by_run = {}
    for line in map(json.loads, (ran[2] / "metrics.jsonl").read_text().splitlines()):
        by_run.setdefault(line["run"], []).append(line)
    return by_run


@pytest.fixture(scope="module", params=["raw", "normalised"])
def contest(request, ran):
    return request.param, ran[0]["results"]["contests"][request.param]


def test_grids_are_extended_where_the_option_says_so():
    train = SMOKE.load(Console(quiet=True)).train
    assert replace(SMOKE, extensions=2).effort("raw", train).extensions == 2
    assert SMOKE.effort("raw", train).extensions == 0


def test_c_sgd_with_its_defaults_may_take_part():
    """Its first step from the same weights is another than that of the paper's damping."""
    settings = replace(SMOKE, optimizers=("sgd", "csgd", "csgd_default"))
    ((task, entrants),) = settings.contests(settings.load(Console(quiet=True))).values()
    paper, default = entrants[1:3]
    assert default.role == "ours" and default.rates == (0.1, 0.03)
    (params, state), batch = task.start(0), [array[:32] for array in task.parts.train]
    ends = []
    for entrant in (paper, default):
        optimizer, step = entrant.at(0.1)
        after, _ = jax.jit(step)(State(params, state, optimizer.init(params)), *batch)
        ends.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(after.params)]))
    start = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    far, near_ = (np.linalg.norm(end - start) for end in ends)
    assert 0 < near_ < far


def parts(title):
    """What to train on, to validate with, to test; features normalised by plain NumPy."""
    digits = data.load("digits", None, download=False)
    (x, y), (tx, ty) = digits.train, digits.test
    if title == "normalised":
        mean, deviation = np.float64(x).mean(axis=0), np.float64(x).std(axis=0)
        deviation[deviation == 0] = 1
        x, tx = (x - mean) / deviation, (tx - mean) / deviation
    return (x[:1293], y[:1293]), (x[1293:], y[1293:]), (tx, ty)


@pytest.mark.parametrize("name", ["SGD", "C-SGD"])
def test_a_run_is_numpys(contest, name):
    """Its start, its batches, its damping, its held-out part, and what is measured on which."""
    title, held = contest
    entrant = held["entrants"][name]
    (x, y), validation, test = parts(title)
    damping = {"raw": 1e-3, "normalised": 1e-2}[title] if name == "C-SGD" else None
    start = MLP(16, 1, 10).init
    for at in entrant["tuning"]:
        params, batches = start(jax.random.key(0), x[:1]), shuffled_batches(0, 1293, 32, 20)
        _, layers = numpy_mlp.train(params, x, y, batches, at["rate"], damping)
        loss = numpy_mlp.mean_loss(numpy_mlp.forward(layers, validation[0])[1], validation[1])
        assert at["validation_loss"] == pytest.approx(loss, rel=1e-4)
    for seed, result in enumerate(entrant["runs"], start=1):
        params, batches = start(jax.random.key(seed), x[:1]), shuffled_batches(seed, 1293, 32, 80)
        _, layers = numpy_mlp.train(params, x, y, batches, entrant["rate"], damping)
        logits = numpy_mlp.forward(layers, x[:500])[1]
        assert result["train_loss"] == pytest.approx(numpy_mlp.mean_loss(logits, y[:500]), rel=1e-2)
        right = numpy_mlp.accuracy(numpy_mlp.forward(layers, test[0])[1], test[1])
        assert result["test_accuracy"] == pytest.approx(right, abs=0.006)


def test_the_winner_has_the_lowest_validation_loss(contest, lines):
    title, held = contest
    assert list(held["entrants"]) == NAMES
    for name, entrant in held["entrants"].items():
        tried = {}
        for at in entrant["tuning"]:
            (line,) = lines[f"{title}: {name} {at['rate']:g}, tuning"]
            assert line["validation_loss"] == near(at["validation_loss"]) and line["step"] == 20
            tried[at["rate"]] = line["validation_loss"]
        assert len(tried) == 2 and entrant["rate"] == min(tried, key=tried.get)


def test_all_start_alike_at_each_seed(contest, lines):
    title, held = contest
    first = {
        seed: [lines[f"{title}: {n} {e['rate']:g}, seed {seed}"][0] for n, e in entrants]
        for entrants in [held["entrants"].items()]
        for seed in (1, 2)
    }
    for four in first.values():
        assert {line["step"] for line in four} == {0}
        for metric in ("train_loss", "validation_loss", "test_accuracy"):
            assert len({line[metric] for line in four}) == 1
    assert first[1][0]["train_loss"] != first[2][0]["train_loss"]


def test_the_target_and_the_way_to_it_are_those_of_the_metrics(contest, lines):
    title, held = contest
    runs = {
        name: [lines[f"{title}: {name} {e['rate']:g}, seed {seed}"] for seed in (1, 2)]
        for name, e in held["entrants"].items()
    }
    ends = {n: median([run[-1]["train_loss"] for run in runs[n]]) for n in NAMES[:-1]}
    best = min(ends, key=ends.get)
    assert held["target"] == {"entrant": best, "train_loss": near(ends[best])}
    for name, entrant in held["entrants"].items():
        for its_lines, result in zip(runs[name], entrant["runs"], strict=True):
            assert [line["step"] for line in its_lines[:3] + its_lines[-1:]] == [0, 10, 15, 80]
            there = [line for line in its_lines if line["train_loss"] <= ends[best]]
            compiling = result["seconds_with_compilation"] - result["seconds"]
            expected = there and {
                "step": there[0]["step"],
                "seconds": near(there[0]["seconds"]),
                "seconds_with_compilation": near(there[0]["seconds"] + compiling),
                "test_accuracy": near(there[0]["test_accuracy"]),
            }
            assert result["to_target"] == (expected or None)
            assert compiling > 0


def test_the_page_and_the_figure(ran):
    content, page, folder, printed = ran
    check_page(content, page, claims=7)
    raw = content["results"]["contests"]["raw"]
    best, ours = raw["target"]["entrant"], raw["entrants"]["C-SGD"]["runs"]
    steps = median([run["to_target"]["step"] for run in ours]) / 80
    assert f"the best is {best} with {raw['target']['train_loss']:.4f}" in page
    assert f"C-SGD takes {steps:.2f} of its steps" in content["claims"][0]["measured"]
    for title, contest in content["results"]["contests"].items():
        for entrant in contest["entrants"].values():
            rates = [at["rate"] for at in entrant["tuning"]]
            assert f"{entrant['rate']:g} (at the grid's edge)" in page and len(rates) == 2
        ends = {
            name: median([run["train_loss"] for run in entrant["runs"]])
            for name, entrant in contest["entrants"].items()
        }
        lost = [line for line in content["behind"] if line.startswith(f"{title}, C-SGD: ")]
        better = {name for name, loss in ends.items() if loss < ends["C-SGD"]}
        assert any("training loss" in line for line in lost) == bool(better)
        assert all(line in page for line in lost)
    assert "Muon takes no part" in page and "not the official" not in page
    check_figure(folder / "losses.png", panels=3)
    assert "32/32 runs" in printed


def test_the_pipelines_share(contest, ran):
    title, held = contest
    assert list(held["seconds_per_step"]) == [*NAMES, "Muon"]
    assert all(seconds > 0 for seconds in held["seconds_per_step"].values())
    pipeline = held["pipeline"]
    with_, without = pipeline["seconds_with"], pipeline["seconds_without"]
    assert pipeline["entrant"] == "SGD" and with_ == held["seconds_per_step"]["SGD"]
    # Three numbers of seven digits each.
    rounding = 5e-7 * (abs(pipeline["share"]) + 2 * without / with_)
    assert pipeline["share"] == pytest.approx(1 - without / with_, rel=0, abs=1.01 * rounding)
    assert without > 0
    assert any(
        line.startswith(f"| {title} ") and f"| {pipeline['share']:.1%} |" in line
        for line in ran[1].splitlines()
    )


def judged(results):
    """The page's claims by their first words, and the page."""
    page = pages.page(SMOKE, results)
    return {claim.claim[:24]: claim for claim in page.claims}, page


def test_what_is_said_of_other_data(ran):
    results = json.loads(json.dumps(ran[0]["results"]))
    results["dataset"]["name"] = "CIFAR-100 (not the official files)"
    claims, page = judged(results)
    assert "The files are not the official ones" in page.summary
    both = claims["for CIFAR-100, normalisi"]
    for name in ("SGD", "C-SGD"):
        raw, normalised = (
            median([run["train_loss"] for run in held["entrants"][name]["runs"]])
            for held in results["contests"].values()
        )
        assert f"{name}: training loss in the end {raw:.4f} raw, {normalised:.4f}" in both.measured
    results["dataset"]["name"] = "Fashion-MNIST"
    claims, _ = judged(results)
    assert "by elapsed time, both ar" in claims and len(claims) == 7


def test_who_never_reaches_the_target_has_not_held(ran):
    results = json.loads(json.dumps(ran[0]["results"]))
    held = results["contests"].pop("normalised") and results["contests"]["raw"]
    for result in held["entrants"]["C-SGD"]["runs"]:
        result["to_target"] = None
        for metric in ("train_loss", "test_accuracy"):
            result[metric] = None
        result["history"]["metrics"]["train_loss"]["value"][3:] = [None] * 13
    for result in held["entrants"]["SGD"]["runs"]:
        result["history"]["metrics"]["train_loss"]["value"][1] = 0.0
    claims, page = judged(results)
    bar = claims["raw inputs: C-SGD has th"]
    assert bar.holds == "no" and "does not get there" in bar.measured
    first = claims["C-SGD optimizes faster t"]
    assert first.holds == "no" and "at 1 of 15 times (the other inputs were not" in first.measured
    assert any(line.startswith("C-SGD: training loss ∞ (better: ") for line in page.behind)


@pytest.mark.parametrize(
    ("steps", "seconds", "accuracy", "holds"),
    [
        (28, 5.0, 0.7, "yes"),
        (29, 5.0, 0.7, "partly"),
        (28, 5.1, 0.7, "partly"),
        (28, 5.0, 0.69, "partly"),
        (29, 5.1, 0.69, "no"),
    ],
)
def test_this_projects_bar(ran, steps, seconds, accuracy, holds):
    """At most 0.35 of 80 steps and half of 10 seconds, and an accuracy of at least 0.7."""
    results = json.loads(json.dumps(ran[0]["results"]))
    held = results["contests"].pop("normalised") and results["contests"]["raw"]
    for result in held["entrants"][held["target"]["entrant"]]["runs"]:
        result |= {"seconds_with_compilation": 10.0, "test_accuracy": 0.7}
    for result in held["entrants"]["C-SGD"]["runs"]:
        result["to_target"] = {"step": steps, "seconds": 0.0, "test_accuracy": accuracy}
        result["to_target"]["seconds_with_compilation"] = seconds
    assert judged(results)[0]["raw inputs: C-SGD has th"].holds == holds


BAD_OPTIONS = {
    "--optimizers sgd": "--optimizers must have sgd and csgd",
    "--optimizers sgd csgd sgd": "none twice",
    "--inputs": "--inputs must have at least one",
    "--inputs raw raw": "none twice",
    "--sgd-rates 0.1 0.1": "--sgd-rates must be at least --tries, 2, different rates",
    "--tries=6": "--sgd-rates must be at least --tries, 6, different rates",
    "--csgd-rates 0.1 -1": "--csgd-rates must be positive and finite, got -1",
    "--epochs=0": "--epochs must be positive",
    "--seeds=0": "--seeds must be at least 1",
    "--batch-size=1400": "--batch-size 1400 is more than the 1,293 training images of digits",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, capsys, tmp_path):
    command = ["mlp", "--preset=smoke", f"--output={tmp_path}", *options.split()]
    assert BAD_OPTIONS[options] in refused(command, capsys)


def test_presets_are_whole():
    for preset in ("cpu", "paper"):
        settings = Mlp(preset=preset).filled()
        missing = [name for name, value in vars(settings).items() if value is None]
        assert missing == ["data_dir", "width"]
        assert len(settings.optimizers) >= 4 and settings.seeds >= 3 and settings.depth == 8
