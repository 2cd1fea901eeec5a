"""CIFAR-10, read from its official Python files: pickles, by an unpickler that trusts none.

Files that went through another program (recompressed images, say) are taken if they have the
official files' structure; the data set's name then says that they are not the official ones.
"""

import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.dataset import (
    DataError,
    Dataset,
    MissingDataError,
    Split,
    cache,
    fetch,
    places,
)

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
MD5 = {  # of the files in the official archive
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
META = "batches.meta"
CLASSES = b"airplane automobile bird cat deer dog frog horse ship truck".split()
IMAGES = 10_000  # of each file
PIXELS = 3 * 32 * 32

# All that the pickles refer to: Python 2's with NumPy 1, and what newer ones write in their place.
GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def load(data_dir: Path | None, download: bool) -> Dataset:
    """Load the 32 x 32 colour images from the first place that has all the files.

    Args:
      data_dir: The only place to look into, which is the folder cifar-10-batches-py or the one
        that it is in; without it, where CQJAX_DATA_DIR says, and the cache.
      download: Whether to fetch the archive (170 MB) into the last of these if none has them.

    Returns:
      The data set; its name tells whether the files are the official ones.

    Raises:
      MissingDataError: If the files are not there.
      DataError: If one of them is bad, or cannot be fetched.
    """
    parents = places(data_dir, cache())
    folders = [folder for parent in parents for folder in (parent, parent / FOLDER)]
    for folder in folders:
        if not _missing(folder):
            return _read(folder)
    wanted = folders[-2] if folders[-2].name == FOLDER else folders[-1]
    if not download:
        nearest = min((wanted, *folders), key=lambda folder: len(_missing(folder)))
        raise MissingDataError(
            f"CIFAR-10 is not in {' or '.join(map(str, parents))}: "
            f"{nearest / _missing(nearest)[0]} is missing; "
            "--data-dir names the folder of its files, --download fetches them"
        )
    _unpack(fetch(URL, ARCHIVE_MD5, wanted.parent), wanted)
    return _read(wanted)


def _missing(folder: Path) -> list[str]:
    return [file for file in (*MD5, META) if not (folder / file).is_file()]


def _unpack(archive: Path, folder: Path) -> None:
    """Take the known files, and nothing else, out of the archive, which is then removed.

    Raises:
      DataError: If it is no such archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for file in (*MD5, META):
                content = tar.extractfile(f"{FOLDER}/{file}")
                if content is None:
                    raise DataError(f"{archive} cannot be unpacked: {FOLDER}/{file} is no file")
                part = folder / f"{file}.part"
                with part.open("wb") as target:
                    shutil.copyfileobj(content, target)
                part.replace(folder / file)
    except (KeyError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error
    archive.unlink()


def _read(folder: Path) -> Dataset:
    """All files of a folder.

    Raises:
      DataError: If one of them is bad; the message names it.
    """
    names = _unpickle(folder / META, (folder / META).read_bytes()).get(b"label_names")
    if names != CLASSES:
        raise DataError(f"{folder / META} has the classes {names}, not CIFAR-10's")
    official, parts = True, []
    for file, md5 in MD5.items():
        content = (folder / file).read_bytes()
        official &= hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
        parts.append(_read_batch(folder / file, content))
    train = Split(*(np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True)))
    name = "CIFAR-10" if official else "CIFAR-10 (not the official files)"
    return Dataset(name, str(folder), train, parts[-1])


def _read_batch(path: Path, content: bytes) -> Split:
    """The images of one file, channels last.

    Raises:
      DataError: If the file does not hold what it should.
    """
    batch = _unpickle(path, content)
    data, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        raise DataError(f"{path} holds no array of bytes as its data")
    if data.shape != (IMAGES, PIXELS):
        raise DataError(f"{path} holds data of shape {data.shape}, not {(IMAGES, PIXELS)}")
    if not isinstance(labels, list) or len(labels) != IMAGES:
        raise DataError(f"{path} does not hold a list of {IMAGES:,} labels")
    for label in labels:
        if type(label) is not int or not 0 <= label <= 9:
            raise DataError(f"{path} holds the label {label!r}; there are ten classes, 0 to 9")
    images = data.reshape(IMAGES, 3, 32, 32).transpose(0, 2, 3, 1)
    images = np.divide(images, 255, order="C", dtype=np.float32)
    return Split(images, np.array(labels, np.int32))


def _unpickle(path: Path, content: bytes) -> dict[bytes, Any]:
    """The dictionary in a pickle of CIFAR-10.

    Raises:
      DataError: If the pickle is damaged, refers to anything unexpected, or holds something else.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}, not a dictionary")
    return value


class _Unpickler(pickle.Unpickler):
    """Builds arrays, strings, numbers and collections of them; refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, as CIFAR-10 never does")
        return super().find_class(module, name)
