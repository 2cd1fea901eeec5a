"""Fashion-MNIST, read from its four official files, gzipped or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments.data.dataset import (
    BadFileError,
    Dataset,
    MissingDataError,
    Split,
    cache,
    fetch,
    places,
)

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {  # as the data set's authors publish them
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
LARGEST = 16 + 60_000 * 28 * 28  # bytes of the largest file, unpacked
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def load(data_dir: Path | None, download: bool) -> Dataset:
    """Load the 28 x 28 images from the first place that has all four files.

    Args:
      data_dir: The only folder to look into. Without it, the folder that CQJAX_DATA_DIR names, the
        one where Debian puts the files, and the cache.
      download: Whether to fetch the files if they are in none of these folders.

    Returns:
      The data set.

    Raises:
      MissingDataError: If the files are not there.
      DataError: If one of them is bad, or cannot be fetched.
    """
    folders = places(data_dir, DEBIAN, cache() / "fashion-mnist")
    for folder in folders:
        if not _missing(folder):
            return _read(folder)
    if not download:
        raise MissingDataError(
            f"Fashion-MNIST is not in {' or '.join(map(str, folders))}: "
            f"{_missing(folders[-1])[0]} is missing; --download fetches it"
        )
    for file, md5 in MD5.items():
        fetch(URL + file, md5, folders[-1])
    return _read(folders[-1])


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
      path: The file.
      dimensions: How many axes its array must have.

    Returns:
      The array, uint8.

    Raises:
      BadFileError: If it cannot be read, or is not exactly what its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadFileError(path, f"cannot be read: {error}") from error
    if len(content) > LARGEST:
        raise BadFileError(path, f"holds more than {LARGEST:,} bytes, as no official file does")
    magic, header = 0x0800 + dimensions, 4 * (1 + dimensions)
    if len(content) < header or int.from_bytes(content[:4], "big") != magic:
        start = content[:4].hex() or "nothing"
        raise BadFileError(
            path,
            f"starts with {start}: it is not an IDX file of bytes with {dimensions} axes, which "
            f"start with {magic:08x}",
        )
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - header != math.prod(shape):
        raise BadFileError(
            path,
            f"should hold {math.prod(shape):,} bytes of data for the shape {shape}, "
            f"but holds {len(content) - header:,}",
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _missing(folder: Path) -> list[str]:
    return [file for file in MD5 if not _local_file(folder, file)]


def _local_file(folder: Path, name: str) -> Path | None:
    """The file of this name, or the same file unpacked."""
    candidates = (folder / name, folder / name.removesuffix(".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read(folder: Path) -> Dataset:
    train, test = (_read_split(folder, prefix) for prefix in ("train", "t10k"))
    return Dataset("Fashion-MNIST", str(folder), train, test)


def _read_split(folder: Path, prefix: str) -> Split:
    images_path, labels_path = (
        _local_file(folder, f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )
    assert images_path and labels_path
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28) or not len(images):
        raise BadFileError(images_path, f"holds an array {images.shape}, not 28 x 28 images")
    if len(labels) != len(images):
        raise BadFileError(labels_path, f"holds {len(labels):,} labels for {len(images):,} images")
    if labels.max() > 9:
        raise BadFileError(
            labels_path, f"holds the label {labels.max()}; there are ten classes, 0 to 9"
        )
    return Split((images / np.float32(255)).astype(np.float32), labels.astype(np.int32))
