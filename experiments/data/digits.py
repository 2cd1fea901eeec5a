"""The handwritten digits that come with scikit-learn."""

import numpy as np
from sklearn.datasets import load_digits

from experiments.data.dataset import Dataset, Split


def load() -> Dataset:
    """The 1,797 images of digits, 8 x 8. A fifth of them are for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = (
        Split(images[part], labels[part].astype(np.int32))
        for part in np.split(order, [len(images) * 4 // 5])
    )
    return Dataset("digits", "scikit-learn", train, test)
