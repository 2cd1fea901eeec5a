"""The contest with and without batch normalisation: its parts, a small run of it, its claims."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from judged_experiment import check_figure, check_page, refused, run, untimed

import cqjax
from experiments import data
from experiments.data import Dataset, Split
from experiments.models import ResNet
from experiments.resnet20 import VARIANTS, Resnet20, consequential
from experiments.training import shuffled_batches

SMOKE = Resnet20(preset="smoke").filled()
NINE = [form for name in ("SGD", "Nesterov", "Adam") for form in (name, f"{name}-BN", f"C-{name}")]


def images(n, seed):
    rng = np.random.default_rng(seed)
    return Split(rng.uniform(size=(n, 4, 4, 3)).astype(np.float32), np.arange(n, dtype=np.int32))


SMALL = Dataset("small", "random", images(20, 0), images(8, 1))


def entrants(**changes):
    """By name, with what they learn, of all nine and all variants."""
    settings = replace(SMOKE, optimizers=("sgd", "nesterov", "adam"), variants=tuple(VARIANTS))
    ((task, everyone),) = replace(settings, **changes).contests(SMALL).values()
    return task, {entrant.name: entrant for entrant in everyone}


def test_who_learns_what():
    task, everyone = entrants(shrink=2, evaluated=1)
    assert list(everyone)[:9] == NINE and len(everyone) == 9 + len(VARIANTS)
    means = SMALL.train.images.astype(np.float64).reshape(20, 2, 2, 2, 2, 3).mean(axis=(2, 4))
    for name, entrant in everyone.items():
        bound = 0.5 if name.startswith("C-") and "±1" not in name else 1.0
        train, validation, test = entrant.task.parts
        np.testing.assert_allclose(train.images, bound * (2 * means[:18] - 1), atol=1e-6)
        np.testing.assert_array_equal(validation.labels, [18])
        assert len(test.labels) == 1 and len(train.labels) == 18
        assert entrant.task.model.batch_norm == name.endswith("-BN")
        variant = name not in NINE
        ours = "ours" if name.startswith("C-") else "baseline"
        assert entrant.role == ("variant" if variant else ours)
        assert list(entrant.task.watched) == ["train_accuracy"]
    assert task is everyone["SGD"].task


def test_all_forms_start_from_the_same_kernels():
    _, everyone = entrants()
    (plain, none), (normalised, state), (ours, _) = (
        everyone[name].task.start(3) for name in ("SGD", "SGD-BN", "C-SGD")
    )
    assert not none and state["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, plain, normalised)
    jax.tree.map(np.testing.assert_array_equal, plain, ours)
    other = everyone["SGD"].task.start(4)[0]
    assert not np.array_equal(plain["fc"]["kernel"], other["fc"]["kernel"])


def test_small_branches():
    _, everyone = entrants()
    params = everyone["C-SGD"].task.start(3)[0]
    small = everyone["C-SGD, blocks' last kernels / 3 at first"].task.start(3)[0]
    for layer, kernel in params.items():
        expected = np.float64(kernel["kernel"]) / (3 if layer[-5:] == "conv2" else 1)
        np.testing.assert_allclose(small[layer]["kernel"], expected, rtol=1e-6)


def test_rates_of_a_variant_without_momentum_reach_as_far():
    _, everyone = entrants()
    rates = {name: entrant.rates for name, entrant in everyone.items()}
    assert rates["C-SGD, no momentum"] == pytest.approx([20 * r for r in rates["C-SGD"]])
    for words, _ in VARIANTS.values():
        if words != "no momentum":
            assert rates[f"C-SGD, {words}"] == pytest.approx(rates["C-SGD"])


def numpy_updates(grads, rows, rate, name, settings):
    """Updates of two layers in two steps, by rows: X and the outputs' mean gradients Z̄."""
    n, trace, m = 6, {"hidden": 0.0, "fc": 0.0}, settings.momentum
    for grad, row in zip(grads, rows, strict=True):
        updates = {}
        for layer, g in grad.items():
            moment = row[layer].T @ row[layer]
            d = len(moment)
            damping = settings.damping + settings.relative_damping * np.trace(moment) / d
            moment += damping * np.eye(d)

            def ours(h, moment=moment):
                return n * np.linalg.solve(moment, h)

            incoming = g if settings.momentum_first else ours(g)
            trace[layer] = incoming + m * trace[layer]
            step = incoming + m * trace[layer] if name == "nesterov" else trace[layer]
            step = ours(step) if settings.momentum_first else step
            updates[layer] = -rate * step * (settings.last_layer if layer == "fc" else 1)
    return updates


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sgd", {}),
        ("nesterov", {}),
        ("sgd", {"momentum_first": True}),
        ("sgd", {"momentum": 0.0, "last_layer": 1.0, "damping": 0.3}),
        ("nesterov", {"damping": 0.0, "relative_damping": 0.1}),
    ],
)
def test_the_c_forms(name, changes):
    rng, settings = np.random.default_rng(0), replace(SMOKE, **changes)
    params = {"hidden": {"w": rng.normal(size=(3, 4))}, "fc": {"w": rng.normal(size=(4, 2))}}
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    optimizer = consequential(name, 0.1, settings)
    state, grads, rows, updates = optimizer.init(params), [], [], {}
    for _ in range(2):
        x, y = (rng.normal(size=(6, d)).astype(np.float32) for d in (3, 2))

        def loss_fn(p, x=x, y=y):
            hidden = jnp.tanh(x @ p["hidden"]["w"])
            return 0.5 * jnp.mean(jnp.sum((hidden @ p["fc"]["w"] - y) ** 2, axis=-1))

        _, grad, captures = cqjax.value_and_grad(loss_fn, batch_size=6)(params)
        updates, state = optimizer.update(grad, state, params, captures=captures)
        w, v = (np.float64(params[layer]["w"]) for layer in ("hidden", "fc"))
        hidden = np.tanh(x @ w)
        error = (hidden @ v - y) / 6
        grads.append({"hidden": x.T @ (error @ v.T * (1 - hidden**2)), "fc": hidden.T @ error})
        rows.append({"hidden": np.float64(x), "fc": hidden})
    for layer, update in numpy_updates(grads, rows, 0.1, name, settings).items():
        np.testing.assert_allclose(updates[layer]["w"], update, rtol=2e-3, atol=1e-4)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON file, the page, the folder, the lines of metrics.jsonl by run."""
    folder = tmp_path_factory.mktemp("resnet20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.pipeline.measure", untimed)
        content, page = run("resnet20", folder)
    lines = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        lines.setdefault(line["run"], []).append(line)
    return content, page, folder, lines


@pytest.fixture(scope="module")
def held(ran):
    return ran[0]["results"]["contests"]["ResNet-8"]


def by_hand(batch_norm, bound, rate, seed, steps, ours):
    """The validation loss after training in a plain loop."""
    digits = data.load("digits", None, download=False)
    x, y = bound * (2 * digits.train.images[..., None] - 1), digits.train.labels
    model = ResNet(8, 2, 10, batch_norm)
    variables = model.init(jax.random.key(seed), x[:1])
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    trace = jax.tree.map(jnp.zeros_like, params)

    def loss_fn(params, rest, x, y):
        logits, rest = model.apply({"params": params, **rest}, x, True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), rest

    @jax.jit
    def step(params, rest, trace, x, y):
        if ours:
            differentiate = cqjax.value_and_grad(loss_fn, has_aux=True, batch_size=128)
            (_, rest), grads, captures = differentiate(params, rest, x, y)
            tx = cqjax.csgd(1.0, damping=0.03, relative_damping=0.0, max_change=None)
            grads, _ = tx.update(grads, tx.init(params), params, captures=captures)
            grads = jax.tree.map(jnp.negative, grads)
        else:
            (_, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, x, y)
        trace = jax.tree.map(lambda t, g: 0.95 * t + g, trace, grads)
        rates = {layer: rate * (0.1 if ours and layer == "fc" else 1) for layer in params}
        params = {
            layer: {"kernel": params[layer]["kernel"] - rates[layer] * trace[layer]["kernel"]}
            for layer in params
        }
        return params, rest, trace

    for batch in shuffled_batches(seed, 1293, 128, steps):
        params, rest, trace = step(params, rest, trace, x[batch], y[batch])
    logits = model.apply({"params": params, **rest}, x[1293:1393])
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, y[1293:1393]).mean())


@pytest.mark.parametrize(
    ("name", "batch_norm", "bound"), [("SGD-BN", True, 1.0), ("C-SGD", False, 0.5)]
)
def test_a_run_is_one_by_hand(held, name, batch_norm, bound):
    entrant = held["entrants"][name]
    ours, rate = name == "C-SGD", entrant["rate"]
    expected = by_hand(batch_norm, bound, rate, 1, 20, ours)
    assert entrant["runs"][0]["validation_loss"] == pytest.approx(expected, rel=2e-2)


def test_the_best_variant_runs_and_the_other_is_tuned_only(held, ran):
    assert list(held["entrants"]) == NINE[:3]
    assert list(held["variants"]) == ["C-SGD, inputs in ±1", "C-SGD, momentum before the C-update"]
    least = {}
    for name, variant in held["variants"].items():
        tried = {
            at["rate"]: ran[3][f"{name} {at['rate']:g}, tuning"][0] for at in variant["tuning"]
        }
        assert variant["rate"] == min(tried, key=lambda rate: tried[rate]["validation_loss"])
        assert len(tried) == 2 and {line["step"] for line in tried.values()} == {5}
        assert f"| {name} | " in ran[1]
        least[name] = tried[variant["rate"]]["validation_loss"]
    best = min(least, key=least.get)
    for name, variant in held["variants"].items():
        label = f"{name} {variant['rate']:g}, seed 1"
        assert ("runs" in variant) == (label in ran[3]) == (name == best)
    end = ran[3][f"{best} {held['variants'][best]['rate']:g}, seed 1"][-1]["train_loss"]
    assert f"| {best} | {held['variants'][best]['rate']:g} | {end:.4f} | " in ran[1]


def test_the_page_and_its_figures(ran, held):
    content, page, folder, lines = ran
    check_page(content, page, claims=7)
    for figure, panels in {"steps.png": 2, "seconds.png": 2, "variants.png": 2}.items():
        check_figure(folder / figure, panels)
        assert f"({figure})" in page
    last = {name: lines[f"{name} {e['rate']:g}, seed 1"] for name, e in held["entrants"].items()}
    goal = last["SGD-BN"][-1]["train_loss"]
    steps = next((a["step"] for a in last["C-SGD"] if a["train_loss"] <= goal), None)
    row = next(line for line in page.splitlines() if line.startswith("| C-SGD | SGD-BN |"))
    assert f" {goal:.4f} | {'∞' if steps is None else steps} |" in row
    for metric in ("train_loss", "train_accuracy", "test_accuracy"):
        assert held["entrants"]["C-SGD"]["runs"][0][metric] == pytest.approx(
            last["C-SGD"][-1][metric], rel=1e-6
        )


BAD_OPTIONS = {
    "--optimizers adam": "--optimizers must have sgd",
    "--optimizers sgd sgd": "none twice",
    "--depth=10": "--depth must be 6n + 2, 8 or more, got 10",
    "--csgd-rates 0.1 0.1": "--csgd-rates must be at least --tries, 2, different rates",
    "--momentum=1": "--momentum must be at least 0 and less than 1",
    "--damping=0": "--damping must be positive, or --relative-damping",
    "--damping=-1": "--damping must be finite and not negative",
    "--evaluated=0": "--evaluated must be at least 1",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, capsys, tmp_path):
    command = ["resnet20", "--preset=smoke", f"--output={tmp_path}", *options.split()]
    assert BAD_OPTIONS[options] in refused(command, capsys)


def test_presets_are_whole():
    for preset in ("cpu", "paper"):
        settings = Resnet20(preset=preset).filled()
        missing = [name for name, value in vars(settings).items() if value is None]
        assert missing == ["data_dir"] and settings.depth == 20 and settings.batch_size == 128
        assert len(settings.optimizers) == 3 and len(settings.variants) == len(VARIANTS)
        assert settings.tries >= 3 and settings.seeds >= 3
