"""The data sets of the experiments, as arrays in memory.

Fashion-MNIST is read from its four official files, gzipped or not, wherever they are; the digits
that come with scikit-learn are there always.
"""

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pooch
from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST = {  # the MD5 sums that the data set's authors publish
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

DatasetName = Literal["auto", "fashion_mnist", "digits"]


class DataError(Exception):
    """A data set that is missing or cannot be read; the message names the file."""


class Split(NamedTuple):
    """Images with their labels."""

    images: np.ndarray  # (n, height, width), float32 in [0, 1]
    labels: np.ndarray  # (n,), int32


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of images of ten classes."""

    name: str
    source: str
    train: Split
    test: Split
    classes: int = 10

    def __str__(self) -> str:
        """Name, origin and size, to be read."""
        train, test = len(self.train.labels), len(self.test.labels)
        return f"{self.name} ({self.source}), {train:,} training and {test:,} test images"

    def summary(self) -> dict[str, Any]:
        """The same, to be stored."""
        return {
            "name": self.name,
            "source": self.source,
            "training_images": len(self.train.labels),
            "test_images": len(self.test.labels),
        }


def load(name: DatasetName, data_dir: Path | None, download: bool) -> Dataset:
    """Load a data set.

    Args:
      name: Which; "auto" is Fashion-MNIST where it is found, digits otherwise.
      data_dir: The folder of Fashion-MNIST's files; without it, the places where they may be.
      download: Whether to fetch Fashion-MNIST's files if they are not found.

    Returns:
      The data set.

    Raises:
      DataError: If the data set asked for is not there, or one of its files is bad.
    """
    if name == "digits":
        return digits()
    places = [data_dir] if data_dir else _usual_places()
    for place in places:
        if all(_local_file(place, file) for file in FASHION_MNIST):
            return fashion_mnist(place)
    if download:
        return fashion_mnist(download_fashion_mnist(places[-1]))
    if name == "auto" and data_dir is None:
        return digits()
    missing = [file for file in FASHION_MNIST if not _local_file(places[-1], file)]
    raise DataError(
        f"Fashion-MNIST is not in {' or '.join(map(str, places))}: "
        f"{missing[0]} is missing; --download fetches it"
    )


def digits() -> Dataset:
    """The 1,797 handwritten digits, 8 x 8, that scikit-learn bundles; a fifth are for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = (
        Split(images[part], labels[part].astype(np.int32))
        for part in np.split(order, [len(images) * 4 // 5])
    )
    return Dataset("digits", "scikit-learn", train, test)


def fashion_mnist(folder: Path) -> Dataset:
    """Fashion-MNIST's 28 x 28 images from the official files in a folder."""
    train, test = (_read_split(folder, prefix) for prefix in ("train", "t10k"))
    return Dataset("Fashion-MNIST", str(folder), train, test)


def download_fashion_mnist(folder: Path) -> Path:
    """Fetch the official files into a folder; a file is there only once its checksum is right.

    Raises:
      DataError: If a file cannot be fetched, or is not the official one.
    """
    files = pooch.create(folder, FASHION_MNIST_URL, registry=FASHION_MNIST)
    columns = TextColumn("{task.description}"), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        for file in FASHION_MNIST:
            bar: Any = _DownloadBar(progress, file)  # pooch declares neither as it uses them
            downloader: Any = pooch.HTTPDownloader(progressbar=bar)
            try:
                files.fetch(file, downloader=downloader)
            except (OSError, ValueError) as error:  # no connection; a wrong checksum
                raise DataError(f"cannot download {files.get_url(file)}: {error}") from error
    return folder


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
      path: The file.
      dimensions: How many axes its array must have.

    Returns:
      The array, uint8.

    Raises:
      DataError: If it cannot be read, or is not exactly what its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    magic, header = 0x0800 + dimensions, 4 * (1 + dimensions)
    if len(content) < header or int.from_bytes(content[:4], "big") != magic:
        raise DataError(
            f"{path} is not an IDX file of bytes with {dimensions} axes (magic {magic})"
        )
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} should hold {math.prod(shape):,} bytes of data for the shape {shape}, "
            f"but holds {len(content) - header:,}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


class _DownloadBar:
    """What pooch wants of a progress bar, drawn by Rich."""

    def __init__(self, progress: Progress, description: str):
        self._progress = progress
        self._task = progress.add_task(description, total=None)

    @property
    def total(self) -> float | None:
        return self._progress.tasks[self._task].total

    @total.setter
    def total(self, size: int) -> None:
        self._progress.update(self._task, total=size)

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop_task(self._task)


def _usual_places() -> list[Path]:
    """Folders that may hold Fashion-MNIST; the last one is the download cache."""
    chosen = os.environ.get("CQJAX_DATA_DIR")
    cache = Path(pooch.os_cache("cqjax")) / "fashion-mnist"
    return [*([Path(chosen)] if chosen else []), DEBIAN_FASHION_MNIST, cache]


def _local_file(folder: Path, name: str) -> Path | None:
    """The file of this name, or what it is once unpacked."""
    candidates = (folder / name, folder / name.removesuffix(".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_split(folder: Path, prefix: str) -> Split:
    images_path, labels_path = (
        _local_file(folder, f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )
    assert images_path and labels_path
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28) or not len(images):
        raise DataError(f"{images_path} holds an array {images.shape}, not 28 x 28 images")
    if len(labels) != len(images):
        raise DataError(f"{labels_path} holds {len(labels):,} labels for {len(images):,} images")
    if labels.max() > 9:
        raise DataError(f"{labels_path} holds the label {labels.max()}; there are ten classes")
    return Split((images / np.float32(255)).astype(np.float32), labels.astype(np.int32))
