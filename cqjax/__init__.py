"""Updates of a network's layers that take their consequences into account.

`value_and_grad` differentiates a loss and captures each linear layer's input and the gradient with
respect to its output; Optax transformations choose ΔW by what it does to Z = XW.
"""

from importlib.metadata import version

from cqjax import diagnostics as diagnostics
from cqjax import nnx as nnx
from cqjax import training as training
from cqjax.aliases import cadam as cadam
from cqjax.aliases import cmomentum as cmomentum
from cqjax.aliases import cnesterov as cnesterov
from cqjax.aliases import crmsprop as crmsprop
from cqjax.aliases import csgd as csgd
from cqjax.back_matching.chain import ChainLayer as ChainLayer
from cqjax.back_matching.propagation import (
    back_matching_value_and_grad as back_matching_value_and_grad,
)
from cqjax.back_matching.rates import back_matching_rates as back_matching_rates
from cqjax.back_matching.transform import ScaleByBackMatchingState as ScaleByBackMatchingState
from cqjax.back_matching.transform import scale_by_back_matching as scale_by_back_matching
from cqjax.back_matching.units import Unit as Unit
from cqjax.back_matching.units import back_matching_units as back_matching_units
from cqjax.capture.block import Block as Block
from cqjax.capture.captures import Capture as Capture
from cqjax.capture.captures import Captures as Captures
from cqjax.capture.own_statistics import Counts as Counts
from cqjax.capture.own_statistics import Groups as Groups
from cqjax.capture.parameters import Parameter as Parameter
from cqjax.capture.plan import Plan as Plan
from cqjax.capture.statistics import Gram as Gram
from cqjax.capture.statistics import Inputs as Inputs
from cqjax.capture.statistics import Rows as Rows
from cqjax.capture.statistics import SketchedGram as SketchedGram
from cqjax.capture.statistics import Statistic as Statistic
from cqjax.capture.statistics import Trip as Trip
from cqjax.capture.value_and_grad import plan as plan
from cqjax.capture.value_and_grad import value_and_grad as value_and_grad
from cqjax.layerwise_aliases import back_matching_sgd as back_matching_sgd
from cqjax.layerwise_aliases import lsalr as lsalr
from cqjax.layerwise_aliases import nlms as nlms
from cqjax.losses import kullback_leibler as kullback_leibler
from cqjax.losses import normalized_kullback_leibler as normalized_kullback_leibler
from cqjax.losses import p_norm_loss as p_norm_loss
from cqjax.solves.layer import Layer as Layer
from cqjax.solves.layers import Layers as Layers
from cqjax.solves.layers import for_each_layer as for_each_layer
from cqjax.solves.matrices import Matrices as Matrices
from cqjax.transforms.clip_by_output_change import (
    ClipByOutputChangeState as ClipByOutputChangeState,
)
from cqjax.transforms.clip_by_output_change import clip_by_output_change as clip_by_output_change
from cqjax.transforms.conjugate_gradient import (
    ScaleByConjugateGradientState as ScaleByConjugateGradientState,
)
from cqjax.transforms.conjugate_gradient import (
    scale_by_conjugate_gradient as scale_by_conjugate_gradient,
)
from cqjax.transforms.consequentialism import (
    ScaleByConsequentialismState as ScaleByConsequentialismState,
)
from cqjax.transforms.consequentialism import (
    scale_by_consequentialism as scale_by_consequentialism,
)
from cqjax.transforms.extra_args import bind_extra_args as bind_extra_args
from cqjax.transforms.layerwise_rates import scale_by_lsalr as scale_by_lsalr
from cqjax.transforms.learning_rates import scale_by_learning_rates as scale_by_learning_rates
from cqjax.transforms.multi_steps import MultiStepsState as MultiStepsState
from cqjax.transforms.multi_steps import multi_steps as multi_steps
from cqjax.transforms.nlms import scale_by_nlms as scale_by_nlms

__version__ = version("cqjax")
