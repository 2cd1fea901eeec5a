"""SGD against back-matching on LeNet, run small: by hand, and the page against its numbers."""

import copy
import io
from contextlib import redirect_stdout
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run, untimed

from experiments import data, models
from experiments.lenet import LeNet
from experiments.pages import lenet as pages
from experiments.training import shuffled_batches

SMOKE = LeNet(preset="smoke").filled()
DECAYS = {"no decay": 0.0, "decay 5e-4": 5e-4}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON file, the page, the folder."""
    folder = tmp_path_factory.mktemp("lenet")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr("experiments.pipeline.measure", untimed)
        jax.config.update("jax_disable_most_optimizations", True)
        content, page = run("lenet", folder)
        jax.config.update("jax_disable_most_optimizations", False)
    return content, page, folder


@pytest.fixture(scope="module")
def differentiate():
    model = models.LeNet()

    @jax.jit
    @jax.value_and_grad
    def loss(params, x, y):
        logits, _ = model.apply({"params": params}, x, train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    return loss


@pytest.fixture(scope="module")
def training():
    """The digits, each pixel four times, without their mean and deviation; 1,293 to train on."""
    images, labels = data.load("digits", None, download=False).train
    images = np.kron(np.float64(images), np.ones((2, 2)))[..., None]
    images = np.float32((images - images.mean()) / images.std())
    return images[:1293], labels[:1293]


def back_matching_rates(params):
    """Zhang, Chen and Liu, supplement, with 16 x 16 images: s is 36 for cv1, 1 for the others."""
    square = {name: (np.float64(layer["kernel"]) ** 2).sum() for name, layer in params.items()}
    m = {"fc3": 1.0}
    m["fc2"] = m["fc3"] * (square["fc3"] / 84) / (square["fc2"] / 84)
    m["fc1"] = m["fc2"] * (square["fc2"] / 120) / (square["fc1"] / 120)
    m["cv2"] = m["fc1"] * (square["fc1"] / 16) / (square["cv2"] / 16)
    m["cv1"] = m["cv2"] * (square["cv2"] / 6) / 36 / (square["cv1"] / 6)
    return {name: 1 / (value * (36 if name == "cv1" else 1)) for name, value in m.items()}


def sgd_rates(params):
    return dict.fromkeys(params, 1.0)


@pytest.mark.parametrize("title", DECAYS)
@pytest.mark.parametrize(
    ("name", "rates_of"), [("SGD", sgd_rates), ("back-matching", back_matching_rates)]
)
def test_a_run_is_what_it_says(ran, training, differentiate, title, name, rates_of):
    """Momentum of 0.9: the decay first, then the layers' rates; losses without the decay."""
    images, labels = training
    entrant = ran[0]["results"]["contests"][title]["entrants"][name]
    (result,) = entrant["runs"]
    params = models.LeNet().init(jax.random.key(1), images[:1])["params"]
    velocity, losses = dict.fromkeys(params, 0.0), []
    for batch in shuffled_batches(1, len(labels), 128, 20):
        loss, grads = differentiate(params, images[batch], labels[batch])
        losses.append(loss)
        rates = rates_of(params)
        for layer, at in list(params.items()):
            update = grads[layer]["kernel"] + DECAYS[title] * at["kernel"]
            velocity[layer] = 0.9 * velocity[layer] + rates[layer] * update
            params[layer] = {"kernel": at["kernel"] - entrant["rate"] * velocity[layer]}
    np.testing.assert_allclose(result["history"]["batch_loss"]["value"], losses, rtol=1e-2)
    weights = np.sqrt(sum(np.sum(np.float64(at["kernel"]) ** 2) for at in params.values()))
    assert result["weights"] == pytest.approx(weights, rel=1e-2)


def test_both_are_tuned_at_the_papers_candidates(ran):
    assert sorted(SMOKE.sgd_rates) == [0.02, 0.05, 0.1, 0.2, 0.5] and SMOKE.sgd_rates[0] == 0.1
    ours = SMOKE.back_matching_rates
    assert sorted(ours) == [0.005, 0.01, 0.02, 0.05, 0.1] and ours[0] == 0.02
    for contest in ran[0]["results"]["contests"].values():
        for name, rates in (("SGD", [0.1, 0.05]), ("back-matching", [0.02, 0.01])):
            entrant = contest["entrants"][name]
            assert [at["rate"] for at in entrant["tuning"]] == rates
            best = min(entrant["tuning"], key=lambda at: at["validation_loss"])
            assert entrant["rate"] == best["rate"]


def test_the_page_and_the_figure(ran):
    content, page, folder = ran
    check_page(content, page, claims=7)
    assert list(content["results"]["contests"]) == list(DECAYS)
    assert "not the official" not in page and "the training loss that SGD has in the end" in page
    for title, contest in content["results"]["contests"].items():
        for name, entrant in contest["entrants"].items():
            chosen = f"{name} {entrant['rate']:g} (validation loss "
            assert chosen in content["claims"][6]["measured"]
        losing = f"{title}, back-matching: training loss"
        ends = [e["runs"][0]["train_loss"] for e in contest["entrants"].values()]
        assert (losing in page) == (ends[0] < ends[1])
    check_figure(folder / "losses.png", panels=3)


# By contest and entrant: the training loss in the end; the test accuracy after 5, 10, 15 and 20
# epochs. The paper's claims hold of them.
CLAIMED = {
    "no decay": {
        "SGD": (0.01, 0.5, 0.6, 0.58, 0.57),
        "back-matching": (0.02, 0.5, 0.705, 0.7, 0.7),
    },
    "decay 5e-4": {
        "SGD": (0.9, 0.6, 0.6, 0.6, 0.65),
        "back-matching": (0.7, 0.6, 0.6, 0.7, 0.705),
    },
}


def judged(results, numbers, rates=(0.1, 0.02), weights=30.0, epochs=20.0):
    """The page's verdicts when these are the numbers; an epoch has 10 steps."""
    results = copy.deepcopy(results)
    for title, contest in results["contests"].items():
        for (name, entrant), rate in zip(contest["entrants"].items(), rates, strict=True):
            loss, *accuracies = numbers[title][name]
            entrant["rate"] = rate
            for result in entrant["runs"]:
                result |= {"train_loss": loss, "test_accuracy": accuracies[-1]}
                result["weights"] = 20.0 if name == "SGD" else weights
                curve = {"step": [50, 100, 150, 200], "seconds": [1, 2, 3, 4], "value": accuracies}
                result["history"]["metrics"]["test_accuracy"] = curve
    page = pages.page(replace(SMOKE, epochs=epochs), results)
    return [claim.holds for claim in page.claims], page


@pytest.mark.parametrize(
    ("claim", "holds", "title", "name", "numbers"),
    [
        (0, "partly", "no decay", "SGD", (0.06, 0.5, 0.6, 0.58, 0.57)),
        (1, "partly", "no decay", "SGD", (0.01, 0.5, 0.55, 0.58, 0.572)),
        (1, "partly", "no decay", "back-matching", (0.02, 0.5, 0.7, 0.7, 0.6)),
        (1, "no", "no decay", "SGD", (0.01, 0.5, 0.5, 0.5, 0.6)),
        (2, "partly", "no decay", "back-matching", (0.02, 0.5, 0.605, 0.6, 0.6)),
        (2, "no", "no decay", "back-matching", (0.02, 0.5, 0.5, 0.5, 0.5)),
        (3, "partly", "decay 5e-4", "back-matching", (0.85, 0.7, 0.7, 0.7, 0.7)),
        (3, "no", "decay 5e-4", "SGD", (0.04, 0.7, 0.7, 0.7, 0.7)),
        (4, "partly", "decay 5e-4", "SGD", (0.9, 0.6, 0.6, 0.6, 0.56)),
        (4, "partly", "decay 5e-4", "back-matching", (0.7, 0.6, 0.6, 0.73, 0.71)),
    ],
)
def test_the_verdicts_are_those_of_the_numbers(ran, claim, holds, title, name, numbers):
    changed = {**CLAIMED, title: {**CLAIMED[title], name: numbers}}
    assert judged(ran[0]["results"], changed)[0][claim] == holds


@pytest.mark.parametrize("ours", [10.0, 21.0])
def test_the_verdict_on_the_weights(ran, ours):
    assert judged(ran[0]["results"], CLAIMED, weights=ours)[0][5] == "no"


@pytest.mark.parametrize(("rates", "holds"), [((0.1, 0.01), "partly"), ((0.05, 0.01), "no")])
def test_the_verdict_on_the_papers_rates(ran, rates, holds):
    assert judged(ran[0]["results"], CLAIMED, rates)[0][6] == holds


def test_what_short_runs_cannot_tell_is_open(ran):
    assert judged(ran[0]["results"], CLAIMED, epochs=14.0)[0] == ["open"] * 5 + ["yes"] * 2
    assert judged(ran[0]["results"], CLAIMED, epochs=15.0)[0] == ["yes"] * 7


def test_what_the_page_says_of_numbers_like_the_papers(ran):
    holds, page = judged(ran[0]["results"], CLAIMED)
    assert holds == ["yes"] * 7
    assert page.claims[1].measured == (
        "SGD has at most 60.00%, after 10.0 epochs, and in the end 57.00%; back-matching has at "
        "most 70.50%, after 10.0 epochs, and in the end 70.00%"
    )
    assert "differ by +10.50%, the last by +13.00%" in page.claims[2].measured
    assert page.behind[0].startswith(
        "no decay, back-matching: training loss 0.0200 (better: SGD 0.0100)"
    )


def test_a_contest_that_is_missing_leaves_its_claims_open(ran):
    results = ran[0]["results"]
    results = results | {"contests": {"no decay": results["contests"]["no decay"]}}
    whole, part = (
        pages.page(replace(SMOKE, epochs=15.0), r).claims for r in (ran[0]["results"], results)
    )
    assert [claim.claim for claim in part] == [claim.claim for claim in whole]
    assert [number for number, claim in enumerate(part) if claim.holds == "open"] == [3, 4]
    assert {claim.measured for claim in part[3:5]} == {"not run"} and part[:3] == whole[:3]


BAD_OPTIONS = {
    "--channels 6 0": "--channels must be at least 1, got 0",
    "--hidden -3 84": "--hidden must be at least 1, got -3",
    "--sgd-rates 0.1 -1": "--sgd-rates must be positive and finite, got -1",
    "--back-matching-rates 0.1": "--back-matching-rates must be at least --tries, 2, different",
    "--batch-size=1400": "--batch-size 1400 is more than the 1,293 training images of digits",
    "--dataset=cifar10 --data-dir=/no/such/folder": "data_batch_1 is missing",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, capsys, tmp_path):
    command = ["lenet", "--preset=smoke", f"--output={tmp_path}", *options.split()]
    assert BAD_OPTIONS[options] in refused(command, capsys)


def test_presets_are_whole():
    for preset in ("cpu", "paper"):
        settings = LeNet(preset=preset).filled()
        assert [name for name, value in vars(settings).items() if value is None] == ["data_dir"]
        assert settings.tries == 5 and settings.seeds >= 3 and settings.batch_size == 128
    assert settings.epochs == 200 and settings.dataset == "cifar10"
