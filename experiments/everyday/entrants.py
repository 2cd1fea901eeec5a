"""Who competes on the everyday work. All have the same schedule, and its peak is their rate."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

import cqjax
from experiments.contest import Entrant
from experiments.everyday.networks import FIRST, HEAD
from experiments.everyday.work import Work
from experiments.training import capturing_step, gradient_step

ADAM = "Adam"
OURS = "C-Adam"
DEFAULTS = "C-Adam, defaults"
AT_DEFAULT_RATE = "C-Adam, untuned"
RATE = 1e-2  # cadam's default
WARM_UP = 0.05  # of the steps

Rate = Any
"""A number, or a schedule."""
Make = Callable[[Rate, Rate], Any]
"""Takes a rate, and one for the parameters that the method is not for, to an optimizer."""


def everyone(
    work: Work,
    grids: Mapping[str, Sequence[float]],
    dampings: Sequence[float] = (),
    blocks: Sequence[int] = (),
) -> list[Entrant]:
    """All entrants, Adam first: the others are told its best rate.

    Args:
      work: What they learn.
      grids: The rates that are tried at first for each that takes part, by its option's name.
      dampings: Relative dampings with which C-Adam takes part once more.
      blocks: Sizes of diagonal blocks with which it does.

    Returns:
      The entrants. Those with the optimizer's rate in its state share one program for all rates.
    """
    shape = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, max(1, round(WARM_UP * work.pace.steps)), work.pace.steps
    )

    def scheduled(make: Make) -> Callable[..., Any]:
        """A function that takes a rate and Adam's to the optimizer, with both in its state."""

        def inner(rate: Any, others: Any) -> Any:
            return make(lambda count: rate * shape(count), lambda count: others * shape(count))

        def at(rate: float, others: float = 1e-3) -> Any:
            return optax.inject_hyperparams(inner)(rate=rate, others=others)

        return at

    def entrant(
        name: str, option: str, role: Any, make: Make, *given: str, **capture: Any
    ) -> list[Entrant]:
        if option not in grids:
            return []
        at = scheduled(make)
        if role == "ours":
            step = capturing_step(work.loss_fn, at(1.0), terms=work.terms, **capture)
        else:
            step = gradient_step(work.loss_fn, at(1.0))
        return [Entrant(name, lambda *rates: (at(*rates), step), grids[option], role, given=given)]

    def cadam(**options: Any) -> Make:
        all_ = {**work.rule, **options}
        return lambda rate, others: cqjax.cadam(rate, uncovered_learning_rate=others, **all_)

    (tuned,) = entrant(OURS, "cadam", "ours", cadam(), ADAM)
    untuned = cqjax.cadam(**work.rule)
    its_step = capturing_step(work.loss_fn, untuned, terms=work.terms)
    damped = (
        entrant(f"{OURS}, {damping:g}", "cadam", "ours", cadam(relative_damping=damping), ADAM)
        for damping in dampings
    )
    in_blocks = (
        entrant(
            f"{OURS}, blocks of {size}",
            "cadam",
            "ours",
            cadam(),
            ADAM,
            max_dim=size + 1,  # a bias is no reason for a block more
            block_size=size,
        )
        for size in blocks
    )
    return [
        *entrant(ADAM, "adam", "baseline", lambda rate, _: optax.adam(rate, **work.rule)),
        *entrant("Nesterov", "nesterov", "other", lambda rate, _: optax.sgd(rate, 0.9, True)),
        *entrant("Muon", "muon", "other", muon, ADAM),
        *entrant("C-SGD", "csgd", "ours", lambda rate, _: cqjax.csgd(rate)),
        *entrant("C-Nesterov", "cnesterov", "ours", lambda rate, _: cqjax.cnesterov(rate)),
        *entrant("C-Muon", "cmuon", "ours", cmuon, ADAM),
        tuned,
        *itertools.chain(*damped, *in_blocks),
        Entrant(AT_DEFAULT_RATE, lambda rate: tuned.at(rate, rate), [RATE], "untuned"),
        Entrant(DEFAULTS, lambda rate: (untuned, its_step), [RATE], "untuned"),
    ]


def muon(rate: Rate, others: Rate) -> Any:
    """Muon for hidden weights as matrices, and Adam for the others, as its users have it."""
    return optax.contrib.muon(
        rate, adam_learning_rate=others, muon_weight_dimension_numbers=matrices
    )


def cmuon(rate: Rate, others: Rate) -> Any:
    """Muon after consequentialism, which its own weights alone get (docs/composition.md)."""

    def muons(params: Any) -> Any:
        numbers = matrices(params)
        return jax.tree.map(lambda _, at: at is not None, params, numbers)

    return optax.chain(optax.masked(cqjax.scale_by_consequentialism(), muons), muon(rate, others))


def matrices(params: Any) -> Any:
    """Which axes of each hidden weight are a matrix's; None for all other parameters.

    The others are embeddings, normalisations, biases, the last layer, and a first convolution.
    """

    def of(keys: Any, parameter: jax.Array) -> MuonDimensionNumbers | None:
        *layers, name = _path(keys).split("/")
        if name != "kernel" or layers[-1] in (HEAD, FIRST):
            return None
        axes = tuple(range(parameter.ndim))
        inputs = axes[:1] if layers[-1] in ("query", "key", "value") else axes[:-1]
        return MuonDimensionNumbers(inputs, axes[len(inputs) :])

    return jax.tree.map_with_path(of, params)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")
