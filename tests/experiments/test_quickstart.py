"""The quick start from its command line to its files, and its SGD against plain NumPy."""

import gzip
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import numpy_mlp
import pytest
from judged_experiment import refused
from matplotlib.colors import to_rgb

from experiments import data
from experiments.__main__ import main
from experiments.data import fashion_mnist
from experiments.models import MLP
from experiments.quickstart import STYLES
from experiments.training import shuffled_batches

STEPS, WIDTH, DEPTH, BATCH, RATE = 80, 16, 2, 8, 0.2  # 75 chunks: some of two steps, some of one
TINY = f"quickstart --dataset digits --width {WIDTH} --depth {DEPTH} --batch-size {BATCH}".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small quick start: its results, its output folder, what it printed."""
    output = tmp_path_factory.mktemp("quickstart") / "new" / "folder"
    with redirect_stdout(io.StringIO()) as printed:
        main([*TINY, f"--steps={STEPS}", f"--sgd-learning-rate={RATE}",
              "--adam-learning-rate=0.003", "--cadam-learning-rate=0.01",
              f"--output={output}"])  # fmt: skip
    return json.loads((output / "results.json").read_text()), output, printed.getvalue()


def test_the_json_has_every_number(run):
    results, _, _ = run
    assert len(results["dataset"].pop("digest")) == 32
    assert results["dataset"] == {
        "name": "digits",
        "source": "scikit-learn",
        "training_images": 1437,
        "test_images": 360,
        "images_for_training_loss": 1437,
    }
    assert results["settings"]["steps"] == STEPS
    assert results["settings"]["sgd_learning_rate"] == RATE
    assert results["environment"]["versions"]["jax"] == jax.__version__
    assert results["environment"]["cpu_count"] >= 1
    assert list(results["results"]) == ["sgd", "adam", "csgd", "cadam"]
    for result in results["results"].values():
        history = result["history"]
        train_loss = history["metrics"]["train_loss"]
        for curve in (history["batch_loss"], train_loss):
            assert len(curve["step"]) == len(curve["seconds"]) == len(curve["value"])
            assert curve["step"][-1] == result["steps"] == STEPS
            assert curve["seconds"][-1] == result["seconds"] > 0
            assert np.all(np.diff(curve["step"]) > 0) and np.all(np.diff(curve["seconds"]) > 0)
        assert train_loss["value"][-1] == result["train_loss"] < 0.8 * train_loss["value"][0]
        assert len(train_loss["step"]) > 10
        compiling = result["seconds_with_compilation"] - result["seconds"]
        assert compiling == pytest.approx(history["compile_seconds"]) and compiling > 0
        assert 0 < result["test_accuracy"] < 1


def test_all_start_from_the_same_weights_and_then_differ(run):
    losses = [r["history"]["metrics"]["train_loss"]["value"] for r in run[0]["results"].values()]
    assert len({loss[0] for loss in losses}) == 1
    assert len({loss[-1] for loss in losses}) == 4


def test_reaching_sgds_loss_is_the_first_evaluation_at_or_below_it(run):
    results = run[0]["results"]
    target = results["sgd"]["train_loss"]
    for result in results.values():
        curve = result["history"]["metrics"]["train_loss"]
        below = [i for i, loss in enumerate(curve["value"]) if loss <= target]
        expected = (
            {"step": curve["step"][below[0]], "seconds": curve["seconds"][below[0]]}
            if below
            else None
        )
        assert result["reaches_sgd_loss"] == expected
    assert results["sgd"]["reaches_sgd_loss"] is not None


def test_prints_the_data_set_the_progress_and_the_table(run):
    results, output, printed = run
    assert "Data: digits (scikit-learn), 1,437 training and 360 test images" in printed
    assert f"{STEPS}/{STEPS} steps" in printed and "steps/s" in printed
    assert str(output / "results.json") in printed
    for name, label in {"sgd": "SGD", "adam": "Adam", "csgd": "C-SGD", "cadam": "C-Adam"}.items():
        numbers = results["results"][name]
        row = next(line for line in printed.splitlines() if line.split()[:2] == [label, str(STEPS)])
        assert f"{numbers['seconds']:.1f}" in row
        assert f"{numbers['seconds_with_compilation']:.1f}" in row
        assert f"{numbers['train_loss']:.4f}" in row
        assert f"{numbers['test_accuracy']:.2%}" in row
        reached = numbers["reaches_sgd_loss"]
        assert (f"{reached['step']} steps, " if reached else "not reached") in row
    assert max(map(len, printed.split("Data:")[1].splitlines()[2:-1])) <= 80


def test_the_figure_shows_every_optimizer_in_both_panels(run):
    picture = matplotlib.image.imread(run[1] / "losses.png")[..., :3]
    assert picture.shape[1] > 1200 and picture.shape[0] > 500
    middle = picture.shape[1] // 2
    for panel in (picture[:, :middle], picture[:, middle:]):
        for colour, _ in STYLES:
            assert (np.abs(panel - to_rgb(colour)).max(axis=-1) < 0.02).sum() > 200


def test_sgd_is_numpys_sgd(run):
    result = run[0]["results"]["sgd"]
    digits = data.load("digits", None, download=False)
    (x, y), test = digits.train, digits.test
    params = MLP(WIDTH, DEPTH, 10).init(jax.random.key(0), x[:1])
    batches = shuffled_batches(0, len(y), BATCH, STEPS)
    losses, layers = numpy_mlp.train(params, x, y, batches, RATE)

    curve = result["history"]["batch_loss"]
    means = [part.mean() for part in np.split(losses, curve["step"][:-1])]
    np.testing.assert_allclose(curve["value"], means, rtol=1e-4)
    loss = numpy_mlp.mean_loss(numpy_mlp.forward(layers, x)[1], y)
    assert result["train_loss"] == pytest.approx(loss, rel=1e-4)
    right = numpy_mlp.accuracy(numpy_mlp.forward(layers, test.images)[1], test.labels)
    assert result["test_accuracy"] == pytest.approx(right, abs=1e-6)


def test_divergence_is_reported_not_hidden(tmp_path, capsys):
    main([*TINY, "--steps=8", "--optimizers", "csgd", "sgd", "--sgd-learning-rate=1e30",
          f"--output={tmp_path}"])  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["csgd", "sgd"]
    assert results["sgd"]["train_loss"] is None
    assert results["csgd"]["train_loss"] > 0
    assert results["csgd"]["reaches_sgd_loss"] is None
    assert "nan" in capsys.readouterr().out


def test_without_sgd_nothing_is_compared_to_it(tmp_path, capsys):
    main([*TINY, "--steps=3", "--optimizers", "adam", f"--output={tmp_path}"])
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert "reaches_sgd_loss" not in results["adam"]
    assert "SGD" not in capsys.readouterr().out


BAD_OPTIONS = {
    "--steps=0": "--steps must be at least 1, got 0",
    "--batch-size=-3": "--batch-size must be at least 1, got -3",
    "--batch-size=2000": "--batch-size 2000 is more than the 1,437 training images of digits",
    "--width=0": "--width must be at least 1",
    "--depth=0": "--depth must be at least 1",
    "--csgd-learning-rate=0": "--csgd-learning-rate must be positive and finite",
    "--sgd-learning-rate=nan": "--sgd-learning-rate must be positive and finite",
    "--damping=-1": "--damping must be positive and finite, got -1",
    "--optimizers": "--optimizers must have at least one",
    "--optimizers sgd adam sgd": "none twice",
    "--optimizers lbfgs": "lbfgs",
    "--data-dir=.": "are for Fashion-MNIST, not for digits",
    "--dataset=fashion_mnist --data-dir=/no/such/folder": "train-images-idx3-ubyte.gz is missing",
    "--output=/dev/null/x": "/dev/null",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_end_with_a_message_and_status_2(options, capsys):
    assert BAD_OPTIONS[options] in refused([*TINY, *options.split()], capsys)


def test_a_bad_data_file_ends_with_one_line_and_status_2(tmp_path, capsys):
    for name in fashion_mnist.MD5:
        (tmp_path / name).write_bytes(gzip.compress(b"not images")[:-4])
    with pytest.raises(SystemExit) as exit_:
        main(["quickstart", f"--data-dir={tmp_path}"])
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/train-images-idx3-ubyte.gz cannot be read")


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_without_a_name_the_experiments_are_listed(args, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 0
    assert "quickstart" in capsys.readouterr().out


def test_help_tells_every_option():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "experiments", "quickstart", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for option in ("steps", "batch-size", "csgd-learning-rate", "damping", "data-dir", "download"):
        assert f"--{option} " in done.stdout or f"--{option}," in done.stdout
    assert "CQJAX_DATA_DIR" in done.stdout
