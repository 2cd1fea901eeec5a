"""Products that a program evaluates twice: the same weight on the same input.

A loss that takes a network's value, and then its derivative, evaluates the layers again. The
outputs are the same variables of the problem: one set of rows, whose ∂L/∂Z add up. To find them,
equal equations on equal variables are given equal numbers (value numbering: Alpern, Wegman and
Zadeck, 1988).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import primitives

from cqjax.program.sites import Site
from cqjax.program.steps import Kind, Number, Position, Program

# What is compared: without bodies, and the same whenever its operands are.
_COMPARED = frozenset(
    """abs add add_any broadcast_in_dim clamp concatenate conv_general_dilated convert_element_type
    cos cosh div dot_general exp exp2 expm1 gather integer_pow iota log log1p logistic max min mul
    neg pow reduce_max reduce_sum reshape rsqrt select_n sin sinh slice sqrt square squeeze sub tan
    tanh transpose""".split()
)


def twins(program: Program, sites: Sequence[Site]) -> Mapping[Position, Position]:
    """For each product that was evaluated before in the same body, where it was.

    Args:
      program: the loss.
      sites: its products, in its order, with their biases.
    """
    groups: dict[Any, list[Site]] = defaultdict(list)
    for site in sites:
        if not site.loops:
            same = site.view, site.form, site.bias, site.gain, site.factor, site.position[:-1]
            groups[same].append(site)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return {}
    numbers = numbering(program)
    reads = {step.position: step.reads for step in program.steps if step.kind is Kind.EQUATION}
    found = {}
    for group in several:
        firsts: dict[Number, Position] = {}
        for site in group:
            variable = reads[site.position][site.operand]
            number = numbers.get(variable, variable)
            first = firsts.setdefault(number, site.position)
            if first != site.position:
                found[site.position] = first
    return found


def numbering(program: Program) -> Mapping[Number, Number]:
    """Variables that equal an earlier one, with its number."""
    numbers: dict[Number, Number] = {}
    seen: dict[Any, tuple[int, ...]] = {}
    for number, value in program.literals.items():
        array = np.asarray(value)
        key = ("literal", array.dtype, array.shape, array.tobytes())
        numbers[number] = seen.setdefault(key, (number,))[0]
    for step in program.steps:
        primitive, params = step.equation.primitive, step.equation.params
        if step.kind is Kind.ENTER and primitive is primitives.cond_p:
            pairs = zip(step.writes, step.reads, strict=True)
            numbers.update((inside, numbers.get(read, read)) for inside, read in pairs)
        if step.kind is not Kind.EQUATION or step.loops or primitive.name not in _COMPARED:
            continue
        reads = tuple(numbers.get(n, n) for n in step.reads)
        key = primitive, tuple(sorted(params.items())), reads
        try:
            first = seen.setdefault(key, step.writes)
        except TypeError:  # a parameter that cannot be hashed
            continue
        numbers.update(zip(step.writes, first, strict=True))
    return numbers
