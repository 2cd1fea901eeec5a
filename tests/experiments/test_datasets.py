"""Fashion-MNIST's reader, against files written here byte by byte; the digits."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments import data
from experiments.data import fashion_mnist

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = fashion_mnist.MD5


def idx(array):
    """An array in the IDX format's bytes."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def images(count, size=28):
    return np.random.default_rng(count).integers(0, 256, (count, size, size), dtype=np.uint8)


def labels(count):
    return np.arange(count, dtype=np.uint8) % 10


FILES = {
    TRAIN_IMAGES: images(12),
    TRAIN_LABELS: labels(12),
    TEST_IMAGES: images(4),
    TEST_LABELS: labels(4),
}


@pytest.fixture
def folder(tmp_path):
    """A small Fashion-MNIST."""
    for name, array in FILES.items():
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
    return tmp_path


@pytest.fixture
def nowhere(cache):
    """A machine without Fashion-MNIST; its empty download cache."""
    return cache / "fashion-mnist"


@pytest.mark.parametrize("packed", [True, False])
def test_reads_the_official_files_packed_or_not(folder, packed):
    if not packed:
        for name in FILES:
            path = folder / name
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    dataset = data.load("fashion_mnist", folder, download=False)
    assert (dataset.name, dataset.source) == ("Fashion-MNIST", str(folder))
    for split, x, y in (
        (dataset.train, FILES[TRAIN_IMAGES], FILES[TRAIN_LABELS]),
        (dataset.test, FILES[TEST_IMAGES], FILES[TEST_LABELS]),
    ):
        assert (split.images.dtype, split.labels.dtype) == (np.float32, np.int32)
        np.testing.assert_allclose(split.images, x / 255.0, rtol=1e-6)
        np.testing.assert_array_equal(split.labels, y)


BAD = {
    "truncated gzip": (TRAIN_IMAGES, lambda raw: raw[:-100], "end-of-stream"),
    "wrong bytes": (TRAIN_IMAGES, lambda raw: raw[:500] + bytes(9) + raw[509:], "CRC check failed"),
    "no deflate": (
        TEST_LABELS,
        lambda raw: raw[:10] + b"\xff" * 9 + raw[19:],
        "invalid block type",
    ),
    "not gzip": (TEST_LABELS, gzip.decompress, "gzip"),
    "empty file": (TEST_LABELS, lambda raw: b"", "not an IDX file"),
    "labels as images": (
        TEST_IMAGES,
        lambda raw: gzip.compress(idx(labels(4))),
        "bytes with 3 axes, which start with 00000803",
    ),
    "images as labels": (
        TRAIN_LABELS,
        lambda raw: gzip.compress(idx(images(12))),
        "starts with 00000803: it is not",
    ),
    "too little data": (TEST_IMAGES, lambda raw: gzip.compress(idx(images(4))[:-1]), "3,135"),
    "too much data": (TEST_IMAGES, lambda raw: gzip.compress(idx(images(4)) + b"0"), "3,137"),
    "fewer labels": (TEST_LABELS, lambda raw: gzip.compress(idx(labels(3))), "3 labels for 4"),
    "far too much": (TEST_IMAGES, lambda raw: gzip.compress(bytes(48_000_000)), "than 47,040,016"),
    "no images": (TEST_IMAGES, lambda raw: gzip.compress(idx(images(0))), "not 28 x 28 images"),
    "other images": (TEST_IMAGES, lambda raw: gzip.compress(idx(images(4, 8))), "28 x 28"),
    "other labels": (TRAIN_LABELS, lambda raw: gzip.compress(idx(labels(12) + 1)), "label 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(folder, case):
    name, damage, complaint = BAD[case]
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError) as error:
        data.load("auto", folder, download=False)
    assert str(path) in str(error.value)
    assert complaint in str(error.value)
    assert "Put the official file in its place, or remove it and say --download" in str(error.value)


def test_the_environment_variable_names_the_folder(folder, nowhere, monkeypatch):
    monkeypatch.setenv("CQJAX_DATA_DIR", str(folder))
    assert data.load("auto", None, download=False).source == str(folder)


def test_auto_without_the_files_is_digits(nowhere):
    assert data.load("auto", None, download=False).name == "digits"


def test_a_part_of_the_files_is_not_a_data_set(folder, nowhere, monkeypatch):
    (folder / TEST_LABELS).unlink()
    monkeypatch.setenv("CQJAX_DATA_DIR", str(folder))
    assert data.load("auto", None, download=False).name == "digits"
    with pytest.raises(data.DataError, match=TEST_LABELS):
        data.load("auto", folder, download=False)


def test_fashion_mnist_asked_for_but_absent_says_how_to_get_it(nowhere):
    with pytest.raises(data.DataError, match="--download") as error:
        data.load("fashion_mnist", None, download=False)
    assert str(nowhere) in str(error.value)


@pytest.fixture
def served(server, monkeypatch):
    """The small Fashion-MNIST on a local server, with its checksums: the folder served."""
    folder, url = server
    checksums = {}
    for name, array in FILES.items():
        content = gzip.compress(idx(array))
        (folder / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "URL", url)
    monkeypatch.setattr(fashion_mnist, "MD5", checksums)
    return folder


def test_download_into_the_cache_and_find_it_there(served, nowhere):
    assert data.load("auto", None, download=True).source == str(nowhere)
    for path in served.iterdir():
        path.unlink()
    dataset = data.load("auto", None, download=True)
    np.testing.assert_array_equal(dataset.test.labels, FILES[TEST_LABELS])


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"?"), Path.unlink])
def test_a_bad_download_is_an_error_and_leaves_no_data_set(served, nowhere, damage):
    damage(served / TEST_IMAGES)
    with pytest.raises(data.DataError, match=f"cannot download .*{TEST_IMAGES}"):
        data.load("auto", None, download=True)
    assert not (nowhere / TEST_IMAGES).exists()
    assert data.load("auto", None, download=False).name == "digits"


@pytest.mark.usefixtures("breaking_off")
def test_a_download_that_breaks_off_leaves_no_data_set(served, nowhere):
    with pytest.raises(data.DataError, match=f"cannot download .*{TRAIN_IMAGES}"):
        data.load("auto", None, download=True)
    assert not [path for path in nowhere.rglob("*") if path.is_file()]
    assert data.load("auto", None, download=False).name == "digits"


def test_the_checksums_are_the_published_ones():
    assert all(len(checksum) == 32 for checksum in fashion_mnist.MD5.values())
    assert fashion_mnist.MD5[TRAIN_IMAGES] == "8d4fb7e6c68d591d4c3dfef9ec88bf0d"


def test_digits_are_split_once_and_all_used():
    dataset = data.load("digits", None, download=False)
    assert [len(split.labels) for split in (dataset.train, dataset.test)] == [1437, 360]
    both = np.concatenate([dataset.train.images, dataset.test.images])
    assert both.dtype == np.float32 and both.min() == 0 and both.max() == 1
    rows = np.sort(load_digits().data, axis=0)
    np.testing.assert_array_equal(np.sort(both.reshape(-1, 64) * 16, axis=0), rows)
    for split in (dataset.train, dataset.test):
        assert np.bincount(split.labels, minlength=10).min() > len(split.labels) / 20
    again = data.load("digits", None, download=False)
    np.testing.assert_array_equal(dataset.test.labels, again.test.labels)


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist"
)
def test_the_real_fashion_mnist():
    dataset = data.load("fashion_mnist", fashion_mnist.DEBIAN, download=False)
    assert dataset.train.images.shape == (60_000, 28, 28)
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    assert dataset.train.images.mean() == pytest.approx(0.2860, abs=1e-4)  # as is well known
