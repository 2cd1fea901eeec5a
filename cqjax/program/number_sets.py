"""Sets of small numbers, as integers: bit i stands for the number i.

In a residual network each layer reads all below it. To join two such sets takes one operation,
however deep the network is; to count up their members in each layer would take the square of it.
"""

from collections.abc import Iterable, Iterator

Numbers = int
"""A set of numbers, each at least 0."""


def members(numbers: Numbers) -> Iterator[int]:
    """The members of a set, the highest first."""
    while numbers:
        yield numbers.bit_length() - 1
        numbers ^= 1 << numbers.bit_length() - 1


def closed_up(numbers: Numbers, gone: Iterable[int]) -> Numbers:
    """A set by new numbers, after some, the highest first, are taken out of the count."""
    for i in gone:
        numbers = (numbers & ((1 << i) - 1)) | (numbers >> i + 1 << i)
    return numbers
