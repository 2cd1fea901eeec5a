"""CIFAR-10 and CIFAR-100, from their official Python files: pickles, which are not trusted.

Files with the structure of the official ones, but with other contents (recompressed images, say),
are accepted. The data set's name then says that they are not the official files.
"""

import hashlib
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import pickles
from experiments.data.dataset import (
    BadFileError,
    DataError,
    Dataset,
    MissingDataError,
    Split,
    cache,
    fetch,
    places,
)

PIXELS = 3 * 32 * 32
LONGEST = 2 * PIXELS + 1024  # bytes of a pickle for an image, its labels and its name


class File(NamedTuple):
    """One of the files with images."""

    name: str
    md5: str
    images: int


@dataclass(frozen=True)
class Cifar:
    """A data set of this format."""

    name: str
    url: str
    md5: str  # of the archive
    folder: str
    train: tuple[File, ...]
    test: File
    meta: str
    labels: bytes  # the key of the labels in a file with images
    label_names: bytes  # and of the classes' names in the file `meta`
    classes: tuple[bytes, ...]

    def load(self, data_dir: Path | None, download: bool) -> Dataset:
        """Load the 32 x 32 colour images from the first place that has all the files.

        Args:
          data_dir: The only place to look into. It is the folder of the files, or its parent.
            Without it, the folder that CQJAX_DATA_DIR names, and the cache.
          download: Whether to fetch the archive if the files are in none of these places.

        Returns:
          The data set. Its name tells whether the files are the official ones.

        Raises:
          MissingDataError: If the files are not there.
          DataError: If one of them is bad, or cannot be fetched.
        """
        parents = places(data_dir, cache())
        folders = [folder for parent in parents for folder in (parent, parent / self.folder)]
        for folder in folders:
            if not self._missing(folder):
                return self._read(folder)
        wanted = folders[-2] if folders[-2].name == self.folder else folders[-1]
        if not download:
            nearest = min((wanted, *folders), key=lambda folder: len(self._missing(folder)))
            raise MissingDataError(
                f"{self.name} is not in {' or '.join(map(str, parents))}: "
                f"{nearest / self._missing(nearest)[0]} is missing; "
                "--data-dir names the folder of its files, --download fetches them"
            )
        self._unpack(fetch(self.url, self.md5, wanted.parent), wanted)
        return self._read(wanted)

    def _missing(self, folder: Path) -> list[str]:
        return [name for name in self._names() if not (folder / name).is_file()]

    def _names(self) -> list[str]:
        return [*(file.name for file in (*self.train, self.test)), self.meta]

    def _unpack(self, archive: Path, folder: Path) -> None:
        """Take the known files, and nothing else, out of the archive, and remove it.

        Raises:
          DataError: If the archive cannot be read, or lacks a file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for name in self._names():
                    content = tar.extractfile(f"{self.folder}/{name}")
                    if content is None:
                        raise DataError(
                            f"{archive} cannot be unpacked: {self.folder}/{name} is no file"
                        )
                    part = folder / f"{name}.part"
                    with part.open("wb") as target:
                        shutil.copyfileobj(content, target)
                    part.replace(folder / name)
        except (KeyError, tarfile.TarError, EOFError) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}") from error
        archive.unlink()

    def _read(self, folder: Path) -> Dataset:
        """Read all files of a folder. Compute their checksums before anything else.

        Raises:
          BadFileError: If one of them is bad; the message names it.
        """
        files = *self.train, self.test
        official = all(_md5(folder / file.name) == file.md5 for file in files)
        names = self._unpickle(folder / self.meta, len(self.classes)).get(self.label_names)
        if type(names) is not list or len(names) != len(self.classes):
            what = f"a list of {len(names)} names" if type(names) is list else "no list of classes"
            raise BadFileError(folder / self.meta, f"has {what}, not {self.name}'s")
        for name, expected in zip(names, self.classes, strict=True):
            if type(name) is not bytes or name != expected:
                got, wanted = pickles.shown(name), pickles.shown(expected)
                raise BadFileError(
                    folder / self.meta, f"has the class {got}, where {self.name} has {wanted}"
                )
        *train, test = (self._read_images(folder / file.name, file.images) for file in files)
        merged = Split(*(np.concatenate(arrays) for arrays in zip(*train, strict=True)))
        name = self.name if official else f"{self.name} (not the official files)"
        return Dataset(name, str(folder), merged, test, len(self.classes))

    def _read_images(self, path: Path, count: int) -> Split:
        """The images of one file, channels last.

        Raises:
          BadFileError: If the file does not hold what it should.
        """
        batch = self._unpickle(path, count)
        data, labels = batch.get(b"data"), batch.get(self.labels)
        data = data.of_bytes() if isinstance(data, pickles.Array) else None
        if data is None:
            raise BadFileError(path, "holds no array of bytes as its data")
        if data.shape != (count, PIXELS):
            raise BadFileError(path, f"holds data of shape {data.shape}, not {(count, PIXELS)}")
        if not isinstance(labels, list) or len(labels) != count:
            raise BadFileError(path, f"does not hold a list of {count:,} {self.labels.decode()}")
        for label in labels:
            if type(label) is not int or not 0 <= label < len(self.classes):
                last = len(self.classes) - 1
                raise BadFileError(
                    path, f"holds the label {pickles.shown(label)}, not one of 0 to {last}"
                )
        images = data.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
        images = np.divide(images, 255, order="C", dtype=np.float32)
        return Split(images, np.array(labels, np.int32))

    def _unpickle(self, path: Path, count: int) -> dict[bytes, Any]:
        """The dictionary in a pickle.

        Raises:
          BadFileError: If the pickle is damaged, refers to anything unexpected, or holds something
            else, or more than so many images.
        """
        size = path.stat().st_size
        if size > (count + 1) * LONGEST:
            raise BadFileError(
                path, f"is {size:,} bytes long, not {(count + 1) * LONGEST:,} at most"
            )
        try:
            value = pickles.loads(path.read_bytes())
        except Exception as error:  # a damaged pickle can fail in any way
            raise BadFileError(path, f"cannot be read: {str(error)[:200]}") from error
        if not isinstance(value, dict):
            raise BadFileError(path, f"holds a {type(value).__name__}, not a dictionary")
        return value


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


CIFAR10 = Cifar(
    name="CIFAR-10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train=(
        File("data_batch_1", "c99cafc152244af753f735de768cd75f", 10_000),
        File("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec", 10_000),
        File("data_batch_3", "54ebc095f3ab1f0389bbae665268c751", 10_000),
        File("data_batch_4", "634d18415352ddfa80567beed471001a", 10_000),
        File("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb", 10_000),
    ),
    test=File("test_batch", "40351d587109b95175f43aff81a1287e", 10_000),
    meta="batches.meta",
    labels=b"labels",
    label_names=b"label_names",
    classes=tuple(b"airplane automobile bird cat deer dog frog horse ship truck".split()),
)

CIFAR100 = Cifar(
    name="CIFAR-100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train=(File("train", "16019d7e3df5f24257cddd939b257f8d", 50_000),),
    test=File("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", 10_000),
    meta="meta",
    labels=b"fine_labels",
    label_names=b"fine_label_names",
    classes=tuple(
        b"apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
        b"butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach "
        b"couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster "
        b"house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree "
        b"motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear "
        b"pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road "
        b"rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
        b"sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip "
        b"turtle wardrobe whale willow_tree wolf woman worm".split()
    ),
)
