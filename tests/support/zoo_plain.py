"""Zoo: functions of parameters written by hand, and unusual uses of a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import references as ref
from zoo_base import (
    Case,
    Mlp,
    plain_regression,
    regression,
    squared_reference,
)


def _plain_dense(linear, path, x, layer):
    return ref.contract(linear, f"{path}/w", x, layer["w"]) + layer.get("b", 0.0)


# Nested lists and dicts.

NESTED = {
    "blocks": [{"w": (3, 4), "b": (4,)}, {"w": (4, 4), "b": (4,)}],
    "head": {"w": (4, 2)},
}


def _nested(params, x):
    for block in params["blocks"]:
        x = jnp.tanh(x @ block["w"] + block["b"])
    return x @ params["head"]["w"]


def _nested_np(params, x, linear):
    for i, block in enumerate(params["blocks"]):
        x = np.tanh(_plain_dense(linear, f"blocks/{i}", x, block))
    return _plain_dense(linear, "head", x, params["head"])


# x @ W + b, then a kernel stored as (outputs, inputs).


def _transposed(params, x):
    h = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"])
    return jnp.einsum("ni,oi->no", h, params["out"]["w"]) + params["out"]["b"]


def _transposed_np(params, x, linear):
    h = np.tanh(_plain_dense(linear, "in", x, params["in"]))
    out = params["out"]
    return ref.contract(linear, "out/w", h, out["w"].T) + out["b"]


def _transpose(matrix, shape):
    return matrix[0].T


# A kernel used in slices: of its outputs, and of its inputs.


def _slices(params, a, b):
    by_output, by_input = params["by_output"], params["by_input"]
    h = jnp.tanh(jnp.concatenate([a @ by_output[:, :2], b @ by_output[:, 2:]], axis=1))
    return h @ by_input[:5] + (a * b) @ by_input[5:]


def _slices_np(params, a, b, linear):
    by_output, by_input = params["by_output"], params["by_input"]
    left = ref.contract(linear, "by_output#0", a, by_output[:, :2])
    right = ref.contract(linear, "by_output#1", b, by_output[:, 2:])
    h = np.tanh(np.concatenate([left, right], axis=1))
    top = ref.contract(linear, "by_input#0", h, by_input[:5])
    return top + ref.contract(linear, "by_input#1", a * b, by_input[5:])


def _place(*index):
    """The layout of a site whose weight is `parameter[index]`."""

    def layout(matrix, shape):
        out = np.zeros(shape)
        out[index] = matrix[0]
        return out

    return layout


SLICE_LAYOUTS = {
    "by_output#0": _place(slice(None), slice(None, 2)),
    "by_output#1": _place(slice(None), slice(2, None)),
    "by_input#0": _place(slice(None, 5)),
    "by_input#1": _place(slice(5, None)),
}


# Rematerialisation with a policy, around a function.

TWO_LAYERS = {"in": {"w": (3, 4), "b": (4,)}, "out": {"w": (4, 2), "b": (2,)}}


def _two_layers(params, x):
    @jax.checkpoint
    def inner(layer, x):
        return jnp.tanh(x @ layer["w"] + layer["b"])

    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    outer = jax.checkpoint(lambda p, x: inner(p["in"], x) @ p["out"]["w"], policy=saveable)
    return outer(params, x) + params["out"]["b"]


def _two_layers_np(params, x, linear):
    h = np.tanh(_plain_dense(linear, "in", x, params["in"]))
    return _plain_dense(linear, "out", h, params["out"])


# A kernel whose first row also multiplies the activations.


def _gated(params, x):
    layer = params["layer"]
    return jnp.tanh(x @ layer["w"] + layer["b"]) * layer["w"][0]


def _gated_np(params, x, linear):
    layer = params["layer"]
    return np.tanh(_plain_dense(linear, "layer", x, layer)) * layer["w"][0]


# Separate modules applied to sub-trees of one parameter tree.

ENCODER, DECODER = Mlp((4, 3)), Mlp((4, 2), use_bias=False)


def _subtree_shapes(x):
    key = jax.random.key(0)
    encoder = jax.eval_shape(ENCODER.init, key, x)["params"]
    code = jax.ShapeDtypeStruct((len(x), 3), x.dtype)
    return {"encoder": encoder, "decoder": jax.eval_shape(DECODER.init, key, code)["params"]}


def _subtrees(params, x):
    code = jnp.tanh(ENCODER.apply({"params": params["encoder"]}, x))
    return DECODER.apply({"params": params["decoder"]}, code)


def _subtrees_np(params, x, linear):
    for name in ("encoder", "decoder"):
        for i in range(2):
            layer = params[name][f"Dense_{i}"]
            x = np.tanh(x) if (name, i) != ("encoder", 0) else x
            x = ref.dense(linear, f"{name}/Dense_{i}", x, layer)
    return x


CASES = [
    Case(
        name="nested_containers",
        make=plain_regression(NESTED, _nested, (4, 3)),
        reference=squared_reference(_nested_np),
        covered=frozenset({"blocks/0/w", "blocks/1/w", "head/w"}),
        biases=frozenset({"blocks/0/b", "blocks/1/b"}),
    ),
    Case(
        name="plain_transposed_kernel",
        make=plain_regression(
            {"in": {"w": (3, 4), "b": (4,)}, "out": {"w": (2, 4), "b": (2,)}}, _transposed, (4, 3)
        ),
        reference=squared_reference(_transposed_np),
        covered=frozenset({"in/w", "out/w"}),
        biases=frozenset({"in/b", "out/b"}),
        layouts={"out/w": _transpose},
    ),
    Case(
        name="kernel_slices",
        make=plain_regression({"by_output": (3, 5), "by_input": (8, 2)}, _slices, (4, 3), (4, 3)),
        reference=squared_reference(_slices_np, inputs=2),
        covered=frozenset({"by_output", "by_input"}),
        layouts=SLICE_LAYOUTS,
    ),
    Case(
        name="checkpoint_policy",
        make=plain_regression(TWO_LAYERS, _two_layers, (4, 3)),
        reference=squared_reference(_two_layers_np),
        covered=frozenset({"in/w", "out/w"}),
        biases=frozenset({"in/b", "out/b"}),
    ),
    Case(
        name="partly_covered",
        make=plain_regression({"layer": {"w": (3, 4), "b": (4,)}}, _gated, (4, 3)),
        reference=squared_reference(_gated_np),
        covered=frozenset(),
        partly={"layer/w": "its first row multiplies the activations elementwise"},
        biases=frozenset({"layer/b"}),
    ),
    Case(
        name="parameter_subtrees",
        make=regression(_subtree_shapes, _subtrees, (4, 3)),
        reference=squared_reference(_subtrees_np),
        covered=frozenset(
            f"{name}/Dense_{i}/kernel" for name in ("encoder", "decoder") for i in range(2)
        ),
        biases=frozenset({"encoder/Dense_0/bias", "encoder/Dense_1/bias"}),
    ),
    Case(
        name="unused_parameter",
        make=plain_regression(TWO_LAYERS | {"spare": {"w": (2, 2)}}, _two_layers, (4, 3)),
        reference=squared_reference(_two_layers_np),
        covered=frozenset({"in/w", "out/w"}),
        biases=frozenset({"in/b", "out/b"}),
        uncovered={"spare/w": "never used"},
    ),
]
