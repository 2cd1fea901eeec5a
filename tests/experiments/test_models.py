"""The networks: LeNet against plain NumPy, the others' sizes and shortcuts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models import MLP, VGG, LeNet, ResNet

CIFAR = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)


def shapes(model, images=CIFAR):
    """Shapes of the parameters, by path."""
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def size(model):
    return sum(int(np.prod(shape)) for shape in shapes(model).values())


def test_he_initialisation():
    params = MLP(200, 2, 10).init(jax.random.key(0), np.zeros((1, 28, 28), np.float32))["params"]
    assert [params[f"Dense_{i}"]["kernel"].shape for i in range(3)] == [
        (784, 200),
        (200, 200),
        (200, 10),
    ]
    for layer in params.values():
        fan_in = len(layer["kernel"])
        assert layer["kernel"].std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        assert not layer["bias"].any()


def test_lenets_layers_are_those_of_the_papers_figure():
    assert shapes(LeNet()) == {
        "cv1/kernel": (5, 5, 3, 6),
        "cv2/kernel": (5, 5, 6, 16),
        "fc1/kernel": (400, 120),  # 25 positions
        "fc2/kernel": (120, 84),
        "fc3/kernel": (84, 10),
    }


def numpy_lenet(params, x, statistics):
    """LeNet's logits, and the batch's mean and variance of each layer.

    Zhang, Chen and Liu, Eqs. 19 and 24.
    """
    x, seen = np.float64(x), []
    for name in ("cv1", "cv2", "fc1", "fc2"):
        kernel = np.float64(params[name]["kernel"])
        if name.startswith("cv"):
            windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
            x = np.einsum("nyxcij,ijco->nyxo", windows, kernel)
        else:
            x = x.reshape(len(x), -1) @ kernel
        axes = tuple(range(x.ndim - 1))
        seen.append((x.mean(axes), x.var(axes)))
        mean, variance = statistics[len(seen) - 1] if statistics else seen[-1]
        x = np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0)
        if name.startswith("cv"):
            n, height, width, channels = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    return x @ np.float64(params["fc3"]["kernel"]), seen


def test_lenet_is_numpys_with_the_batchs_statistics_and_with_running_averages():
    model = LeNet((2, 3), (8, 6))
    images = np.random.default_rng(0).normal(size=(7, 32, 32, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), images)

    logits, state = model.apply(variables, images, train=True, mutable=["batch_stats"])
    expected, seen = numpy_lenet(variables["params"], images, None)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    averages = [  # they start from mean 0 and variance 1
        (0.1 * mean, 0.9 + 0.1 * variance) for mean, variance in seen
    ]
    for i, (mean, variance) in enumerate(averages):
        layer = state["batch_stats"][f"BatchNorm_{i}"]
        np.testing.assert_allclose(layer["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(layer["var"], variance, rtol=1e-4)
    logits = model.apply({"params": variables["params"], **state}, images)
    expected, _ = numpy_lenet(variables["params"], images, averages)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_has_the_original_but_for_two_layers_and_the_biases(depth):
    found = shapes(VGG(depth))
    assert all(path.endswith("kernel") for path in found)
    assert len(found) == depth - 2
    assert found["conv1_1/kernel"] == (3, 3, 3, 64) and found["fc/kernel"] == (512, 10)
    assert found["conv3_1/kernel"] == (3, 3, 128, 256)


def test_known_sizes():
    assert size(VGG(16)) == 14_710_464 + 512 * 10  # "VGG16 without top" less its 4,224 biases
    assert size(ResNet(20)) == 268_336  # He et al. count 0.27 million
    assert size(ResNet(56)) == 848_944  # and 0.85 million


@pytest.mark.parametrize(
    "model",
    [LeNet(), VGG(11), ResNet(8), ResNet(8, batch_norm=False)],
)
def test_logits_and_statistics(model):
    variables = jax.eval_shape(model.init, jax.random.key(0), CIFAR)

    def apply(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, state = jax.eval_shape(apply, variables, CIFAR)
    assert (logits.shape, logits.dtype) == ((2, 10), np.float32)
    layers = len(jax.tree.leaves(variables["params"]))
    normalised = getattr(model, "batch_norm", True)
    assert len(state.get("batch_stats", {})) == (layers - 1 if normalised else 0)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_resnet_whose_blocks_do_nothing_is_its_shortcuts(batch_norm):
    model = ResNet(8, width=4, batch_norm=batch_norm)
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    variables = model.init(jax.random.key(1), images)
    params = variables["params"]
    for name in params:
        if name.endswith("_conv2"):
            params[name]["kernel"] = jnp.zeros_like(params[name]["kernel"])
    logits = model.apply(variables, images)

    first = jax.lax.conv_general_dilated(
        images, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    means = np.maximum(first, 0)[:, ::4, ::4].mean(axis=(1, 2))  # 16 channels follow, of zeros
    if batch_norm:
        means /= np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(logits, means @ params["fc"]["kernel"][:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 6, 2), (2, 5, 7, 3), (1, 2, 3, 1)])
def test_pooling_is_flaxs(shape):
    """Values, and gradients where no two of a block are equal."""
    x, weights = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)

    def weighted(pool):
        def total(x):
            y = pool(x)
            return jnp.sum(y * weights[:, : y.shape[1], : y.shape[2]])

        return total

    theirs = weighted(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    ours = weighted(models._pool)
    assert ours(x) == pytest.approx(float(theirs(x)), rel=1e-6)
    np.testing.assert_array_equal(jax.grad(ours)(x), jax.grad(theirs)(x))
