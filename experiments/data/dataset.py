"""Data sets of images: their arrays, the places of their files, and how these are fetched."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn


class DataError(Exception):
    """A data set is missing or cannot be read. The message names the file."""


class MissingDataError(DataError):
    """A data set is in none of the places where it may be."""


class BadFileError(DataError):
    """A file is not what it should be."""

    def __init__(self, path: Path, what: str):
        super().__init__(
            f"{path} {what}. Put the official file in its place, or remove it and say --download"
        )


class Split(NamedTuple):
    """Images with their labels."""

    images: np.ndarray  # (n, height, width) or (n, height, width, channels), float32 in [0, 1]
    labels: np.ndarray  # (n,), int32


@dataclass(frozen=True)
class Dataset:
    """Images to train on and images to test, with their classes."""

    name: str
    source: str
    train: Split
    test: Split
    classes: int = 10

    def __str__(self) -> str:
        """Name, origin and size, as a sentence."""
        train, test = len(self.train.labels), len(self.test.labels)
        return f"{self.name} ({self.source}), {train:,} training and {test:,} test images"

    def summary(self) -> dict[str, Any]:
        """Name, origin, size and checksum, to be stored."""
        return {
            "name": self.name,
            "source": self.source,
            "training_images": len(self.train.labels),
            "test_images": len(self.test.labels),
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """A checksum of its examples, wherever they came from."""
        content = hashlib.blake2b(digest_size=16)
        for array in (*self.train, *self.test):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a batch of more images than there are.

        Raises:
          DataError: If the batch is too large.
        """
        count = len(self.train.labels)
        if batch_size > count:
            raise DataError(
                f"--batch-size {batch_size} is more than the {count:,} training images of "
                f"{self.name}"
            )

    def pictures(self, side: int) -> "Dataset":
        """The same, with channels, and with pixels repeated until each side has so many."""

        def enlarge(split: Split) -> Split:
            images = split.images if split.images.ndim == 4 else split.images[..., None]
            times = -(-side // min(images.shape[1:3]))
            return Split(images.repeat(times, axis=1).repeat(times, axis=2), split.labels)

        return replace(self, train=enlarge(self.train), test=enlarge(self.test))

    def shrunk(self, by: int) -> "Dataset":
        """The same, with the mean of each block of `by` x `by` pixels. Images have channels."""

        def shrink(split: Split) -> Split:
            n, height, width, channels = split.images.shape
            blocks = split.images.reshape(n, height // by, by, width // by, by, channels)
            return Split(blocks.mean(axis=(2, 4)), split.labels)

        return replace(self, train=shrink(self.train), test=shrink(self.test))

    def standardised(self) -> "Dataset":
        """The same, with mean 0 and standard deviation 1 in each channel of the training images."""
        channels = self.train.images.reshape(-1, self.train.images.shape[-1]).T
        mean = np.array([channel.mean(dtype=np.float64) for channel in channels], np.float32)
        deviation = np.array([channel.std(dtype=np.float64) for channel in channels], np.float32)
        return self._scaled(mean, deviation)

    def normalised(self) -> "Dataset":
        """The same, with mean 0 and standard deviation 1 in each pixel of the training images.

        A pixel that is the same in all training images becomes zero in them.
        """
        images = self.train.images
        mean, deviation = (of(images, axis=0, dtype=np.float64) for of in (np.mean, np.std))
        same = np.ptp(images, axis=0) == 0
        return self._scaled(
            np.where(same, images[0], mean).astype(np.float32),
            np.where(same, 1, deviation).astype(np.float32),
        )

    def _scaled(self, mean: np.ndarray, deviation: np.ndarray) -> "Dataset":
        def scale(split: Split) -> Split:
            return Split((split.images - mean) / deviation, split.labels)

        return replace(self, train=scale(self.train), test=scale(self.test))


def cache() -> Path:
    """The folder for downloads."""
    return Path(pooch.os_cache("cqjax"))


def places(data_dir: Path | None, *usual: Path) -> list[Path]:
    """The folders where files may be.

    If a folder is given, it is the only one. Otherwise the first is the one that the variable
    CQJAX_DATA_DIR names, and then come the usual ones.
    """
    if data_dir:
        return [data_dir]
    chosen = os.environ.get("CQJAX_DATA_DIR")
    return [*([Path(chosen)] if chosen else []), *usual]


def fetch(url: str, md5: str, folder: Path) -> Path:
    """Fetch a file into a folder, unless it is there. Files with a wrong checksum do not get there.

    Args:
      url: Its address.
      md5: Its checksum.
      folder: Where to put it. Its name is the end of the address.

    Returns:
      The file.

    Raises:
      DataError: If it cannot be fetched, or is not the one with this checksum.
    """
    name = url.rsplit("/", 1)[-1]
    columns = TextColumn("{task.description}"), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar: Any = _DownloadBar(progress, name)  # pooch declares neither as it uses them
        downloader: Any = pooch.HTTPDownloader(progressbar=bar)
        try:
            return Path(pooch.retrieve(url, f"md5:{md5}", name, folder, downloader=downloader))
        except (OSError, ValueError) as error:  # no connection; a wrong checksum
            raise DataError(f"cannot download {url}: {error}") from error


class _DownloadBar:
    """A progress bar as pooch expects it, drawn by Rich."""

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
