"""SGD against back-matching on LeNet: from the command line to the files, and by hand."""

import io
import json
import re
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from experiments import lenet, models
from experiments.__main__ import main
from experiments.data import cifar
from experiments.report import STYLES
from experiments.training import shuffled_batches

STEPS, BATCH = 6, 20
NARROW = f"lenet --channels 2 3 --hidden 8 6 --batch-size {BATCH} --steps {STEPS}".split()


@pytest.fixture
def run(cifar10_folder, tmp_path):
    """Runs the experiment: its results, its figure, what it printed."""

    def with_options(*options):
        output = tmp_path / "new" / "folder"
        with redirect_stdout(io.StringIO()) as printed:
            main([*NARROW, f"--data-dir={cifar10_folder}", f"--output={output}", *options])
        results = json.loads((output / "results.json").read_text())
        return results, matplotlib.image.imread(output / "lenet.png")[..., :3], printed.getvalue()

    return with_options


def back_matching_rates(params):
    """The supplement of seed 004, in its order and letters: rows are outputs there."""
    w = {name: np.float64(layer["kernel"]) for name, layer in params.items()}
    square = {name: (kernel**2).sum() for name, kernel in w.items()}
    outputs = {name: square[name] / kernel.shape[-1] for name, kernel in w.items()}
    inputs = {name: square[name] / kernel.shape[-2] for name, kernel in w.items()}
    fc2 = outputs["fc2"] / inputs["fc3"]
    fc1 = outputs["fc2"] * outputs["fc1"] / (inputs["fc3"] * inputs["fc2"])
    above = inputs["fc3"] * inputs["fc2"] * inputs["fc1"]
    cv2 = outputs["fc2"] * outputs["fc1"] * outputs["cv2"] / (25 * above)
    cv1 = outputs["fc2"] * outputs["fc1"] * outputs["cv2"] * outputs["cv1"] / (
        25 * above * inputs["cv2"]
    )  # fmt: skip
    return {"fc3": 1.0, "fc2": fc2, "fc1": fc1, "cv2": cv2, "cv1": cv1}


def sgd_rates(params):
    return dict.fromkeys(params, 1.0)


def by_hand(dataset, rate, rates_of, decay, nesterov):
    """The batches' losses under momentum of 0.9: the decay first, then the layers' rates."""
    model = models.LeNet((2, 3), (8, 6))
    images, labels = dataset.train
    params = model.init(jax.random.key(0), images[:1])["params"]

    @jax.jit
    @jax.value_and_grad
    def differentiate(params, x, y):
        logits, _ = model.apply({"params": params}, x, train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    velocity, losses = dict.fromkeys(params, 0.0), []
    for batch in shuffled_batches(0, len(labels), BATCH, STEPS):
        loss, grads = differentiate(params, images[batch], labels[batch])
        losses.append(loss)
        rates = rates_of(params)
        for name, layer in list(params.items()):
            update = rates[name] * (grads[name]["kernel"] + decay * layer["kernel"])
            velocity[name] = 0.9 * velocity[name] + update
            step = 0.9 * velocity[name] + update if nesterov else velocity[name]
            params[name] = {"kernel": layer["kernel"] - rate * step}
    return losses


@pytest.mark.parametrize(("decay", "nesterov"), [(0.01, False), (0.0, True)])
def test_both_methods_at_the_papers_rates_are_what_it_says(run, cifar10_folder, decay, nesterov):
    nesterov_options = ["--nesterov"] if nesterov else []
    results, _, printed = run("--rates=paper", f"--weight-decay={decay}", *nesterov_options)
    assert ("weight decay 0.01" if decay else "no weight decay") in printed
    dataset = cifar.CIFAR10.load(cifar10_folder, download=False).standardised()
    settings = (("sgd", 0.1, sgd_rates), ("back_matching", 0.02, back_matching_rates))
    for result, (method, rate, rates_of) in zip(results["results"], settings, strict=True):
        assert (result["method"], result["learning_rate"]) == (method, rate)
        losses = by_hand(dataset, rate, rates_of, decay, nesterov)
        np.testing.assert_allclose(result["history"]["batch_loss"]["value"], losses, rtol=1e-3)


def test_the_candidates_are_the_papers():
    assert lenet.POOLS == {
        "sgd": (0.02, 0.05, 0.1, 0.2, 0.5),
        "back_matching": (0.005, 0.01, 0.02, 0.05, 0.1),
    }


def test_all_candidates_are_run_and_the_best_are_named(run, monkeypatch):
    monkeypatch.setattr(lenet, "POOLS", {"sgd": (0.02, 0.1), "back_matching": (0.02, 0.05)})
    results, picture, printed = run()
    assert results["settings"]["rates"] == "all" and results["settings"]["momentum"] == 0.9
    assert results["dataset"]["name"] == "CIFAR-10 (not the official files)"
    assert results["dataset"]["images_for_training_loss"] == 200
    assert results["environment"]["versions"]["jax"] == jax.__version__
    runs = results["results"]
    for result in runs:
        for metric in ("train_loss", "test_accuracy"):
            curve = result["history"]["metrics"][metric]
            assert curve["step"][0] == 0 and curve["step"][-1] == result["steps"] == STEPS
            assert curve["value"][-1] == result[metric]
            assert curve["value"][0] == runs[0]["history"]["metrics"][metric]["value"][0]
    assert [(result["method"], result["learning_rate"]) for result in runs] == [
        ("sgd", 0.02),
        ("sgd", 0.1),
        ("back_matching", 0.02),
        ("back_matching", 0.05),
    ]

    rows = [line.split() for line in printed.splitlines() if re.match(r" (SGD|back-m).*%", line)]
    for row, result in zip(rows, runs, strict=True):
        same = [other for other in runs if other["method"] == result["method"]]
        chosen = {
            "the paper": result["learning_rate"] == {"SGD": 0.1, "back-matching": 0.02}[row[0]],
            "loss": result is min(same, key=lambda other: other["train_loss"]),
            "accuracy": result is max(same, key=lambda other: other["test_accuracy"]),
        }
        assert row[1:5] == [
            f"{result['learning_rate']:g}",
            f"{result['seconds']:.1f}",
            f"{result['train_loss']:.4f}",
            f"{result['test_accuracy']:.2%}",
        ]
        assert " ".join(row[5:]) == ", ".join(name for name in chosen if chosen[name])
    for half in np.split(picture, [picture.shape[1] // 2], axis=1):
        for quarter in np.split(half, [picture.shape[0] // 2]):
            for colour, _ in (STYLES[0], STYLES[2]):
                assert (np.abs(quarter - to_rgb(colour)).max(axis=-1) < 0.02).sum() > 200


def test_one_run_that_diverges_is_reported_and_not_the_best(run, monkeypatch):
    monkeypatch.setattr(lenet, "POOLS", {"sgd": (1e30, 0.1), "back_matching": (0.02,)})
    results, _, printed = run("--weight-decay=1")
    assert [r["train_loss"] is None for r in results["results"]] == [True, False, False]
    rows = [line for line in printed.splitlines() if "%" in line]
    assert ["nan" in row for row in rows] == ["loss" not in row for row in rows]


BAD_OPTIONS = {
    "--steps=0": "--steps must be at least 1, got 0",
    "--channels 6 0": "--channels must be at least 1, got 0",
    "--hidden -3 84": "--hidden must be at least 1, got -3",
    "--momentum=1": "--momentum must be at least 0 and less than 1, got 1",
    "--weight-decay=-1e-4": "--weight-decay must be finite and not negative, got -0.0001",
    "--weight-decay=nan": "--weight-decay must be finite and not negative, got nan",
    "--rates=best": "best",
    "--batch-size=201": "--batch-size 201 is more than the 200 training images of CIFAR-10",
    "--data-dir=/no/such/folder": "data_batch_1 is missing",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_end_with_a_message_and_status_2(options, cifar10_folder, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*NARROW, f"--data-dir={cifar10_folder}", *options.split()])
    assert exit_.value.code == 2
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert BAD_OPTIONS[options] in message
    assert "Traceback" not in message
