"""The emulation of accelerators' products rounds what it says; the benchmark's tables appear."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cqjax.linalg import conv_gram, gram, ridge, triangular, windows
from cqjax.transforms import solves
from experiments.__main__ import main
from experiments.benchmarks import bench, precision, rounding
from experiments.benchmarks.bars import Result, Table
from experiments.benchmarks.rounding import emulated
from experiments.data import Dataset, Split
from experiments.models import MLP, ResNet

WINDOW = windows.Window((3, 3), (1, 1), ((1, 1), (0, 2)), (1, 1), (1, 1))


@pytest.fixture(autouse=True, scope="module")
def hasty():
    """Compiling is most of the tests' time: less thoroughly, and nothing twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def bf16(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32), np.float64)


def tf32(x):
    """Ten bits of fraction, to nearest, ties to even: of float32's bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def thrice(product, x, y):
    """Three products of numbers of 8 bits for one of 16."""
    (x0, x1), (y0, y1) = ((bf16(z), bf16(z - bf16(z).astype(np.float32))) for z in (x, y))
    return product(x0, y0) + product(x0, y1) + product(x1, y0)


EXPECTED = {
    "float32": lambda product, x, y: product(np.float64(x), np.float64(y)),
    "TF32": lambda product, x, y: product(tf32(x), tf32(y)),
    "bf16": lambda product, x, y: product(bf16(x), bf16(y)),
    "bf16 ×3": thrice,
}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def distances(found, product, x, y):
    """How far it is from the product as of each format, relative to its largest entry."""
    expected = {name: of(product, x, y) for name, of in EXPECTED.items()}
    return {name: np.abs(found - e).max() / np.abs(e).max() for name, e in expected.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_gram_matrices_are_of_rounded_rows(name):
    x, h, images = normal(1, 6, 40), jnp.ones((1, 6)), normal(3, 5, 4, 2)
    patches = windows.patches(images, WINDOW)
    homogeneous = jnp.concatenate([x, h[..., None]], -1)
    with emulated(name, "a"):
        found = {
            "outer": (gram.outer(x), lambda x, y: x @ y.mT, x),
            "outer with h": (gram.outer(x, h), lambda x, y: x @ y.mT, homogeneous),
            "inner": (gram.inner(x, h), lambda x, y: x.mT @ y, homogeneous),
            "correlation": (conv_gram.correlation(images, WINDOW), lambda x, y: x.mT @ y, patches),
            "patches": (conv_gram.inner(images, WINDOW), lambda x, y: x.mT @ y, patches),
        }
    for what, (matrix, product, rows) in found.items():
        off = distances(np.asarray(matrix), product, rows, rows)
        assert off[name] < 5e-7 < min(off[other] for other in off.keys() - {name}), (what, off)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_scope_rounds_its_own_products(name):
    x, z, h = normal(1, 6, 40), normal(1, 6, 3), jnp.ones((1, 6))
    square = normal(1, 40, 6)[:, :6]
    scopes = {
        "a": [],
        "b": ["product"],
        "c": ["product", "solve", "inverse factors"],
    }
    originals = gram.outer, solves.product, ridge.solve
    for scope, rounded in scopes.items():
        with emulated(name, scope):
            weight, bias = solves.product(x, z, h)
            found = {
                "product": (weight, lambda x, y: x.mT @ y, x, z),
                "solve": (ridge.solve(square, z), lambda x, y: x @ y, square, z),
                "inverse factors": (triangular._product(x, x.mT), lambda x, y: x @ y, x, x.mT),
            }
        for what, (value, *expected) in found.items():
            off, as_of = distances(value, *expected), name if what in rounded else "float32"
            assert off[as_of] < 5e-7 < min(off[o] for o in off.keys() - {as_of}), (what, off)
        off = distances(bias, lambda h, z: (h.mT @ z)[:, 0], h[..., None], z)
        assert off[name if "product" in rounded else "float32"] < 5e-7
    assert (gram.outer, solves.product, ridge.solve) == originals


def test_by_patches():
    def other(*args):
        raise AssertionError

    x = normal(3, 8, 8, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_gram, "correlation", other)
        with emulated(rounding.PATCHES, "a"):
            found = conv_gram.inner(x, WINDOW)
    np.testing.assert_array_equal(found, gram.inner(windows.patches(x, WINDOW)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The part at small sizes, with one format: the JSON, the Markdown."""
    output = tmp_path_factory.mktemp("precision")
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(size=(40, 4, 4)).astype(np.float32), np.arange(40) % 10
    split = Split(images, labels.astype(np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision.data, "load", lambda *_: Dataset("digits", "here", split, split))
        patch.setattr(rounding, "FRACTION", {"bf16": 7})
        mlp = precision.Network(MLP(6, 1, 10), (1e-3,), "b", 4, twice=(False, True))
        residual = precision.Network(ResNet(2, 2, batch_norm=False), (3e-2,), "a", 4)
        patch.setattr(precision, "TRAINED", {"MLP": mlp})
        analysed = {"MLP, batch 4": mlp, "ResNet": residual}
        patch.setattr(precision, "ANALYSED", analysed)
        options = ["--repeats=1", "--compiles=2", f"--output={output}"]
        main(["bench", "--parts", "precision", *options])
    return json.loads((output / "bench.json").read_text()), (output / "bench.md").read_text()


def test_images_twice_have_two_labels():
    batch, labels = np.arange(10, 50), np.arange(60, dtype=np.int32)
    examples, answers = precision._twice(batch, labels, 0)
    np.testing.assert_array_equal(examples, np.tile(np.arange(10, 30), 2))
    np.testing.assert_array_equal(answers[:20], labels[10:30])
    assert 0 < np.mean(answers[20:] != labels[10:30]) < 0.5
    assert set(answers) <= set(labels[10:30])


def test_training_has_its_numbers(run):
    results, text = run
    runs = results["parts"]["precision"]["training"]
    expected = itertools.product(["float32 (a)", "bf16 (b)"], [False, True], [0, 1])
    assert [(run["products"], run["twice"], run["seed"]) for run in runs] == list(expected)
    losses = [run["loss"] for run in runs]
    assert np.isfinite(losses).all() and len(set(losses)) == len(losses)
    assert all(run["fallbacks"] >= 0 for run in runs)
    assert f"| MLP | 0.001 | float32 (a) | {losses[0]:.4g}, {losses[1]:.4g} |" in text
    assert "| MLP, images twice | 0.001 | bf16 (b) |" in text
    assert "training loss after C-SGD's 10 steps, digits" in text


def test_layers_have_their_numbers(run):
    results, text = run
    layers = results["parts"]["precision"]["layers"]
    assert list(layers) == ["MLP, batch 4", "MLP, batch 4, trained", "ResNet"]
    for network, all_ in layers.items():
        assert [found["layer"].split("/")[0] for found in all_] == (
            ["conv", "fc"] if network == "ResNet" else ["Dense_0", "Dense_1"]
        )
        for found in all_:
            smallest, scale = found["smallest"], found["largest"]
            assert smallest["float32"] == pytest.approx(smallest["float64"], abs=1e-6 * scale)
            assert smallest["bf16"] == pytest.approx(smallest["float64"], abs=2e-2 * scale)
            for kind in ("update", "effect"):
                errors = found[kind]
                (rounded,) = (errors[key] for key in errors if key.startswith("bf16"))
                assert errors["float32 (a)"] < 1e-2 * rounded < 1e-2
            assert found["fallbacks"] == []
        scopes = {"float32, by patches (a)", "bf16 (a)"} if network == "ResNet" else {"bf16 (b)"}
        assert all_[0]["update"].keys() == {"float32 (a)"} | scopes
    assert layers["MLP, batch 4"][1]["rows, features"] == [4, 7]
    for words in ("eigenvalues of the matrices", "relative errors against float64", "bf16 (b)"):
        assert words in text


def test_without_bars_there_is_no_table_of_them(tmp_path, monkeypatch, capsys):
    table = Table("numbers", [{"what": "pages", "number": "12"}])
    monkeypatch.setitem(bench.PARTS, "precision", lambda effort: Result({}, [table], []))
    main(["bench", "--parts", "precision", f"--output={tmp_path}"])
    text = (tmp_path / "bench.md").read_text()
    assert "bars" not in text and "| pages | 12 |" in text
    assert "held?" not in capsys.readouterr().out
