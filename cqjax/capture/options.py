"""The options of `value_and_grad`, and checks that they are valid."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.export import is_symbolic_dim

from cqjax.capture.checks import check_option, check_positive
from cqjax.capture.own_statistics import Groups
from cqjax.capture.parameters import Selector
from cqjax.capture.statistics import Gram, Inputs, Rows, Statistic

Signal = Literal["gradient", "matched"]
Reparametrized = Literal["uncovered", "nearest"]


class Options(NamedTuple):
    """The options of `value_and_grad` that say what is captured, and how it is solved."""

    only: Selector | Sequence[Selector] | None = None
    skip: Selector | Sequence[Selector] = ()
    solver: Literal["auto", "primal", "dual"] = "auto"
    capture: type[Statistic] | None = None
    batch_size: int | jax.Array | None = None
    loss_reduction: Literal["mean", "sum"] = "mean"
    signal: Signal = "gradient"
    max_dim: int | None = None
    block_size: int | None = None
    precision: lax.PrecisionLike = "highest"
    reparametrized: Reparametrized = "uncovered"

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
          ValueError: names the option.
          TypeError: `capture` is no statistic.
        """
        check_option(self.solver, ("auto", "primal", "dual"), "solver")
        check_option(self.loss_reduction, ("mean", "sum"), "loss_reduction")
        check_option(self.signal, ("gradient", "matched"), "signal")
        check_option(self.reparametrized, ("uncovered", "nearest"), "reparametrized")
        if self.reparametrized == "nearest" and self.signal == "matched":
            raise ValueError(
                'reparametrized="nearest" with signal="matched": back-matching knows no weights '
                'that the loss makes of parameters; expected reparametrized="uncovered"'
            )
        _check_batch_size(self.batch_size, self.loss_reduction)
        _check_limits(self.max_dim, self.block_size)
        _check_capture(self)
        row = jax.ShapeDtypeStruct((1,), jnp.float32)
        try:
            jax.eval_shape(lambda x: jnp.dot(x, x, precision=self.precision), row)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"precision={self.precision!r}: expected what jax.lax.dot_general takes: "
                "'highest', 'high', 'default' or another jax.lax.Precision"
            ) from error


def _check_batch_size(size: Any, loss_reduction: str) -> None:
    if size is not None and not is_symbolic_dim(size) and jnp.ndim(size):
        raise ValueError(f"batch_size has shape {jnp.shape(size)}: expected a scalar")
    if isinstance(size, int | float | np.number) and not size > 0:
        raise ValueError(f"batch_size={size}: expected a positive number of examples")
    if size is not None and loss_reduction == "sum":
        raise ValueError('loss_reduction="sum" leaves no use for batch_size=; pass one of the two')


def _check_limits(max_dim: Any, block_size: Any) -> None:
    for name, value in (("max_dim", max_dim), ("block_size", block_size)):
        if value is not None:
            check_positive(value, name)
    if block_size is not None and (max_dim is None or block_size > max_dim):
        raise ValueError(
            f"block_size={block_size} with max_dim={max_dim}: expected max_dim, the size from "
            "which on a matrix is split into blocks, and block_size no larger than it"
        )


def _check_capture(options: Options) -> None:
    capture = options.capture
    if capture is None:
        return
    statistic = isinstance(capture, type) and issubclass(capture, Statistic)
    # A diagonal second moment is a lookup's.
    if not statistic or capture in (Statistic, Inputs, Groups) or capture.diagonal:
        raise TypeError(
            f"capture={capture!r}: expected cqjax.Rows, cqjax.Gram, or a class of your own derived "
            "from cqjax.Statistic, with diagonal=False"
        )
    if capture.every_trip and capture.fold is Statistic.fold:
        raise TypeError(
            f"capture={capture.__name__} has every_trip=True and no fold of its own, to merge the "
            "axes of loops; expected both, as cqjax.Rows has"
        )
    if options.solver == "dual" and not issubclass(capture, Rows):
        raise ValueError(
            f'capture={capture.__name__} with solver="dual", which needs rows; expected '
            "capture=cqjax.Rows, or another solver"
        )
    if options.block_size is not None and capture is not Gram:
        raise ValueError(
            f"capture={capture.__name__} with block_size={options.block_size}: of a matrix in "
            "diagonal blocks only XᵀX is captured; expected capture=cqjax.Gram, or no block_size="
        )
