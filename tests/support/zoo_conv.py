"""Zoo: convolutions."""

import flax.linen as nn
import numpy as np
import references as ref
from zoo_base import Case, biases, flax_regression, kernels, squared_reference


class ConvNet(nn.Module):
    """The convolution, tanh, and a convolution of size 2."""

    first: nn.Module

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(self.first(x))
        return nn.Conv(2, (2,) * (x.ndim - 2), padding="VALID", name="last")(h)


def _forward(options):
    def forward(params, x, linear):
        p = params["params"]
        h = np.tanh(ref.conv(linear, "params/first", x, p["first"], **options(p["first"], x)))
        return ref.conv(linear, "params/last", h, p["last"])

    return forward


def _conv_case(name, first, x_shape, options, groups=1):
    bias = "first last" if first.use_bias else "last"
    return Case(
        name=name,
        make=flax_regression(ConvNet(first), x_shape),
        reference=squared_reference(_forward(options)),
        covered=kernels("first last"),
        biases=biases(bias),
        layouts={"params/first/kernel": ref.join_groups} if groups > 1 else {},
    )


def _same(layer, x):
    sizes = zip(x.shape[1:-1], layer["kernel"].shape[:-2], strict=True)
    return {"padding": [ref.same_padding(size, k) for size, k in sizes]}


def _transpose_same(layer, x):
    # lax.conv_transpose under "SAME": kernel 3, stride 2 pads the dilated input by (2, 1).
    return {"input_dilation": (2, 2), "padding": [(2, 1), (2, 1)]}


def _fixed(**options):
    return lambda layer, x: options


_TABLE = [
    ("conv_same", nn.Conv(3, (3, 3)), (2, 3, 4, 2), _same),
    (
        "conv_stride_dilation",
        nn.Conv(3, (2, 3), 2, padding="VALID", kernel_dilation=(2, 1), use_bias=False),
        (2, 6, 7, 2),
        _fixed(stride=(2, 2), dilation=(2, 1)),
    ),
    (
        "conv_grouped",
        nn.Conv(4, (2, 3), padding=((1, 0), (2, 1)), feature_group_count=2),
        (2, 3, 3, 4),
        _fixed(padding=[(1, 0), (2, 1)], groups=2),
        2,
    ),
    ("conv_1d", nn.Conv(3, (3,), 2), (3, 6, 2), _fixed(stride=(2,), padding=[(0, 1)])),
    ("conv_3d", nn.Conv(2, (2, 2, 2), padding="VALID"), (2, 3, 3, 3, 2), _fixed()),
    (
        "conv_depthwise",
        nn.Conv(6, (2, 2), padding="VALID", feature_group_count=3),
        (2, 3, 3, 3),
        _fixed(groups=3),
        3,
    ),
    ("conv_transpose", nn.ConvTranspose(2, (3, 3), (2, 2)), (2, 2, 3, 2), _transpose_same),
]

CASES = [_conv_case(*row) for row in _TABLE]
