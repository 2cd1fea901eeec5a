"""The examples of the gallery run, at small size, and train."""

import importlib.util
import pathlib

import matplotlib
import numpy as np
import pytest

import cqjax

EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDS = {"equinox_mlp": "equinox", "haiku_mlp": "haiku", "keras_cnn": "keras"}
STEPS = {"nnx_language_model": 12, "lora": 12}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_trains(path, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    curves = example.main(steps=STEPS.get(path.stem, 20))
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 5_000
    for losses in curves.values() if isinstance(curves, dict) else [curves]:
        assert np.isfinite(losses).all()
        assert np.mean(losses[-3:]) < 0.95 * losses[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_has_a_page(path):
    """The pages include the files themselves: there is one source."""
    assert len(path.read_text().splitlines()) <= 80
    assert path.read_text().count("\n\ndef main(steps=") == 1
    docs = path.parents[1] / "docs"
    pages = [page.read_text() for page in docs.rglob("*.md")]
    assert any(f"examples/{path.name}" in page and "literalinclude" in page for page in pages)
    assert (docs / "images" / "gallery" / f"{path.stem}.png").exists()


def test_there_is_one_for_each_framework():
    assert len(EXAMPLES) >= 12
    assert hasattr(cqjax, "nnx")
