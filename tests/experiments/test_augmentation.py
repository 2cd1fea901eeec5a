"""Flips and rotations, against NumPy and SciPy, and what they depend on."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from experiments.augmentation import augmenter, rotated
from experiments.history import History
from experiments.training import State, train

RNG = np.random.default_rng(0)
IMAGES = RNG.random((64, 6, 5, 3), np.float32)


def test_flips_mirror_about_half_of_the_images():
    got = np.asarray(augmenter(0)(jnp.int32(3), jnp.asarray(IMAGES)))
    same = [np.array_equal(a, b) for a, b in zip(got, IMAGES, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(got, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 20 < sum(mirrored) < 44


@pytest.mark.parametrize("shape", [(7, 7, 2), (8, 8, 1)])
def test_a_quarter_turn(shape):
    image = RNG.random(shape, np.float32)
    got = rotated(jnp.asarray(image), jnp.float32(np.pi / 2))
    np.testing.assert_allclose(got, np.rot90(image, -1), atol=1e-5)


@pytest.mark.parametrize("degrees", [-15.0, 4.0, 15.0])
def test_a_rotation_is_scipys(degrees):
    image, angle = IMAGES[0], np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (np.array(image.shape[:2]) - 1) / 2
    expected = np.stack(
        [
            scipy.ndimage.affine_transform(
                channel, turn, centre - turn @ centre, order=1, mode="nearest"
            )
            for channel in image.transpose(2, 0, 1)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(rotated(jnp.asarray(image), angle), expected, atol=1e-5)


def test_angles_fill_their_range_and_no_more():
    ramp = np.broadcast_to(np.arange(9, dtype=np.float32)[:, None, None], (300, 9, 9, 1))
    got = np.asarray(augmenter(2, flip=False, degrees=20)(jnp.int32(5), jnp.asarray(ramp)))
    down, right = got[:, 5, 4, 0] - got[:, 4, 4, 0], got[:, 4, 5, 0] - got[:, 4, 4, 0]
    angles = np.rad2deg(np.arctan2(-right, down))
    assert -20.01 < angles.min() < -18 and 18 < angles.max() < 20.01
    assert abs(angles.mean()) < 3


def test_changes_depend_on_the_seed_and_the_step_alone():
    options = {"degrees": 10.0}
    images = jnp.asarray(IMAGES)
    first = augmenter(0, **options)(jnp.int32(7), images)
    jitted = jax.jit(augmenter(0, **options))(jnp.int32(7), images)
    np.testing.assert_allclose(first, jitted, atol=1e-6)
    for other in (
        augmenter(0, **options)(jnp.int32(8), images),
        augmenter(1, **options)(jnp.int32(7), images),
    ):
        assert (np.asarray(first) != np.asarray(other)).mean() > 0.5
    np.testing.assert_array_equal(augmenter(0, flip=False)(jnp.int32(7), images), IMAGES)


def test_training_augments_each_step_anew_also_when_it_goes_on():
    augment, images = augmenter(4, degrees=10.0), jnp.asarray(IMAGES)
    labels, batches = jnp.zeros(64, jnp.int32), RNG.integers(0, 64, (9, 5), np.int32)

    def step(state, images, labels):
        return State(10 * state.params % 7 + images[0, 1, 1, 0], {}, ()), images.mean()

    start, halves = State(jnp.float32(0), {}, ()), []

    def keep(state, history):
        if history.steps == 4:
            halves.append((State(state.params.copy(), {}, ()), History.of(asdict(history))))

    def run(state, history=None):
        examples = images, labels
        return train(step, state, examples, batches, {}, keep, history=history, augment=augment)

    end, history = run(start)
    expected = np.float32(0)
    means = []
    for number, batch in enumerate(batches):
        some = np.asarray(augment(jnp.int32(number), images[batch]))
        expected = np.float32(10) * expected % np.float32(7) + some[0, 1, 1, 0]
        means.append(some.mean())
    np.testing.assert_allclose(end.params, expected, rtol=1e-4)
    np.testing.assert_allclose(history.batch_loss.value, means, rtol=1e-5)
    resumed, again = run(*halves[0])
    assert resumed.params == end.params and again.batch_loss.value == history.batch_loss.value
