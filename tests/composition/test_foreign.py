"""Captures that belong to something else: refused where that is certain, else counted by cosine."""

import functools
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly
from sklearn.datasets import load_digits
from two_layers import gradient, loss_fn, problem

import cqjax
from cqjax.capture import origins
from cqjax.solves.layer import Layer

OURS = cqjax.scale_by_consequentialism()
SGD = optax.scale(-0.1)


def adam(steps):
    """The updates of Adam at the last of several batches."""

    def of(params, batches):
        tx = optax.scale_by_adam()
        state = tx.init(params)
        for batch in batches[-steps:]:
            updates, state = tx.update(gradient(params, *batch)[0], state)
        return updates

    return of


def at(params, batches, i=-1):
    return gradient(params, *batches[i])[0]


def near(params, share):
    """Parameters that are `share` of the way to others."""
    other = problem((6,), seed=9)[0]
    return jax.tree.map(lambda a, b: (1 - share) * a + share * b, params, other)


CHANGED = {
    "the gradient": at,
    "scaled": lambda p, b: jax.tree.map(lambda g: -0.01 * g, at(p, b)),
    "weak decay": lambda p, b: jax.tree.map(lambda g, p: g + 1e-3 * p, at(p, b), p),
    "strong decay": lambda p, b: jax.tree.map(lambda g, p: g + 10 * p, at(p, b), p),
    "zero": lambda p, b: jax.tree.map(jnp.zeros_like, at(p, b)),
    "other batch": lambda p, b: at(p, b, 0),
    "other parameters": lambda p, b: at(near(p, 1.0), b),
    "mean of microbatches": lambda p, b: jax.tree.map(
        lambda *g: sum(g) / len(g), *(at(p, b, i) for i in range(len(b)))
    ),
    "adam": adam(3),
    "a sign": adam(1),
}
NEVER = ("the gradient", "scaled", "weak decay", "zero")


def cosine(a, b):
    a, b = np.ravel(a), np.ravel(b)
    return abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) if a.any() else 1.0


@functools.cache
def captured(solver):
    params, batches = problem((6, 6, 6))
    return cqjax.value_and_grad(loss_fn, solver=solver)(params, *batches[-1])[-1]


@quickly
def two_updates(updates, captures):
    """The counts after both."""
    state = OURS.init(updates)
    for _ in range(2):
        _, state = OURS.update(updates, state, captures=captures)
    return state.foreign


def by_path(counts, tree):
    paths = [
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree.leaves_with_path(tree)
    ]
    return dict(zip(paths, counts.tolist(), strict=True))


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.usefixtures("float64")
def test_counted_by_the_cosine(name, solver):
    """Across a `jit`, where nothing is known but the numbers: by layer, at its weight."""
    params, batches = problem((6, 6, 6))
    updates = jax.tree.map(jnp.asarray, CHANGED[name](params, batches))
    found = by_path(two_updates(updates, captured(solver)), updates)
    right = at(params, batches)
    want = {layer: 2 * (cosine(updates[layer]["w"], right[layer]["w"]) < 0.9) for layer in "ac"}
    assert found == {"a/b": 0, "a/w": want["a"], "c/b": 0, "c/w": want["c"], "gain": 0}
    assert any(want.values()) == (name not in NEVER)


def step(tx, params, batch, change=lambda grads: grads):
    _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *batch)
    return tx.update(change(grads), tx.init(params), params, captures=captures)


def test_costs_nothing_in_one_trace(monkeypatch):
    """What is the gradient by identity is not looked at."""

    def cosine(self):
        raise AssertionError("computed")

    monkeypatch.setattr(Layer, "cosine", cosine)
    params, (batch,) = problem((6,))
    jax.eval_shape(lambda: step(OURS, params, batch))
    step(OURS, params, batch)
    with pytest.raises(AssertionError, match="computed"):
        jax.eval_shape(lambda: step(OURS, params, batch, lambda g: jax.tree.map(jnp.sign, g)))


@pytest.mark.parametrize("make", [lambda plan: OURS, lambda plan: cqjax.scale_by_nlms(),
                                  lambda plan: cqjax.multi_steps(OURS, 2, plan=plan)],
                         ids=["ours", "nlms", "multi_steps"])  # fmt: skip
def test_warns_outside_of_jit(make):
    params, batches = problem((6, 6))
    differentiate = cqjax.value_and_grad(loss_fn, capture=cqjax.Rows)
    tx = make(differentiate.plan(params, *batches[0]))
    _, grads, captures = differentiate(params, *batches[0])
    wrong = jax.tree.map(lambda g: 1.0 * g, differentiate(params, *batches[1])[1])
    right = jax.tree.map(lambda g: 0.5 * g, grads)
    tx.update(right, tx.init(params), params, captures=captures)
    with pytest.warns(UserWarning, match=r"the updates of .* point elsewhere.*same call"):
        tx.update(wrong, tx.init(params), params, captures=captures)


def test_rounding_is_no_other_direction():
    params, (batch,) = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), problem((6,)))
    _, state = jax.jit(lambda: step(optax.chain(optax.scale(1e-3), OURS), params, batch))()
    assert state[1].foreign.sum() == 0


def test_what_is_no_second_solve():
    """Masks that share out the layers; and two optimizers of one gradient."""
    params, (batch,) = problem((6,))
    only_a = {"a": True, "c": False, "gain": False}
    rest = jax.tree.map(lambda chosen: not chosen, only_a)
    parts = optax.chain(optax.masked(OURS, only_a), optax.masked(OURS, rest))
    _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *batch)
    got, want = (tx.update(grads, tx.init(params), captures=captures)[0] for tx in (parts, OURS))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_copies_of_captures_are_taken():
    params, (batch,) = problem((6,))
    _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *batch)
    copied = jax.tree.map(jnp.copy, captures)
    got, want = (OURS.update(grads, OURS.init(params), captures=c)[0] for c in (copied, captures))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_nothing_is_kept_alive():
    params, (batch,) = problem((6,))
    gc.collect()
    before = set(origins._known)
    with jax.checking_leaks():
        jax.jit(lambda: step(OURS, params, batch)[0])()
    updates, _ = step(OURS, params, batch)
    assert set(origins._known) - before
    del updates
    gc.collect()
    assert set(origins._known) <= before


def test_report():
    params, batches = problem((6, 6))

    @quickly
    def run(wrong):
        _, _, captures = cqjax.value_and_grad(loss_fn)(params, *batches[0])
        updates, state = OURS.update(wrong, OURS.init(params), params, captures=captures)
        return cqjax.diagnostics.report(captures, updates, opt_state=state)

    found = run(cqjax.value_and_grad(loss_fn)(params, *batches[1])[1])
    assert [int(layer.foreign) for layer in found.layers.values()] == [1, 1]
    header, _, *rows = str(found).splitlines()
    assert "  foreign  " in header
    assert all(row[header.index("foreign") :].split()[0] == "1" for row in rows)


def rows_of_the_document():
    """The range of cosines that docs/composition.md gives, by what comes in."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "composition.md").read_text()
    table = text.partition("| what comes in (H) |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]
    return {name: [float(end) for end in ends.split(" to ")] for _, name, ends, *_ in rows}


@pytest.mark.parametrize("rows", [8, 128])
def test_cosines_of_the_document(rows):
    """64 → 10 on digits, at its first step, with a softmax in NumPy."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 10)) / 8

    def gradient():
        of_batch = rng.choice(len(images), rows, replace=False)
        x, y = images[of_batch] / 16, np.eye(10)[labels[of_batch]]
        odds = np.exp(x @ w)
        return x.T @ (odds / odds.sum(1, keepdims=True) - y) / rows

    *others, g = (gradient() for _ in range(4))
    ranges = rows_of_the_document()
    limit = np.abs(g).mean()
    for name, update in {
        "weight decay 1e-4, 5e-4": g + 5e-4 * w,
        "weight decay 1e-2": g + 1e-2 * w,
        "clipping by entry, at the mean entry": g.clip(-limit, limit),
        "centralised gradients": g - g.mean(0),
        "the sign of the gradient (Adam's first step)": np.sign(g),
        "another batch": others[0],
        "mean of four microbatches": (sum(others) + g) / 4,
    }.items():
        least, most = ranges[name]
        assert least - 0.005 <= cosine(update, g) <= most + 0.005, name
