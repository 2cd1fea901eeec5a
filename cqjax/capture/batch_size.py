"""N, the number of terms that a loss averages over, and how it is known."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cqjax.capture.options import Options
from cqjax.linalg import devices
from cqjax.program import arguments, jaxprs
from cqjax.program.divisors import Count
from cqjax.program.values import Values


class BatchSize(NamedTuple):
    """N, and where it comes from.

    Attributes:
      value: N; None where it is unknown, or cannot be computed yet.
      source: how it is known, in words.
      doubt: what speaks against it, in words; empty where nothing does.
      computed: whether it was computed of the loss's arguments.
    """

    value: int | jax.Array | None
    source: str
    doubt: str = ""
    computed: bool = False


def batch_size(
    found: Sequence[Count], values: Values, options: Options, args: tuple, loss: Any
) -> BatchSize:
    """N: as it was given, else as the program says it, else as the arguments suggest it.

    Args:
      found: the divisors of the loss's sums: `terms.counts`.
      values: of the variables that they name.
      options: what was asked for.
      args: the loss's arguments beside the parameters, by position and by name.
      loss: its abstract value.
    """
    if options.loss_reduction == "sum":
        return BatchSize(1, '1, as loss_reduction="sum" says')
    if (given := options.batch_size) is not None:
        number = isinstance(given, int | float)
        return BatchSize(given, f"{given if number else 'computed'}, as batch_size= says")
    # Outside of `jax.shard_map`, and where the loss is a mean over devices, too, it is the same.
    shared = arguments.shared_size(args, [loss])
    if not found:
        source = "unknown: the loss is no sum or mean that can be read off the program"
        if shared is not None:
            source = f"{shared}, the leading dimension of the arguments: the loss is no sum or mean"
        return BatchSize(shared, source)
    source = " or ".join(map(str, found))
    if len(found) > 1:
        source = f"the largest of its terms' ({source})"
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args))
    computed = {number for count in found for number in count.computed}
    if computed and abstract:
        return BatchSize(None, source, computed=True)
    n = _largest(found, values.of(computed) if computed else {})
    # Where the devices' divisors differ, and the loss is the devices' mean, so is N.
    if over := devices.varying(n) - jaxprs.varying(loss):
        n = jax.lax.pmean(n, tuple(over))
    doubt = "" if computed else _doubt(n, found, shared, args)
    return BatchSize(n, source, doubt, bool(computed))


def _is_product(number: int, sizes: Sequence[int]) -> bool:
    """Whether a number is the product of some of the sizes."""
    lengths = range(1, len(sizes) + 1)
    chosen = itertools.chain(*(itertools.combinations(sizes, n) for n in lengths))
    return number in map(math.prod, chosen)


def _largest(found: Sequence[Count], values: Mapping[int, Any]) -> Any:
    """The largest divisor, by the values of the variables that they name."""
    numbers = []
    for count in found:
        number: Any = count.number
        for variable in count.computed:
            divisor = jnp.asarray(values[variable])
            number *= jnp.mean(divisor, dtype=jnp.promote_types(divisor.dtype, jnp.float32))
        # An int that crosses `jax.jit` must fit into 32 bits.
        numbers.append(number if count.computed or number < 2**31 else float(number))
    largest = numbers[0]
    for number in numbers[1:]:
        static = isinstance(number, int) and isinstance(largest, int)
        largest = max(number, largest) if static else jnp.maximum(number, largest)
    return largest


def _doubt(n: Any, found: Sequence[Count], shared: int | None, args: tuple) -> str:
    """What to say where the arguments suggest another N.

    A mean over the arguments' leading dimension and others (tokens, outputs) explains itself.
    """
    if shared is None or n == shared or any(_is_product(shared, c.sizes) for c in found):
        return ""
    arrays = arguments.described(*args)
    return (
        f"cqjax takes N = {n} ({found[0]}), though the arguments share the leading dimension "
        f"{shared} ({arrays}). If that is meant, pass batch_size={n} to cqjax.value_and_grad"
        + (' (or loss_reduction="sum")' if n == 1 else "")
        + f"; else make the loss a mean over its terms, or pass their number, batch_size={shared}"
    )
