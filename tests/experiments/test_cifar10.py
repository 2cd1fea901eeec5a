"""CIFAR-10's reader, against small files in the official format, damaged ones and hostile ones."""

import hashlib
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from experiments.data import DataError, MissingDataError, cifar10

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


@pytest.fixture
def folder(cifar10_folder):
    return cifar10_folder


def load(folder):
    return cifar10.load(folder, download=False)


class Python2Pickler(pickle._Pickler):
    """Writes every string as Python 2's, which are bytes."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        content = value if isinstance(value, bytes) else value.encode()
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value):
    """A pickle by Python 2 and NumPy 1: what the official files are."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.mark.parametrize("given", ["the folder", "its parent"])
@pytest.mark.parametrize("dump", [python2_pickle, pickle.dumps], ids=["2", "3"])
def test_reads_the_official_layout(folder, small_cifar10, dump, given):
    for name, value in small_cifar10.items():
        (folder / name).write_bytes(dump(value))
    dataset = load(folder if given == "the folder" else folder.parent)
    assert dataset.source == str(folder)
    for split, names in ((dataset.train, TRAIN), (dataset.test, ["test_batch"])):
        assert (split.images.dtype, split.labels.dtype) == (np.float32, np.int32)
        assert split.images.shape == (40 * len(names), 32, 32, 3)
        for i, name in enumerate(names):
            images = split.images[40 * i : 40 * (i + 1)]
            rows = small_cifar10[name][b"data"]
            for y, x, channel in ((0, 0, 0), (3, 31, 1), (17, 4, 2)):
                expected = rows[:, 1024 * channel + 32 * y + x] / 255
                np.testing.assert_allclose(images[:, y, x, channel], expected, rtol=1e-6)
            labels = small_cifar10[name][b"labels"]
            np.testing.assert_array_equal(split.labels[40 * i : 40 * (i + 1)], labels)


def test_standardised_by_the_training_images(folder):
    dataset = load(folder)
    train, test = dataset.standardised().train.images, dataset.standardised().test.images
    np.testing.assert_allclose(train.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(train.std(axis=(0, 1, 2)), 1, rtol=1e-4)
    x = np.float64(dataset.train.images)
    expected = (dataset.test.images - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2))
    np.testing.assert_allclose(test, expected, atol=1e-5)
    assert train.dtype == test.dtype == np.float32


def test_the_name_says_whether_the_files_are_the_official_ones(folder, small_cifar10, monkeypatch):
    assert load(folder).name == "CIFAR-10 (not the official files)"
    sums = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in cifar10.MD5}
    monkeypatch.setattr(cifar10, "MD5", sums)
    assert load(folder).name == "CIFAR-10"
    (folder / "test_batch").write_bytes(pickle.dumps(small_cifar10["test_batch"]))
    assert load(folder).name == "CIFAR-10 (not the official files)"


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def changed(**entries):
    """Replaces entries of the dictionary that a file holds; None removes them."""

    def damage(content):
        batch = pickle.loads(content, encoding="bytes")
        batch |= {key.encode(): value for key, value in entries.items()}
        return python2_pickle({key: value for key, value in batch.items() if value is not None})

    return damage


def pixels(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


def labels(last):
    return [0] * (40 - 1) + [last]


BAD = {
    "truncated": ("data_batch_2", lambda raw: raw[:-200], "cannot be read"),
    "empty": ("data_batch_2", lambda raw: b"", "cannot be read"),
    "no pickle": ("test_batch", lambda raw: b"P6 32 32 255\n" + raw, "cannot be read"),
    "a list": ("data_batch_5", lambda raw: pickle.dumps([1, 2]), "a list, not a dictionary"),
    "no data": ("data_batch_1", changed(data=None), "no array of bytes"),
    "floats": ("data_batch_1", changed(data=pixels(40, 3072, dtype=float)), "no array of"),
    "fewer images": ("data_batch_4", changed(data=pixels(39, 3072)), "shape (39, 3072)"),
    "smaller images": ("data_batch_4", changed(data=pixels(40, 768)), "shape (40, 768)"),
    "images as such": ("data_batch_4", changed(data=pixels(40, 32, 32, 3)), "(40, 32, 32, 3)"),
    "no labels": ("data_batch_1", changed(labels=None), "a list of 40 labels"),
    "CIFAR-100": ("test_batch", changed(labels=None, fine_labels=labels(99)), "a list of 40"),
    "fewer labels": ("test_batch", changed(labels=[0] * 39), "a list of 40 labels"),
    "an eleventh class": ("data_batch_3", changed(labels=labels(10)), "the label 10"),
    "a negative label": ("data_batch_3", changed(labels=labels(-1)), "the label -1"),
    "a broken label": ("data_batch_3", changed(labels=labels(0.5)), "the label 0.5"),
    "nested labels": ("data_batch_3", changed(labels=labels([1])), "the label [1]"),
    "other classes": ("batches.meta", changed(label_names=[b"apple"]), "the classes [b'apple']"),
    "no classes": ("batches.meta", changed(label_names=None), "the classes None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(folder, case):
    name, damage, complaint = BAD[case]
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(DataError) as error:
        load(folder)
    assert str(error.value).startswith(str(folder / name))
    assert complaint in str(error.value)


HOSTILE = {
    "os.system": lambda proof: Call(os.system, f"touch {proof}"),
    "open": lambda proof: Call(open, str(proof), "w"),
    "eval": lambda proof: Call(eval, f"open({str(proof)!r}, 'w')"),
    "getattr": lambda proof: Call(getattr, np.ndarray, "tofile"),
    "a function of NumPy": lambda proof: Call(np.save, str(proof), 1),
}


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_a_hostile_pickle_is_refused_and_does_nothing(folder, tmp_path, case, protocol, name):
    proof = tmp_path / "proof.npy"
    call = HOSTILE[case](proof)
    (folder / name).write_bytes(pickle.dumps({b"data": call}, protocol))
    with pytest.raises(DataError) as error:
        load(folder)
    assert f".{call.call[0].__name__}, as CIFAR-10 never does" in str(error.value)
    assert str(error.value).startswith(str(folder / name))
    assert not proof.exists()


def test_without_cifar10_the_error_says_what_to_do(cache):
    with pytest.raises(MissingDataError, match="--data-dir .*--download") as error:
        load(None)
    assert f"{cache}/cifar-10-batches-py/data_batch_1 is missing" in str(error.value)


def test_a_missing_file_is_named(folder):
    (folder / "data_batch_3").unlink()
    for place in (folder, folder.parent):
        with pytest.raises(MissingDataError, match=f"{folder}/data_batch_3 is missing"):
            load(place)


def test_the_environment_variable_names_the_folder(folder, cache, monkeypatch):
    monkeypatch.setenv("CQJAX_DATA_DIR", str(folder.parent))
    assert load(None).source == str(folder)


def archive(files, kind=tarfile.REGTYPE):
    """An archive like the official one, with more in it than is wanted."""
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w:gz") as tar:
        for name in ("../escaped", "/tmp/cqjax-escaped", "cifar-10-batches-py/readme.html"):
            tar.addfile(tarfile.TarInfo(name))
        for name, value in files.items():
            content = python2_pickle(value)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size, member.type = len(content), kind
            tar.addfile(member, io.BytesIO(content))
    return result.getvalue()


@pytest.fixture
def serve(server, monkeypatch):
    """Puts an archive on a local server, as the official one."""
    folder, url = server

    def put(content):
        path = folder / "cifar-10-python.tar.gz"
        path.write_bytes(content)
        monkeypatch.setattr(cifar10, "URL", url + path.name)
        monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(content).hexdigest())
        return path

    return put


@pytest.mark.parametrize("place", ["the cache", "the folder", "its parent"])
def test_download_and_find_it_there(serve, cache, small_cifar10, tmp_path, place):
    served, parent = serve(archive(small_cifar10)), tmp_path / "new"
    given = {"the cache": None, "its parent": parent, "the folder": parent / "cifar-10-batches-py"}
    if place == "the cache":
        parent = cache
    assert cifar10.load(given[place], download=True).source == f"{parent}/cifar-10-batches-py"
    served.unlink()
    dataset = cifar10.load(given[place], download=True)
    np.testing.assert_array_equal(dataset.test.labels, small_cifar10["test_batch"][b"labels"])
    found = sorted(path.name for path in parent.rglob("*"))
    assert found == sorted([*small_cifar10, "cifar-10-batches-py"])
    assert not list(tmp_path.rglob("*escaped")) and not os.path.exists("/tmp/cqjax-escaped")


def test_a_download_that_broke_off_leaves_no_data_set(serve, cache, small_cifar10):
    served = serve(archive(small_cifar10))
    served.write_bytes(served.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"cannot download .*cifar-10-python\.tar\.gz"):
        cifar10.load(None, download=True)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    with pytest.raises(MissingDataError):
        load(None)


BAD_ARCHIVES = {
    "a file too few": lambda files: archive({name: files[name] for name in TRAIN}),
    "links": lambda files: archive(files, kind=tarfile.SYMTYPE),
    "no archive": lambda files: b"not found",
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_a_bad_archive_is_named_and_leaves_no_data_set(serve, cache, small_cifar10, case):
    serve(BAD_ARCHIVES[case](small_cifar10))
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz cannot be unpacked"):
        cifar10.load(None, download=True)
    with pytest.raises(MissingDataError):
        load(None)


def test_the_checksums_are_the_published_ones():
    assert cifar10.ARCHIVE_MD5 == "c58f30108f718f92721af3b95e74349a"
    assert all(len(checksum) == 32 for checksum in cifar10.MD5.values())
    assert list(cifar10.MD5) == [*TRAIN, "test_batch"]
