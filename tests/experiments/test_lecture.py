"""The homework's network, training and pruning, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from judged_experiment import check_figure, check_page, refused, run

from experiments import homework
from experiments.training import shuffled_batches

STEPS, SEEDS = 80, 2


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lecture")
    return *run("lecture", folder), folder


def forward(layers, x):
    inputs = [x]
    for w, b in layers[:-1]:
        inputs.append(1 / (1 + np.exp(-(inputs[-1] @ w + b))))
    return inputs, (inputs[-1] @ layers[-1][0] + layers[-1][1])[:, 0]


def backpropagated(layers, x, t, loss):
    """The homework's derivation: each layer's gradient, in float64."""
    inputs, o = forward(layers, x)
    dz = {"squared": 2 * (o - t), "hinge": np.where(1 - t * o > 0, -t, 0)}[loss] / len(t)
    dz, grads = dz[:, None], []
    for (w, _), a in zip(layers[::-1], inputs[::-1], strict=True):
        grads.append((a.T @ dz, dz.sum(axis=0)))
        dz = (dz @ w.T) * a * (1 - a)
    return grads[::-1]


def start(seed, kind, first):
    key = jax.random.split(jax.random.key(0), SEEDS)[seed]
    params, examples = homework.setting(key, kind, first)
    return jax.tree.map(np.float64, params), tuple(map(np.float64, examples))


@pytest.mark.parametrize("loss", ["squared", "hinge"])
@pytest.mark.parametrize("case", [("around", "random"), ("apart", "Xavier")])
def test_sgd_is_the_derived_backpropagation(ran, loss, case):
    kind, first = case
    found = ran[0]["results"]["training"][loss]["SGD"][kind][first]
    for seed in range(SEEDS):
        layers, (x, t) = start(seed, kind, first)
        for batch in shuffled_batches(seed, 200, 20, STEPS):
            grads = backpropagated(layers, x[batch], t[batch], loss)
            rate = found["rate"]
            layers = [
                (w - rate * dw, b - rate * db)
                for (w, b), (dw, db) in zip(layers, grads, strict=True)
            ]
        _, o = forward(layers, x)
        losses = {"squared": (t - o) ** 2, "hinge": np.maximum(0, 1 - t * o)}[loss]
        last = {name: values[seed] for name, values in found["last"].items()}
        assert last["training_loss"] == pytest.approx(losses[:200].mean(), rel=1e-3)
        assert last["validation_loss"] == pytest.approx(losses[200:400].mean(), rel=1e-3)
        assert last["accuracy"] == pytest.approx((o * t > 0)[400:].mean(), abs=2e-3)
        squares = sum(np.sum(w**2) + np.sum(b**2) for w, b in layers)
        assert last["squared_norm"] == pytest.approx(squares, rel=1e-3)


def test_rates_are_those_of_the_least_validation_loss(ran):
    for loss in ("squared", "hinge"):
        for method, rates in homework.RATES.items():
            result = ran[0]["results"]["training"][loss][method]
            for found in (result[k][f] for k in ("apart", "around") for f in ("zeros", "Xavier")):
                tuning = [np.inf if value is None else value for value in found["tuning"]]
                assert len(tuning) == 6 and found["rate"] == rates[int(np.argmin(tuning))]


def test_neurons_that_start_equal_stay_equal_by_gradients(ran):
    training = ran[0]["results"]["training"]["squared"]
    for method in ("SGD", "momentum", "Adam"):
        assert max(training[method]["apart"]["zeros"]["unequal"]) < 1e-6
        assert min(training[method]["apart"]["random"]["unequal"]) > 0.1


def test_l2_shrinks_the_weights(ran):
    decays = ran[0]["results"]["decays"]
    norms = [np.median(last["squared_norm"]) for last in decays["last"]]
    assert decays["decays"][0] == 0 and norms[-1] < 0.1 * norms[0]
    assert decays["curves"]["squared_norm"][0][-1] == pytest.approx(norms[0], rel=1e-5)


@pytest.fixture
def params():
    weights = np.random.default_rng(0).normal(size=39)
    shapes = list(zip(homework.SIZES, homework.SIZES[1:], strict=False))
    parts = np.split(weights, np.cumsum([a * b for a, b in shapes])[:-1])
    return weights, [
        (jnp.array(part.reshape(shape)), jnp.zeros(shape[1]))
        for part, shape in zip(parts, shapes, strict=True)
    ]


def test_the_smallest_weights_are_removed_wherever_they_are(params):
    weights, layers = params
    small = homework.smallest(layers, jnp.array(15))
    left = np.concatenate([np.ravel(w) for w, _ in homework.without(layers, small)])
    expected = np.where(np.abs(weights) < np.sort(np.abs(weights))[15], 0, weights)
    np.testing.assert_allclose(left, expected, rtol=1e-6)
    assert not any(b.any() for _, b in small)


def test_small_weights_decay_and_others_are_trained(params):
    _, layers = params
    small = homework.smallest(layers, jnp.array(15))
    rule = homework.shrinking(optax.sgd(0.5), small, 0.1)
    grads = jax.tree.map(jnp.ones_like, layers)
    updates, _ = rule.update(grads, rule.init(layers), layers)
    for (s, _), (w, _), (new, bias) in zip(
        small, layers, optax.apply_updates(layers, updates), strict=True
    ):
        np.testing.assert_allclose(new, np.where(s, 0.9 * np.array(w), w - 0.5), rtol=1e-6)
        np.testing.assert_allclose(bias, -0.5)


def test_pruning_starts_with_what_is_left_of_the_network(ran):
    result = ran[0]["results"]["pruning"]["Adam"]
    assert result["removed"] == [4, 8, 12, 16, 20, 23, 27, 31, 35]
    assert np.shape(result["at_once"]) == (SEEDS, 9, 4)
    assert np.shape(result["by_and_by"]) == (SEEDS, 9)
    adam = ran[0]["results"]["training"]["squared"]["Adam"]["around"]["random"]
    assert result["whole"] == pytest.approx(adam["last"]["accuracy"], abs=2e-3)
    ours = ran[0]["results"]["pruning"]["C-SGD"]["at_once"]
    for one, other in zip(result["at_once"], ours, strict=True):  # before it is retrained
        assert np.transpose(one)[0] == pytest.approx(np.transpose(other)[0])


def test_the_page_and_the_figures(ran):
    content, page, folder = ran
    check_page(content, page, claims=9)
    for figure in ("training", "initialisation", "regularisation", "pruning"):
        check_figure(folder / f"{figure}.png", panels=2)


@pytest.mark.parametrize("option", ["--steps=30", "--seeds=0", "--retraining=0"])
def test_bad_options(option, capsys):
    assert f"{option.split('=')[0]} must be" in refused(["lecture", option], capsys)
