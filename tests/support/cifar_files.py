"""Small CIFARs, and pickles as Python 2 wrote them."""

import pickle
import struct
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from experiments.data import cifar


class Small(NamedTuple):
    """A small data set: which, what is in its files, where they are."""

    name: str
    files: dict
    folder: Path

    @property
    def family(self):
        return getattr(cifar, self.name)

    @property
    def last(self):
        """The last file with training images."""
        return self.folder / self.family.train[-1].name

    def load(self, data_dir=None):
        return self.family.load(data_dir or self.folder, download=False)


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
    file = BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
