"""Inverses of other rows: their algebra against NumPy, and the page."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run

from experiments import kept_methods
from experiments.kept import METHODS, Kept, sequences
from experiments.kept_methods import Batch, State
from experiments.pages import kept as pages

N, D, SKETCH = 48, 5, 8
SETTINGS = Kept(every=2, sketch=SKETCH)


def batch(step):
    keys = jax.random.split(jax.random.key(step), 3)
    x, others = (jax.random.normal(key, (N, D)) for key in keys[:2])
    return Batch(x, others, jnp.bool_(step % 2 == 0), jnp.bool_(step == 0), keys[2])


def steps(method, count):
    """The inverses of a method's first steps."""
    state = State(jnp.eye(D), jnp.zeros((D, D)), jnp.zeros(()))
    for step in range(count):
        inverse, state = kept_methods.METHODS[method](SETTINGS, state, batch(step))
        yield np.float64(inverse)


def inverted(moment):
    return np.linalg.inv(moment + 0.1 * np.trace(moment) / D * np.eye(D))


def moment(x):
    x = np.float64(x)
    return x.T @ x


def averages(moments):
    total = weight = 0
    for new in moments:
        total, weight = 0.9 * total + 0.1 * new, 0.9 * weight + 0.1
        yield total / weight


def expected(method):
    batches = [batch(step) for step in range(3)]
    own = [moment(b.x) for b in batches]
    match method:
        case "exact":
            return map(inverted, own)
        case "another batch":
            return (inverted(moment(b.others)) for b in batches)
        case "kept" | "kept, scaled" | "kept, rows weighed":
            return map(inverted, (own[0], own[0], own[2]))
        case "average":
            return map(inverted, averages(own))
        case "average before":
            return map(inverted, [own[0], *list(averages(own))[:2]])
        case "average of sketches" | "own sketch":
            rows = D if method == "average of sketches" else 2 * D
            sums = [moment(kept_methods.sketch(b.x, rows, b.key)) for b in batches]
            return map(inverted, averages(sums) if rows == D else sums)
        case "kept + sketch":
            s = moment(kept_methods.sketch(batches[1].x, SKETCH, batches[1].key))
            second = 2 * np.linalg.inv(np.linalg.inv(inverted(own[0])) + s)
            return inverted(own[0]), second, inverted(own[2])


@pytest.mark.parametrize("method", kept_methods.METHODS)
def test_inverses_are_numpys(method):
    for found, wanted in zip(steps(method, 3), expected(method), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_sums_of_rows_have_the_rows_moment_in_the_mean():
    x = batch(0).x
    keys = jax.random.split(jax.random.key(1), 4000)
    sums = jax.vmap(lambda key: kept_methods.sketch(x, SKETCH, key))(keys)
    assert sums.shape == (4000, SKETCH, D)
    mean = np.einsum("kmd,kme->de", sums, sums) / 4000
    np.testing.assert_allclose(mean, moment(x), atol=1.5)


def test_an_exact_inverse_bounds_what_outputs_do():
    x, signal = np.array(batch(0).x), np.array(batch(1).x)
    a = inverted(moment(x))
    arrays = map(jnp.asarray, (x, a, a @ x.T @ signal, signal))
    largest, leverage, moved = kept_methods.measure(*arrays)
    hat = x @ a @ x.T
    assert largest == pytest.approx(np.linalg.eigvalsh(hat)[-1], rel=1e-4)
    assert leverage == pytest.approx(hat.diagonal().max(), rel=1e-4)
    assert moved == pytest.approx(np.linalg.norm(hat @ signal) / np.linalg.norm(signal), rel=1e-4)
    assert moved <= largest < 1


def test_sequences_are_parts_of_the_text():
    found = sequences(np.arange(1000), 0, 3, 2)
    assert found.shape == (3, 2, 65)
    assert (np.diff(found) == 1).all() and found.max() < 1000


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    return *run("kept", folder), folder


def test_the_page_and_the_figure(ran):
    content, page, folder = ran
    check_page(content, page, claims=8)
    check_figure(folder / "losses.png", panels=2)
    runs = {run["method"]: run for run in content["results"]["runs"]}
    assert [*runs] == ["Adam", "exact", "kept"]
    assert all(np.shape(run["losses"]) == (1, 4) for run in runs.values())
    assert len({run["losses"][0][0] for run in runs.values()}) == 1  # the same start
    assert all(value[0] < 1.001 for value in runs["exact"]["measured"].values())
    assert any(value[0] > 1.001 for value in runs["kept"]["measured"].values())
    assert runs["kept"]["cost"] < runs["exact"]["cost"]


def test_verdicts_follow_the_numbers():
    def verdicts(**losses):
        settings = dataclasses.replace(SETTINGS, steps=4, seeds=1, sequences=4, blocks=1)
        runs = [
            {
                "method": name,
                "final": [losses.get(name, 2.0)],
                "validation": [2.0],
                "measured": {"w": [0.9, 0.1, 0.5]},
                "cost": 1.0,
                "seconds": 1.0,
            }
            for name in METHODS
        ]
        return [c.holds for c in pages.page(settings, {"characters": 1, "runs": runs}).claims]

    assert verdicts(Adam=3.0)[:2] == ["no", "partly"]
    assert verdicts(Adam=3.0, kept=2.9)[0] == "yes"
    others = {"average before": 2.5, "another batch": 2.3}
    assert verdicts(Adam=3.0, kept=2.9, **others)[:3] == ["yes", "yes", "no"]


@pytest.mark.parametrize("option", ["--steps=0", "--decay=1", "--damping=0"])
def test_bad_options(option, capsys):
    assert f"{option.split('=')[0]} must be" in refused(["kept", option], capsys)


def test_methods_that_are_not_there(capsys):
    message = refused(["kept", "--methods", "Adam", "exact", "best"], capsys)
    assert "--methods has no best" in message
