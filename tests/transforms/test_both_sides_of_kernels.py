"""Kernels of convolutions that a loss uses both ways: dense least squares over their entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import cqjax

pytestmark = pytest.mark.usefixtures("float64")

LAYERS = {
    "same": {"strides": (1, 1), "padding": "SAME"},
    "valid, strided": {"strides": (2, 2), "padding": "VALID"},
    "dilated": {"strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
    "same, strided": {"strides": (2, 1), "padding": "SAME"},
}


def convolved(x, kernel, layer):
    options = {"rhs_dilation": (1, 1), **layer}
    return lax.conv_general_dilated(
        x,
        kernel,
        options["strides"],
        options["padding"],
        rhs_dilation=options["rhs_dilation"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def critic(params, x, layer):
    h = jnp.tanh(convolved(x, params["kernel"], layer) + params["bias"])
    return h.reshape(len(x), -1) @ params["head"]


def penalty(params, x, layer):
    slopes = jax.grad(lambda x: critic(params, x, layer).sum())(x)
    return jnp.mean(jnp.sum(slopes**2, (1, 2, 3)) + critic(params, x, layer) ** 2)


def problem(layer):
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 2, 2, 3)) / 2, rng.normal(size=3)
    x = rng.normal(size=(4, 5, 6, 2))
    size = convolved(x, kernel, layer)[0].size
    params = {"kernel": kernel, "bias": bias, "head": rng.normal(size=size)}
    return jax.tree.map(jnp.asarray, params), jnp.asarray(x)


def normal_matrix(params, x, layer):
    """AᵀA of everything that a change of the kernel and the bias moves, linearly, entry by entry.

    That is the outputs of the convolution, and of its transpose, whose inputs are the slopes'.
    """

    def outputs(kernel, bias):
        return convolved(x, kernel, layer) + bias

    z = outputs(params["kernel"], params["bias"])
    signal = (1 - jnp.tanh(z) ** 2) * params["head"].reshape(z.shape[1:])

    def transposed(kernel):
        return jax.linear_transpose(lambda x: convolved(x, kernel, layer), x)(signal)[0]

    n, shape = params["kernel"].size, params["kernel"].shape
    of_kernel, of_bias = jax.jacobian(outputs, (0, 1))(params["kernel"], params["bias"])
    forwards = np.concatenate([of_kernel.reshape(-1, n), of_bias.reshape(-1, shape[-1])], 1)
    backwards = jax.jacobian(transposed)(params["kernel"]).reshape(-1, n)
    backwards = np.concatenate([backwards, np.zeros((len(backwards), shape[-1]))], 1)
    return forwards.T @ forwards + backwards.T @ backwards


@pytest.mark.parametrize("options", [{"damping": 0.5, "relative_damping": 0.0}, {}])
@pytest.mark.parametrize("name", LAYERS)
def test_the_update_is_that_of_dense_least_squares(name, options):
    layer = LAYERS[name]
    params, x = problem(layer)
    tx = cqjax.scale_by_consequentialism(**options)
    differentiate = cqjax.value_and_grad(lambda params, x: penalty(params, x, layer))
    assert not {"kernel", "bias"} & differentiate.plan(params, x).uncovered().keys()
    _, grads, captures = differentiate(params, x)
    new, state = tx.update(grads, tx.init(params), params, captures=captures)
    normal = normal_matrix(params, x, layer)
    damping = options.get("damping", 0.1 * np.trace(normal) / len(normal))
    n = params["kernel"].size
    gradient = np.concatenate([grads["kernel"].ravel(), grads["bias"]])
    expected = np.linalg.solve(normal + damping * np.eye(len(normal)), len(x) * gradient)
    scale = 1e-9 * np.abs(expected).max()
    np.testing.assert_allclose(new["kernel"].ravel(), expected[:n], rtol=0, atol=scale)
    np.testing.assert_allclose(new["bias"], expected[n:], rtol=0, atol=scale)
    assert not state.fallbacks.any()
