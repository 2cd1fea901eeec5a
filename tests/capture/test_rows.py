"""Rows that the loss leaves out are no examples. Those that all share are of all examples.

References are float64 NumPy on the rows that are left.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from row_updates import (
    ABSOLUTE,
    OUT,
    PARAMS,
    RELATIVE,
    RNG,
    B,
    D,
    T,
    X,
    Y,
    assert_close,
    exact,
    losses,
    net,
    normal,
    of_rows,
    ridge,
    updates,
)

import cqjax

MASK = jnp.asarray(RNG.uniform(size=(B, T)) < 0.5, jnp.float32)

MASKED = {
    "product": lambda p, x, y, m: jnp.sum(losses(p, x, y) * m) / jnp.sum(m),
    "where": lambda p, x, y, m: jnp.mean(losses(p, x, y), where=m > 0),
    "selected": lambda p, x, y, m: jnp.where(m > 0, losses(p, x, y), 0).sum() / m.sum(),
    "weights": lambda p, x, y, m: jnp.sum(losses(p, x, y) * (m / m.sum())),
    "rematerialised": lambda p, x, y, m: jnp.sum(jax.checkpoint(losses)(p, x, y) * m) / jnp.sum(m),
    "jitted": lambda p, x, y, m: jnp.sum(jax.jit(losses)(p, x, y) * m) / jnp.sum(m),
    "vmapped": lambda p, x, y, m: (
        jnp.sum(jax.vmap(jax.vmap(losses, (None, 0, 0)), (None, 0, 0))(p, x, y) * m) / jnp.sum(m)
    ),
    "flat": lambda p, x, y, m: (
        jnp.sum(losses(p, x.reshape(-1, D), y.reshape(-1, OUT)) * m.ravel()) / m.sum()
    ),
    "padded": lambda p, x, y, m: (
        jnp.sum(jnp.pad(losses(p, x, y), ((0, 2), (0, 0)))[:B] * m) / jnp.sum(m)
    ),
}


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("name", MASKED)
def test_masked_rows_are_no_examples(name, solver):
    left = np.asarray(MASK, bool)
    want = of_rows(PARAMS, X[left], Y[left])
    assert_close(updates(MASKED[name], PARAMS, (X, Y, MASK), solver=solver), want)


@pytest.mark.parametrize("jit", [False, True])
def test_a_padded_batch_has_the_update_of_its_own_rows(jit):
    """Five rows, and eleven of something else."""
    x, y = normal(16, D), normal(16, OUT)
    valid = jnp.arange(16) < 5

    def loss_fn(p, x, y, valid):
        return jnp.mean(losses(p, x, y), where=valid)

    got = updates(loss_fn, PARAMS, (x, y, valid), jit)
    assert_close(got, of_rows(PARAMS, x[:5], y[:5]))


def test_the_part_of_an_output_that_the_loss_takes():
    """As in Q-learning, where the next states go through the network with the states."""

    def one_pass(p, x, y):
        both = net(p, jnp.concatenate([x, y @ jnp.ones((OUT, D))]))
        value, after = both[: len(x)], both[len(x) :]
        return jnp.mean(jnp.sum((value - jax.lax.stop_gradient(after)) ** 2, -1))

    def two_passes(p, x, y):
        after = jax.lax.stop_gradient(net(p, y @ jnp.ones((OUT, D))))
        return jnp.mean(jnp.sum((net(p, x) - after) ** 2, -1))

    x, y = X[:, 0], Y[:, 0]
    want = of_rows(PARAMS, x, net(PARAMS, y @ jnp.ones((OUT, D))))
    for loss_fn in (one_pass, two_passes):
        assert_close(updates(loss_fn, PARAMS, (x, y)), want)
        assert_close(updates(loss_fn, PARAMS, (x, y), solver="primal"), want)


@pytest.mark.parametrize("how", ["indexed", "along axis", "one-hot", "optax"])
def test_masked_rows_of_a_classifier(how):
    labels = jnp.asarray(RNG.integers(0, OUT, 12))
    x, m = normal(12, D), jnp.arange(12) % 3 > 0

    def loss_fn(p, x, labels, m):
        logs = jax.nn.log_softmax(net(p, x))
        if how == "indexed":
            chosen = logs[jnp.arange(len(labels)), labels]
        elif how == "along axis":
            chosen = jnp.take_along_axis(logs, labels[:, None], 1)[:, 0]
        elif how == "one-hot":
            chosen = jnp.sum(logs * jax.nn.one_hot(labels, OUT), -1)
        else:
            chosen = -optax.softmax_cross_entropy_with_integer_labels(net(p, x), labels)
        return -jnp.sum(chosen * m) / m.sum()

    got = updates(loss_fn, PARAMS, (x, labels, m))
    left = np.asarray(m)
    assert_close(got, exact(updates(loss_fn, PARAMS, (x[left], labels[left], m[left]))))


def test_rows_that_are_picked_are_not_taken_for_counted_ones():
    """Where the index is not the row's own, a masked row may feed a term that counts."""
    labels, m = jnp.zeros(12, int), jnp.arange(12) < 4
    x, other = normal(12, D), jnp.arange(12)[::-1]

    def loss_fn(p, x, labels, m, other):
        logs = jax.nn.log_softmax(net(p, x))
        chosen = logs[jnp.where(m, other, jnp.arange(12)), labels]
        return -jnp.sum(chosen * m) / m.sum()

    _, _, captures = jax.jit(cqjax.value_and_grad(loss_fn))(PARAMS, x, labels, m, other)
    assert all(capture.number is None or capture.number >= 12 for capture in captures.blocks)


def test_a_linear_layer_reaches_its_targets_where_half_is_masked():
    x, y = normal(16, 20), normal(16, 3)
    kept = jnp.arange(16) % 2

    def loss_fn(w, x, y):
        return 0.5 * jnp.sum(jnp.sum((x @ w - y) ** 2, -1) * kept) / kept.sum()

    w, tx = jnp.zeros((20, 3)), cqjax.scale_by_consequentialism(relative_damping=0.0)
    for _ in range(2):
        loss, grads, captures = cqjax.value_and_grad(loss_fn, solver="dual")(w, x, y)
        u, _ = tx.update(grads, tx.init(w), captures=captures)
        w = w - u
    assert loss < 1e-8


def test_an_example_that_is_right_already_keeps_its_say():
    x = X[:, 0]
    y = Y[:, 0].at[:3].set(net(PARAMS, x)[:3])
    got = updates(lambda p, x, y: jnp.mean(losses(p, x, y)), PARAMS, (x, y))
    assert_close(got, of_rows(PARAMS, x, y))


def test_images_of_padding():
    kernel = {"k": normal(3, 3, 2, 4), "b": normal(4)}
    images, y, valid = normal(8, 6, 6, 2), normal(8, 6, 6, 4), jnp.arange(8) < 3

    def loss_fn(p, x, y, valid):
        z = jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.sum((z + p["b"] - y) ** 2, (1, 2, 3)), where=valid)

    def whole(p, x, y):
        return loss_fn(p, x, y, True)

    for solver in ("primal", "dual"):
        got = updates(loss_fn, kernel, (images, y, valid), solver=solver)
        assert_close(got, exact(updates(whole, kernel, (images[:3], y[:3]), solver=solver)))


def test_masked_tokens_are_not_looked_up():
    table = {"t": normal(9, OUT)}
    tokens = jnp.asarray(RNG.integers(0, 9, (B, T)))

    def loss_fn(p, tokens, y, m):
        return jnp.sum(jnp.sum((p["t"][tokens] - y) ** 2, -1) * m) / m.sum()

    got = updates(loss_fn, table, (tokens, Y, MASK))
    left = np.asarray(MASK, bool)
    x = np.eye(9)[np.asarray(tokens)[left]]
    signal = 2 * (x @ exact(table)["t"] - exact(Y)[left]) / len(x)
    assert_close(got, {"t": ridge(x, signal, len(x))})


def test_what_attention_mixes_counts_for_the_whole_sequence():
    """Keys of masked tokens have a say in the others' outputs; sequences of padding have none."""
    p = {"q": normal(D, D), "k": normal(D, D), "v": normal(D, OUT)}

    def loss_fn(p, x, y, m):
        scores = jnp.einsum("btd,bsd->bts", x @ p["q"], x @ p["k"])
        z = jax.nn.softmax(scores, -1) @ (x @ p["v"])
        return jnp.sum(jnp.sum((z - y) ** 2, -1) * m) / m.sum()

    m = MASK.at[:2].set(0).at[2:, 0].set(1)
    _, _, captures = cqjax.value_and_grad(loss_fn)(p, X, Y, m)
    assert captures["q"][0].number == m.sum()
    assert captures["k"][0].number == captures["v"][0].number == (B - 2) * T
    whole = updates(loss_fn, p, (X[2:], Y[2:], m[2:]))
    assert_close(updates(loss_fn, p, (X, Y, m)), exact(whole))


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_a_weight_of_shared_rows_and_of_the_examples_own(solver):
    """A class token beside the patches: every example has a copy of its row."""
    p = {"w": normal(D, OUT)}
    token = normal(1, 1, D)

    def shared(p, x, y):
        patches, cls = x @ p["w"], token @ p["w"]
        z = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, OUT)), patches], 1)
        return jnp.mean(jnp.sum((z - y) ** 2, -1))

    y = normal(B, T + 1, OUT)
    rows = np.concatenate([np.broadcast_to(token, (B, 1, D)), X], 1).reshape(-1, D).astype(float)
    signal = 2 * (rows @ exact(p)["w"] - exact(y).reshape(-1, OUT)) / len(rows)
    want = {"w": ridge(rows, signal, len(rows))}
    for jit in (False, True):
        assert_close(updates(shared, p, (X, y), jit, solver=solver), want)


@pytest.mark.parametrize("number", [12, 13])
def test_what_is_closed_over_is_data_where_nothing_repeats_it(number):
    """A graph's features in a closure, and the labels of its nodes as an argument."""
    features, labels = normal(number, D), normal(number, OUT)
    adjacency = jnp.asarray(RNG.uniform(size=(number, number)) < 0.3, jnp.float32)
    p = {"w": normal(D, OUT)}

    def loss_fn(p, y):
        return jnp.mean(jnp.sum((adjacency @ (features @ p["w"]) - y) ** 2, -1))

    w, x, a, y = exact((p["w"], features, adjacency, labels))
    signal = a.T @ (2 * (a @ x @ w - y) / number)
    want = {"w": ridge(x, signal, number)}
    for jit in (False, True):
        assert_close(updates(loss_fn, p, (labels,), jit), want)


@pytest.mark.parametrize("points", [24, 25])
def test_collocation_points_that_are_closed_over(points):
    p, inside, x, y = {"w": normal(D, OUT)}, normal(points, D), normal(8, D), normal(8, OUT)

    def loss_fn(p, x, y):
        return jnp.mean(jnp.sum((x @ p["w"] - y) ** 2, -1)) + jnp.mean(
            jnp.sum((inside @ p["w"]) ** 2, -1)
        )

    w, a, b, target = exact((p["w"], x, inside, y))
    rows = np.concatenate([a, b])
    signal = np.concatenate([2 * (a @ w - target) / 8, 2 * (b @ w) / points])
    want = {"w": ridge(rows, signal, points)}  # the larger of the two means
    for jit in (False, True):
        assert_close(updates(loss_fn, p, (x, y), jit), want)


def test_positions_are_shared_whether_traced_or_not():
    p = {"t": normal(T, OUT), "w": normal(D, OUT)}
    numbers = np.arange(T)

    def loss_fn(p, x, y):
        return jnp.mean(jnp.sum((x @ p["w"] + p["t"][numbers] - y) ** 2, -1))

    w, t, x, y = exact((p["w"], p["t"], X, Y))
    error = 2 * (x @ w + t - y)
    want = {"t": error.mean(0) / (1 + (ABSOLUTE + RELATIVE))}
    for jit in (False, True):
        assert_close(updates(loss_fn, p, (X, Y), jit), want)


def test_padding_and_shared_rows():
    """Of the examples that share a row, those of padding are none."""
    p, valid = {"t": normal(T, OUT), "w": normal(D, OUT)}, jnp.arange(B) < 4

    def loss_fn(p, x, y, valid):
        each = jnp.sum((x @ p["w"] + p["t"][jnp.arange(T)] - y) ** 2, (1, 2))
        return jnp.mean(each, where=valid)

    def whole(p, x, y):
        return loss_fn(p, x, y, True)

    got = updates(loss_fn, p, (X, Y, valid))
    assert_close(got, exact(updates(whole, p, (X[:4], Y[:4]))))


def test_no_mask_costs_nothing():
    """The program has no operation that a loss without masks would not need."""

    def loss_fn(p, x, y):
        return jnp.mean(losses(p, x, y))

    _, _, captures = cqjax.value_and_grad(loss_fn)(PARAMS, X[:, 0], Y[:, 0])
    assert all(capture.number is None for capture in captures.blocks)


def test_training_with_padding_is_training_without():
    """Twenty steps of C-Adam."""
    x, y = normal(5, D), normal(5, OUT)
    padded = jnp.pad(x, ((0, 11), (0, 0)), constant_values=3.0), jnp.pad(y, ((0, 11), (0, 0)))

    def trained(loss_fn, args):
        tx = cqjax.cadam(1e-2)

        def step(carry, _):
            p, state = carry
            loss, grads, captures = cqjax.value_and_grad(loss_fn)(p, *args)
            u, state = tx.update(grads, state, p, captures=captures)
            return (optax.apply_updates(p, u), state), loss

        return jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=20)[1])()

    without = trained(lambda p, x, y: jnp.mean(losses(p, x, y)), (x, y))
    valid = jnp.arange(16) < 5
    got = trained(lambda p, x, y: jnp.mean(losses(p, x, y), where=valid), padded)
    np.testing.assert_allclose(got, without, rtol=1e-3)


@pytest.mark.parametrize("scale", [np.float32(0.5), jnp.float32(0.5), 0.5])
def test_a_scale_is_no_mask(scale):
    _, _, captures = cqjax.value_and_grad(lambda p, x, y: scale * jnp.mean(losses(p, x, y)))(
        PARAMS, X, Y
    )
    assert captures.batch_size == B * T
    assert all(capture.number is None for capture in captures.blocks)
