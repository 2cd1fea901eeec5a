"""What there is to learn from without downloads: a text, a picture and a table."""

import sysconfig
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_image

from experiments.contest import Parts
from experiments.data import Split

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
SYMBOLS = len(PRINTABLE) + 1
"""The characters of a text, and one symbol for all others."""


def text(characters: int) -> np.ndarray:
    """The beginning of the standard library's modules in the order of their names, as symbols."""
    content, length = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content.append(path.read_text(encoding="utf-8", errors="replace"))
        length += len(content[-1])
        if length >= characters:
            break
    known = {character: number for number, character in enumerate(PRINTABLE)}
    joined = "".join(content)[:characters]
    return np.array([known.get(character, SYMBOLS - 1) for character in joined], np.int32)


def sequences(characters: int, length: int) -> Parts:
    """Pieces of the text, and each piece one character later.

    Args:
      characters: Length of the text.
      length: Length of a piece.

    Returns:
      A tenth of the pieces, drawn at random, to validate; another to test; the others to train.
    """
    symbols = text(characters)
    count = (len(symbols) - 1) // length
    pieces = (symbols[at : at + count * length].reshape(count, length) for at in (0, 1))
    return tenths(Split(*pieces), np.random.default_rng(0))


def pixels(side: int) -> Parts:
    """The coordinates in [0, 1] and the colours in [0, 1] of a photograph's pixels.

    Args:
      side: The photograph is averaged to so many rows and columns.

    Returns:
      A tenth of the pixels, drawn at random, to validate; another to test; the others to train.
    """
    picture = load_sample_image("china.jpg").astype(np.float32) / 255
    by = min(picture.shape[:2]) // side
    top, left = ((size - by * side) // 2 for size in picture.shape[:2])
    middle = picture[top : top + by * side, left : left + by * side]
    colours = middle.reshape(side, by, side, by, 3).mean(axis=(1, 3)).reshape(-1, 3)
    places = np.stack(np.divmod(np.arange(side**2), side), axis=-1).astype(np.float32)
    return tenths(Split((places + 0.5) / np.float32(side), colours), np.random.default_rng(0))


def table(rows: int, columns: int = 32) -> Parts:
    """A table of correlated columns with heavy tails, and a noisy function of them.

    The rows mix independent Student variables with 3 degrees of freedom. The columns' scales lie
    between 1 / 100 and 100. Then columns and targets get mean 0 and standard deviation 1, by the
    rows that are trained on. A quarter of the targets' variance is noise, about.

    Args:
      rows: Number of rows.
      columns: Number of columns.

    Returns:
      A tenth of the rows to validate, another to test, the others to train.
    """
    rng = np.random.default_rng(0)
    causes = rng.standard_t(3, (rows, columns))
    mixed = causes @ (np.eye(columns) + rng.normal(size=(columns, columns)) / np.sqrt(columns))
    scaled = mixed * 10 ** rng.uniform(-2, 2, columns)
    unit = causes / np.sqrt(3)  # of variance 1
    target = np.tanh(unit[:, 0]) * unit[:, 1].clip(-3, 3) + np.sin(2 * unit[:, 2])
    target += np.abs(unit[:, 3:6]).clip(max=3).sum(axis=1) / 2 + 0.3 * unit[:, 6:12].sum(axis=1)
    target += 0.5 * target.std() * rng.normal(size=rows)
    parts = tenths(Split(scaled, target[:, None]), rng)

    def standardised(part: Split) -> Split:
        return Split(
            *(
                ((array - seen.mean(axis=0)) / seen.std(axis=0)).astype(np.float32)
                for array, seen in zip(part, parts.train, strict=True)
            )
        )

    return Parts(*map(standardised, parts))


def tenths(examples: Split, rng: np.random.Generator) -> Parts:
    """The examples in random order: a tenth to validate, a tenth to test, the others to train."""
    order, tenth = rng.permutation(len(examples.labels)), len(examples.labels) // 10
    validation, test, train = np.split(order, [tenth, 2 * tenth])
    return Parts(*(Split(*(a[part] for a in examples)) for part in (train, validation, test)))
