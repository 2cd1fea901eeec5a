"""CIFAR's reader, against small files in the official format, damaged ones and hostile ones."""

import codecs
import hashlib
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from cifar_files import python2_pickle

from experiments.data import DataError, MissingDataError, cifar


def python3_pickle(value):
    """The same by Python 3 for Python 2: bytes are text that is to be encoded."""
    return pickle.dumps(value, protocol=2)


@pytest.mark.parametrize("given", ["the folder", "its parent"])
@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle, pickle.dumps])
def test_reads_the_official_layout(small, dump, given):
    for name, value in small.files.items():
        (small.folder / name).write_bytes(dump(value))
    dataset = small.load(small.folder if given == "the folder" else small.folder.parent)
    assert dataset.source == str(small.folder)
    assert dataset.classes == int(small.name.removeprefix("CIFAR"))
    for split, files in (
        (dataset.train, small.family.train),
        (dataset.test, [small.family.test]),
    ):
        assert (split.images.dtype, split.labels.dtype) == (np.float32, np.int32)
        assert split.images.shape == (40 * len(files), 32, 32, 3)
        for i, file in enumerate(files):
            images = split.images[40 * i : 40 * (i + 1)]
            rows = small.files[file.name][b"data"]
            for y, x, channel in ((0, 0, 0), (3, 31, 1), (17, 4, 2)):
                expected = rows[:, 1024 * channel + 32 * y + x] / 255
                np.testing.assert_allclose(images[:, y, x, channel], expected, rtol=1e-6)
            labels = small.files[file.name][small.family.labels]
            np.testing.assert_array_equal(split.labels[40 * i : 40 * (i + 1)], labels)


def test_standardised_by_the_training_images(small):
    dataset = small.load()
    train, test = dataset.standardised().train.images, dataset.standardised().test.images
    np.testing.assert_allclose(train.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(train.std(axis=(0, 1, 2)), 1, rtol=1e-4)
    x = np.float64(dataset.train.images)
    expected = (dataset.test.images - x.mean(axis=(0, 1, 2))) / x.std(axis=(0, 1, 2))
    np.testing.assert_allclose(test, expected, atol=1e-5)
    assert train.dtype == test.dtype == np.float32


def test_the_name_says_whether_the_files_are_the_official_ones(small, monkeypatch):
    title = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100"}[small.name]
    assert small.load().name == f"{title} (not the official files)"

    def known(file):
        content = (small.folder / file.name).read_bytes()
        return file._replace(md5=hashlib.md5(content).hexdigest())

    train = tuple(known(file) for file in small.family.train)
    family = replace(small.family, train=train, test=known(small.family.test))
    monkeypatch.setattr(cifar, small.name, family)
    assert small.load().name == title
    test = small.family.test.name
    (small.folder / test).write_bytes(pickle.dumps(small.files[test]))
    assert small.load().name == f"{title} (not the official files)"


def test_a_digest_tells_examples_from_others(small):
    digest = small.load().digest()
    assert small.load(small.folder.parent).digest() == digest
    assert small.load().standardised().digest() != digest
    small.last.write_bytes(changed(small, LABELS=labels(1))(small.last.read_bytes()))
    assert small.load().digest() != digest


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def changed(small, **entries):
    """Replaces entries of the dictionary that a file holds; None removes them."""
    keys = {"LABELS": small.family.labels, "NAMES": small.family.label_names}
    entries = {keys.get(key, key.encode()): value for key, value in entries.items()}

    def damage(content):
        batch = pickle.loads(content, encoding="bytes") | entries
        return python2_pickle({key: value for key, value in batch.items() if value is not None})

    return damage


def pixels(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


def labels(last):
    return [0] * (40 - 1) + [last]


def nested(kind):
    """Sixty levels, each with the one below twice: to print it would take for ever."""
    value = kind()
    for _ in range(60):
        value = kind([value, value])
    return value


BAD = {  # of a file with images: what it holds, or what is done to its bytes
    "truncated": (lambda raw: raw[:-200], "cannot be read"),
    "empty": (lambda raw: b"", "cannot be read"),
    "no pickle": (lambda raw: b"P6 32 32 255\n" + raw, "cannot be read"),
    "longer by far": (lambda raw: raw + bytes(300_000), "bytes long, not 293,888 at most"),
    "a list": (lambda raw: pickle.dumps([1, 2]), "holds a list, not a dictionary"),
    "no data": ({"data": None}, "no array of bytes"),
    "floats": ({"data": pixels(40, 3072, dtype=np.float16)}, "no array of"),
    "fewer images": ({"data": pixels(39, 3072)}, "shape (39, 3072), not (40, 3072)"),
    "more images": ({"data": pixels(41, 3072)}, "shape (41, 3072), not (40, 3072)"),
    "smaller images": ({"data": pixels(40, 768)}, "shape (40, 768)"),
    "images as such": ({"data": pixels(40, 32, 32, 3)}, "(40, 32, 32, 3)"),
    "no labels": ({"LABELS": None}, "a list of 40"),
    "other labels": ({"LABELS": None, "coarse_labels": labels(1)}, "a list of 40"),
    "fewer labels": ({"LABELS": [0] * 39}, "a list of 40"),
    "a class too many": ({"LABELS": labels(100)}, "the label 100, not one of 0 to"),
    "a negative label": ({"LABELS": labels(-1)}, "the label -1"),
    "a broken label": ({"LABELS": labels(0.5)}, "the label 0.5"),
    "nested labels": ({"LABELS": labels([1])}, "the label <list>"),
    "an array as labels": ({"LABELS": pixels(40)}, "a list of 40"),
    "an endless label": ({"LABELS": labels(1 << 9999)}, "the label <int>"),
}
BAD_META = {
    "no names": ({"NAMES": None}, "no list of classes, not CIFAR-10"),
    "other classes": ({"NAMES": [b"apple"]}, "a list of 1 names, not CIFAR-10"),
    "one name": ({"NAMES": [b"worm"] * 100}, "CIFAR-10"),
    "an array as names": ({"NAMES": pixels(100)}, "no list of classes"),
    "lists in lists": ({"NAMES": nested(list)}, "CIFAR-10"),
    "no pickle": (lambda raw: raw[1:], "cannot be read"),
}
CASES = [(place, case) for place in ("train", "test") for case in BAD]


@pytest.mark.parametrize(("place", "case"), CASES + [("meta", case) for case in BAD_META])
def test_a_bad_file_is_named_with_what_is_wrong(small, place, case):
    damage, complaint = (BAD_META if place == "meta" else BAD)[case]
    path = {
        "train": small.last,
        "test": small.folder / small.family.test.name,
        "meta": small.folder / small.family.meta,
    }[place]
    damage = changed(small, **damage) if isinstance(damage, dict) else damage
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        small.load()
    assert str(error.value).startswith(f"{path} ")
    assert complaint in str(error.value)
    assert "Put the official file in its place, or remove it and say --download" in str(error.value)


def test_one_of_the_two_is_not_taken_for_the_other(small_cifar, tmp_path):
    """Not even if its files have the other's names."""
    others = small_cifar("CIFAR100")
    for name in small_cifar("CIFAR10"):
        content = others["meta" if name == "batches.meta" else "train"]
        (tmp_path / name).write_bytes(python2_pickle(content))
    with pytest.raises(DataError, match=r"batches\.meta has no list of classes, not CIFAR-10's"):
        cifar.CIFAR10.load(tmp_path, download=False)


HOSTILE = {
    "os.system": lambda proof: Call(os.system, f"touch {proof}"),
    "open": lambda proof: Call(open, str(proof), "w"),
    "eval": lambda proof: Call(eval, f"open({str(proof)!r}, 'w')"),
    "getattr": lambda proof: Call(getattr, np.ndarray, "tofile"),
    "a function of NumPy": lambda proof: Call(np.save, str(proof), 1),
}


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("meta", [False, True])
def test_a_hostile_pickle_is_refused_and_does_nothing(small, tmp_path, case, protocol, meta):
    proof = tmp_path / "proof.npy"
    call = HOSTILE[case](proof)
    path = small.folder / small.family.meta if meta else small.last
    path.write_bytes(pickle.dumps({b"data": call}, protocol))
    with pytest.raises(DataError) as error:
        small.load()
    assert f".{call.call[0].__name__}, as CIFAR never does" in str(error.value)
    assert str(error.value).startswith(str(path))
    assert not proof.exists()


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
INSTRUCTIONS = {  # what is harmless to write, and not to follow
    "a key that takes for ever to hash": (
        b"})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
        "a dictionary that CIFAR never has",
    ),
    "a hundred thousand levels": (b"]" * 100_001 + b"a" * 100_000 + b".", "holds a list"),
    "memory that was never written": (
        b"}U\x04datacnumpy\nndarray\n(M(\x00M\x00\x0ct\x85Rs.",
        "it calls what CIFAR never does",
    ),
    "an array without content": (b"}U\x04data" + RECONSTRUCT + b"s.", "no array of bytes"),
    "a memo of 64 GB": (b"}r\xff\xff\xff\xff.", "no array of bytes"),
    "a string longer than the file": (b"}\x8e" + b"\xff" * 6 + b"\x00\x00abc.", "cannot be read"),
    "no end": (b"}" * 9, "cannot be read"),
    "nothing to take": (b"ss.", "cannot be read"),
}


@pytest.mark.parametrize("case", INSTRUCTIONS)
def test_instructions_that_would_do_harm_are_not_followed(small_cifar, tmp_path, case):
    for name, value in small_cifar("CIFAR10").items():
        (tmp_path / name).write_bytes(python2_pickle(value))
    instructions, complaint = INSTRUCTIONS[case]
    (tmp_path / "test_batch").write_bytes(b"\x80\x02" + instructions)
    with pytest.raises(DataError, match=complaint):
        cifar.CIFAR10.load(tmp_path, download=False)


def test_arrays_by_columns(small):
    """NumPy writes a transposed array by its columns."""
    batch = dict(small.files[small.last.name])
    batch[b"data"] = np.asfortranarray(batch[b"data"])
    small.last.write_bytes(python2_pickle(batch))
    images = small.load().train.images[-40:]
    expected = batch[b"data"].reshape(40, 3, 32, 32).transpose(0, 2, 3, 1) / 255
    np.testing.assert_allclose(images, expected, rtol=1e-6)


def test_bytes_are_encoded_in_one_way_only(small):
    small.last.write_bytes(pickle.dumps(Call(codecs.encode, "a" * 99, "idna")))
    with pytest.raises(DataError, match="it encodes in 'idna', as CIFAR never does"):
        small.load()


def test_without_the_files_the_error_says_what_to_do(small, cache):
    with pytest.raises(MissingDataError, match="--data-dir .*--download") as error:
        small.family.load(None, download=False)
    first = small.family.train[0].name
    assert f"{cache}/{small.family.folder}/{first} is missing" in str(error.value)


def test_a_missing_file_is_named(small):
    small.last.unlink()
    for place in (small.folder, small.folder.parent):
        with pytest.raises(MissingDataError, match=f"{small.last} is missing"):
            small.load(place)


def test_the_environment_variable_names_the_folder(small, cache, monkeypatch):
    monkeypatch.setenv("CQJAX_DATA_DIR", str(small.folder.parent))
    assert small.family.load(None, download=False).source == str(small.folder)


def test_the_formats_are_the_published_ones():
    assert cifar.CIFAR10.md5 == "c58f30108f718f92721af3b95e74349a"
    assert cifar.CIFAR100.md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    for family, counts in ((cifar.CIFAR10, [10_000] * 6), (cifar.CIFAR100, [50_000, 10_000])):
        files = *family.train, family.test
        assert [file.images for file in files] == counts
        assert all(len(file.md5) == 32 for file in files)
        assert family.classes == tuple(sorted(set(family.classes)))
    assert [file.name for file in cifar.CIFAR10.train] == [f"data_batch_{i}" for i in range(1, 6)]
