"""Zoo: recurrent networks; one weight serves every time step."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import references as ref
from zoo_base import Case, biases, flax_regression, kernels, squared_reference


class Recurrent(nn.Module):
    """A cell over time, then a Dense on every output."""

    cell: type[nn.Module]
    param_dtype: type

    @nn.compact
    def __call__(self, x):
        # The cell starts from zeros of its param_dtype, which the scan needs to keep.
        cell = self.cell(3, param_dtype=self.param_dtype, name="cell")
        return nn.Dense(2, name="last")(nn.RNN(cell)(x))


def _make(cell):
    def make(dtype=jnp.float32):
        return flax_regression(Recurrent(cell, dtype), (2, 3, 2))(dtype)

    return make


def _forward(step, start):
    def forward(params, x, linear):
        p = params["params"]
        zeros = np.zeros((len(x), 3))
        carry, outputs = start(zeros), []
        for t in range(x.shape[1]):
            carry = step(linear, "params/cell", carry, x[:, t], p["cell"])
            outputs.append(carry[1] if isinstance(carry, tuple) else carry)
        return ref.dense(linear, "params/last", np.stack(outputs, axis=1), p["last"])

    return forward


def _single(zeros):
    return zeros


def _pair(zeros):
    return zeros, zeros


_LSTM = ("ii if ig io hi hf hg ho", "hi hf hg ho", ref.lstm_cell, _pair)
_TABLE = [
    ("simple_cell", nn.SimpleCell, "i h", "i", ref.simple_cell, _single),
    ("gru_cell", nn.GRUCell, "ir iz in hr hz hn", "ir iz in hn", ref.gru_cell, _single),
    ("lstm_cell", nn.LSTMCell, *_LSTM),
    ("optimized_lstm_cell", nn.OptimizedLSTMCell, *_LSTM),
]

CASES = [
    Case(
        name=name,
        make=_make(cell),
        reference=squared_reference(_forward(step, start)),
        covered=kernels(weights, root="params/cell") | kernels("last"),
        biases=biases(shifts, root="params/cell") | biases("last"),
    )
    for name, cell, weights, shifts, step, start in _TABLE
]
