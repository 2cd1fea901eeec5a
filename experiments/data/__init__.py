"""The data sets of the experiments, as arrays in memory. Each has its own module."""

from pathlib import Path
from typing import Literal

from experiments.data import cifar, digits, fashion_mnist
from experiments.data.dataset import DataError as DataError
from experiments.data.dataset import Dataset as Dataset
from experiments.data.dataset import MissingDataError as MissingDataError
from experiments.data.dataset import Split as Split

DatasetName = Literal["auto", "fashion_mnist", "digits"]
AnyName = Literal["cifar10", "cifar100", "fashion_mnist", "digits"]


def load(name: DatasetName | AnyName, data_dir: Path | None, download: bool) -> Dataset:
    """Load a data set of small images.

    Args:
      name: Its name. "auto" is Fashion-MNIST if its files are found, and digits otherwise.
      data_dir: The folder of its files. Without it, they are looked for in the usual places.
      download: Whether to fetch its files if they are not found.

    Returns:
      The data set.

    Raises:
      MissingDataError: If the data set asked for is not there.
      DataError: If one of its files is bad, or cannot be fetched.
    """
    if name == "digits":
        return digits.load()
    if name in ("cifar10", "cifar100"):
        return getattr(cifar, name.upper()).load(data_dir, download)
    try:
        return fashion_mnist.load(data_dir, download)
    except MissingDataError:
        if name == "auto" and data_dir is None:
            return digits.load()
        raise
