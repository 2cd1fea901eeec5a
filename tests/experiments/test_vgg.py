"""The contests of VGG networks, run small: by hand, and what the page makes of their numbers."""

import gc
import json
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run, untimed

from experiments import data
from experiments.augmentation import augmenter
from experiments.data import Dataset, Split
from experiments.models import VGG
from experiments.pages import vgg as pages
from experiments.training import State, shuffled_batches, train
from experiments.vgg import OF_DATA, Vgg

NAMES = ["SGD", "LARS", "LSALR", "back-matching"]
FIGURE3 = "VGG-11 as in Fig. 3"
IMAGES, STEPS = 540, 10
SMOKE = Vgg(preset="smoke").filled()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON file, the page, the folder."""
    folder = tmp_path_factory.mktemp("vgg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pipeline.measure", untimed)
        return *run("vgg", folder), folder


def layerwise(name, kernels, grads):
    """What each layer's gradient is multiplied by; the paper's Algorithm 1 comes to two norms."""
    norm = {layer: np.sqrt((kernel**2).sum()) for layer, kernel in kernels.items()}
    size = {layer: np.sqrt((grad**2).sum()) for layer, grad in grads.items()}
    return {
        layer: {
            "SGD": 1.0,
            "LARS": 1e-3 * norm[layer] / size[layer],
            "LSALR": 1 + np.log(1 + 1 / size[layer]),
            "back-matching": norm[layer] ** 2 / norm["fc"] ** 2,
        }[name]
        for layer in kernels
    }


@pytest.fixture(scope="module")
def by_hand():
    """Trains with NumPy's arithmetic around the network's gradients: the batches' losses."""
    images, labels = data.load("digits", None, download=False).train
    images = np.float64(images[:600])
    images = np.float32((images - images.mean()) / images.std())[:IMAGES, ..., None]
    model, augment = VGG(11, 10, 2), augmenter(0, flip=True, degrees=15.0)

    @jax.jit
    @jax.value_and_grad
    def differentiate(params, x, y, number):
        x = augment(number, x)
        logits, _ = model.apply({"params": params}, x, train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def losses(name, rate, decay, seed):
        params = model.init(jax.random.key(seed), images[:1])["params"]
        kernels = {layer: np.float64(leaf["kernel"]) for layer, leaf in params.items()}
        velocity, losses = dict.fromkeys(kernels, 0.0), []
        for number, batch in enumerate(shuffled_batches(seed, IMAGES, 128, STEPS)):
            params = {layer: {"kernel": np.float32(kernel)} for layer, kernel in kernels.items()}
            loss, grads = differentiate(params, images[batch], labels[batch], number)
            grads = {n: np.float64(g["kernel"]) + decay * kernels[n] for n, g in grads.items()}
            factors, fallen = layerwise(name, kernels, grads), 0.2 ** (number // 2)
            if name == "LARS":  # Optax's momentum is of updates at their own rates
                factors, fallen = {n: fallen * factors[n] for n in factors}, 1.0
            for layer, grad in grads.items():
                velocity[layer] = 0.9 * velocity[layer] + factors[layer] * grad
                nesterov = 0.9 * velocity[layer] + factors[layer] * grad
                kernels[layer] -= rate * fallen * nesterov
            losses.append(loss)
        return losses

    return losses


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_by_hand(ran, by_hand, name):
    """Its start, its batches, its augmentation, its layers' rates, its decay, its falling rate."""
    entrant = ran[0]["results"]["contests"]["VGG-11"]["entrants"][name]
    (result,) = entrant["runs"]
    expected = by_hand(name, entrant["rate"], 1e-4 if name == "back-matching" else 5e-4, 1)
    np.testing.assert_allclose(result["history"]["batch_loss"]["value"], expected, rtol=2e-3)


@pytest.mark.parametrize("name", ["SGD", "back-matching"])
def test_figure_3_has_the_same_rate_and_decay_for_both(ran, by_hand, name):
    held = ran[0]["results"]["contests"][FIGURE3]
    assert list(held["entrants"]) == ["SGD", "back-matching"]
    entrant = held["entrants"][name]
    assert [at["rate"] for at in entrant["tuning"]] == [entrant["rate"]] == [0.1]
    (result,) = entrant["runs"]
    expected = by_hand(name, 0.1, 5e-3, 1)
    np.testing.assert_allclose(result["history"]["batch_loss"]["value"], expected, rtol=2e-3)


def test_who_takes_part(ran):
    held = ran[0]["results"]["contests"]
    assert list(held) == [FIGURE3, "VGG-11"]
    assert list(held["VGG-11"]["entrants"]) == NAMES
    grids = {
        name: [at["rate"] for at in e["tuning"]] for name, e in held["VGG-11"]["entrants"].items()
    }
    assert grids == {
        "SGD": [0.1, 0.05],
        "LARS": [2, 1],
        "LSALR": [0.1, 0.05],
        "back-matching": [pytest.approx(0.064), pytest.approx(0.032)],  # 32 times the paper's
    }
    images = {"train": IMAGES, "validation": 60, "test": 100, "training_loss": 200}
    assert held["VGG-11"]["images"] == images


def test_runs_of_an_optimizer_share_one_program(ran):
    for held in ran[0]["results"]["contests"].values():
        seconds = [
            {
                *(at["compile_seconds"] for at in entrant["tuning"]),
                *(result["history"]["compile_seconds"] for result in entrant["runs"]),
            }
            for entrant in held["entrants"].values()
        ]
        assert all(len(its) == 1 and min(its) > 0 for its in seconds)
        assert len(set.union(*seconds)) == len(seconds)


def test_programs_go_with_their_step():
    def step(state, images, labels):
        return State(state.params + images.sum(), {}, ()), images.mean()

    examples, batches = (jnp.ones((4, 2)), jnp.ones(4)), np.zeros((3, 2), np.int32)
    kept = weakref.ref(step)
    seconds = []
    for _ in range(2):
        state, history = train(
            step, State(jnp.float32(0), {}, ()), examples, batches, {}, lambda *_: None
        )
        seconds.append(history.compile_seconds)
        assert state.params == 12
    assert seconds[0] == seconds[1] > 0
    del step
    gc.collect()
    assert kept() is None


def test_the_page_and_the_figures(ran):
    content, page, folder = ran
    check_page(content, page, claims=5)
    assert "This is another setting than the source's" in page
    assert [claim["holds"] for claim in content["claims"]] == ["open"] * 5
    assert {claim.holds for claim in judged(content["results"], epochs=29.0).claims} == {"open"}
    times = page.partition("## Time per step")[2].split("\n\n")[1].splitlines()
    assert {line.count("|") for line in times} == {8} and "| – | – |" in times[2]
    assert times[2].startswith(f"| {FIGURE3} |")
    assert "not the official" not in page
    row = content["results"]["contests"]["VGG-11"]["entrants"]["SGD"]["runs"][0]
    assert f"| SGD | {100 * row['test_accuracy']:.1f} | 92.63 |" in page
    check_figure(folder / "losses.png", panels=3)
    check_figure(folder / "figure3.png", panels=2)


def judged(results, **changes):
    """The page's claims, of another outcome and other settings."""
    settings = replace(SMOKE, **({"epochs": 60.0} | changes))
    return pages.page(settings, results)


@pytest.mark.parametrize(
    ("accuracies", "holds"),
    [((0.9, 0.8), "yes"), ((0.9, 0.4), "partly"), ((0.3, 0.4), "no"), ((0.5, 0.5), "yes")],
)
@pytest.mark.parametrize("name", ["CIFAR-10 (not the official files)", "CIFAR-100"])
def test_the_tables_claim(ran, accuracies, holds, name):
    results = json.loads(json.dumps(ran[0]["results"]))
    figure3 = results["contests"].pop(FIGURE3)
    accuracies = *accuracies, *accuracies
    for depth in (13, 16, 19):
        results["contests"][f"VGG-{depth}"] = json.loads(json.dumps(results["contests"]["VGG-11"]))
    for contest, accuracy in zip(results["contests"].values(), accuracies, strict=True):
        for entrant in contest["entrants"].values():
            entrant["runs"][0]["test_accuracy"] = 0.5
        contest["entrants"]["back-matching"]["runs"][0]["test_accuracy"] = accuracy
    results["contests"][FIGURE3] = figure3
    results["dataset"]["name"] = name
    page = judged(results)
    assert page.claims[0].holds == holds
    assert f"VGG-11: {accuracies[0]:.2%}, the best of the others" in page.claims[0].measured
    assert ("almost all" in page.claims[0].claim) == (name != "CIFAR-100")
    rows = page.tables["Test accuracy in percent: here, and in the source"]
    paper = {"CIFAR-100": "75.32"}.get(name, "94.08")
    assert rows[3]["source, VGG-13"] == paper
    assert rows[3]["VGG-13"] == f"{100 * accuracies[1]:.1f}"
    assert ("not the official" in page.summary) == (name != "CIFAR-100")
    del results["contests"]["VGG-19"]
    assert judged(results).claims[0].holds == "open"


def test_a_page_of_figure_3_alone(ran):
    results = json.loads(json.dumps(ran[0]["results"]))
    del results["contests"]["VGG-11"]
    page = judged(results | {"unfinished": ["VGG-11"]})
    assert "**Not finished when this page was made**: the contest VGG-11." in page.summary
    assert page.claims[0].holds == "open" and page.claims[0].measured == "not run"
    assert "open" not in [claim.holds for claim in page.claims[1:]]
    assert "losses.png" not in page.figures


def curve(values):
    return {"step": list(range(16)), "seconds": [0.0] * 16, "value": values}


FALLING = [8, 7, 6.9, 6.8, 5, 4.9, 4.8, 3, 2.9, 2.8, 1, 0.9, 0.8, 0.5, 0.4, 0.3]
WAVING = [0.1, 0.4, 0.2, 0.4, 0.3, 0.5] + [0.5] * 10  # rises of the error: 20 and 10 points
STEADY = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6] + [0.6] * 10


@pytest.mark.parametrize(
    ("ours", "sgd", "holds"),
    [
        ((FALLING, WAVING, 0.62), ([9 + x for x in FALLING], STEADY, 0.6), "yes yes yes yes"),
        ((FALLING, STEADY, 0.605), (FALLING, WAVING, 0.6), "no no partly yes"),
        (([10 - x for x in FALLING], STEADY, 0.5), (FALLING, STEADY, 0.6), "no no no partly"),
        ((FALLING[:4] + [0] * 12, STEADY, 0.6), (FALLING, STEADY, 0.6), "partly no no partly"),
    ],
)
def test_the_claims_of_figure_3(ran, ours, sgd, holds):
    results = json.loads(json.dumps(ran[0]["results"]))
    for name, (losses, accuracies, last) in {"back-matching": ours, "SGD": sgd}.items():
        (result,) = results["contests"][FIGURE3]["entrants"][name]["runs"]
        result["test_accuracy"] = last
        metrics = {"train_loss": curve(losses), "test_accuracy": curve(accuracies)}
        result["history"]["metrics"] |= metrics
    claims = judged(results).claims[1:]
    assert [claim.holds for claim in claims] == holds.split()
    if ours[1] is WAVING:
        assert claims[1].measured.endswith("add up to 30.0 points, SGD's to 0.0")


def test_what_is_learnt():
    """The first images, means of blocks, standardised; the first to validate and test."""
    rng = np.random.default_rng(0)
    train, test = (Split(rng.random((n, 8, 8, 3), np.float32), np.arange(n)) for n in (30, 9))
    settings = replace(SMOKE, train_images=20, shrink=2, evaluated=1, width=1)
    dataset = settings.prepared(Dataset("x", "y", train, test))
    blocks = np.zeros((20, 4, 4, 3))
    for i in range(8):
        for j in range(8):
            blocks[:, i // 2, j // 2] += train.images[:20, i, j] / 4
    expected = (blocks - blocks.mean((0, 1, 2))) / blocks.std((0, 1, 2))
    np.testing.assert_allclose(dataset.train.images, expected, atol=1e-5)
    task, _ = settings.contests(dataset)["VGG-11"]
    assert [part.labels.tolist() for part in task.parts] == [list(range(18)), [18], [0]]
    assert task.augment(jnp.int32(0), jnp.zeros((2, 4, 4, 3))).shape == (2, 4, 4, 3)


@pytest.mark.parametrize(("side", "positions"), [(32, 1), (16, 1), (8, 1), (64, 2)])
def test_pooling_stops_at_one_position(side, positions):
    model = VGG(13, 7, 3)
    images = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert params["fc"]["kernel"].shape == (24 * positions**2, 7)
    assert params["conv1_1"]["kernel"].shape == (3, 3, 3, 3)


BAD_OPTIONS = {
    "--depths": "--depths must have at least one",
    "--depths 11 11": "none twice",
    "--lars-rates 2 2": "--lars-rates must be at least --tries, 2, different rates",
    "--back-matching-rates 1": "--back-matching-rates must be at least --tries, 2, different",
    "--degrees=-1": "--degrees must be finite and not negative, got -1",
    "--momentum=1": "--momentum must be at least 0 and less than 1",
    "--trust-coefficient=0": "--trust-coefficient must be positive",
    "--train-images=1": "--train-images must be at least 2",
    "--batch-size=541": "--batch-size 541 is more than the 540 training images of digits",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, capsys, tmp_path):
    command = ["vgg", "--preset=smoke", f"--output={tmp_path}", *options.split()]
    assert BAD_OPTIONS[options] in refused(command, capsys)


def test_presets_are_whole():
    for preset in ("cpu", "paper"):
        settings = Vgg(preset=preset).filled()
        missing = {name for name, value in vars(settings).items() if value is None}
        assert missing - {"train_images"} == {"data_dir"}
        assert settings.depths == (11, 13, 16, 19)
        assert settings.tries >= 3 and settings.seeds >= 3 and settings.batch_size == 128
    assert settings.width == 64 and settings.epochs == 300
    assert {
        name: (ours["back_matching_rates"][0], ours["our_weight_decay"])
        for name, ours in OF_DATA.items()
    } == {
        "cifar100": (0.1, 5e-3),
        "cifar10": (2e-3, 1e-4),
    }
