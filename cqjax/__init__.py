"""Updates of a network's layers that take their consequences into account.

`value_and_grad` differentiates a loss and captures each linear layer's input and the gradient with
respect to its output; Optax transformations choose ΔW by what it does to Z = XW.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cqjax import diagnostics
from cqjax.aliases import cadam, cmomentum, cnesterov, crmsprop, csgd
from cqjax.back_matching.chain import ChainLayer
from cqjax.back_matching.propagation import (
    back_matching_value_and_grad,
)
from cqjax.back_matching.rates import back_matching_rates
from cqjax.back_matching.transform import ScaleByBackMatchingState, scale_by_back_matching
from cqjax.back_matching.units import Unit, back_matching_units
from cqjax.capture.block import Block
from cqjax.capture.captures import Capture, Captures
from cqjax.capture.outputs import Outputs
from cqjax.capture.own_statistics import Counts, Groups
from cqjax.capture.parameters import Parameter
from cqjax.capture.plan import Plan
from cqjax.capture.statistics import Gram, Inputs, Rows, SketchedGram, Statistic, Trip
from cqjax.capture.value_and_grad import plan, value_and_grad
from cqjax.layerwise_aliases import back_matching_sgd, lsalr, nlms
from cqjax.losses import kullback_leibler, normalized_kullback_leibler, p_norm_loss
from cqjax.solves.layer import Layer
from cqjax.solves.layers import Layers, for_each_layer
from cqjax.solves.matrices import Matrices
from cqjax.transforms.clip_by_output_change import (
    ClipByOutputChangeState,
    clip_by_output_change,
)
from cqjax.transforms.conjugate_gradient import (
    ScaleByConjugateGradientState,
    scale_by_conjugate_gradient,
)
from cqjax.transforms.consequentialism import (
    ScaleByConsequentialismState,
    scale_by_consequentialism,
)
from cqjax.transforms.extra_args import bind_extra_args
from cqjax.transforms.layerwise_rates import scale_by_lsalr
from cqjax.transforms.learning_rates import scale_by_learning_rates
from cqjax.transforms.multi_steps import MultiStepsState, multi_steps
from cqjax.transforms.nlms import scale_by_nlms

if TYPE_CHECKING:
    from cqjax import nnx, training

__all__ = [
    "back_matching_rates",
    "back_matching_sgd",
    "back_matching_units",
    "back_matching_value_and_grad",
    "bind_extra_args",
    "Block",
    "cadam",
    "Capture",
    "Captures",
    "ChainLayer",
    "clip_by_output_change",
    "ClipByOutputChangeState",
    "cmomentum",
    "cnesterov",
    "Counts",
    "crmsprop",
    "csgd",
    "diagnostics",
    "for_each_layer",
    "Gram",
    "Groups",
    "Inputs",
    "kullback_leibler",
    "Layer",
    "Layers",
    "lsalr",
    "Matrices",
    "multi_steps",
    "MultiStepsState",
    "nlms",
    "nnx",
    "normalized_kullback_leibler",
    "p_norm_loss",
    "Outputs",
    "Parameter",
    "plan",
    "Plan",
    "Rows",
    "scale_by_back_matching",
    "scale_by_conjugate_gradient",
    "scale_by_consequentialism",
    "scale_by_learning_rates",
    "scale_by_lsalr",
    "scale_by_nlms",
    "ScaleByBackMatchingState",
    "ScaleByConjugateGradientState",
    "ScaleByConsequentialismState",
    "SketchedGram",
    "Statistic",
    "training",
    "Trip",
    "Unit",
    "value_and_grad",
]
__version__ = version("cqjax")


def __getattr__(name: str) -> Any:
    """The modules for Flax, imported when they are asked for: all else needs no Flax.

    Raises:
      AttributeError: there is no such name.
      ModuleNotFoundError: Flax is not installed.
    """
    if name in ("nnx", "training"):
        try:
            return importlib.import_module(f"cqjax.{name}")
        except ModuleNotFoundError as error:
            message = f"cqjax.{name} needs Flax ({error}): pip install 'cqjax[flax]'"
            raise ModuleNotFoundError(message, name=error.name) from error
    raise AttributeError(f"module 'cqjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
