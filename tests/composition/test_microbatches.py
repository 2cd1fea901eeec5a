"""Microbatches, in the loss and in separate calls, give the whole batch's update."""

import functools

import jax
import jax.numpy as jnp
import linear_layer
import numpy as np
import optax
import pytest
from across_batches import quickly
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_layer import squared_error
from sklearn.datasets import load_digits
from two_layers import DAMPING, assert_close, loss_fn, problem

import cqjax

RATE = 0.1


def joined(batches):
    return tuple(jnp.concatenate(arrays) for arrays in zip(*batches, strict=True))


def tokens_loss(params, tokens, x, y):
    """Two lookups, of which all examples share one; a shared layer, a scanned stack, a gain."""

    def layer(h, w):
        return jnp.tanh(h @ w["kernel"] + w["bias"]), None

    h = params["table"][tokens] * params["gain"] + x + params["position"][jnp.arange(2)]
    h = jnp.tanh(h @ params["shared"])
    h, _ = jax.lax.scan(layer, jnp.tanh(h @ params["shared"]), params["stack"])
    return jnp.sum((h @ params["out"] - y) ** 2) / len(x)


def tokens_problem(sizes):
    rng = np.random.default_rng(0)
    params = {
        "table": rng.normal(size=(7, 4)),
        "position": rng.normal(size=(3, 4)),
        "gain": rng.normal(size=4),
        "shared": rng.normal(size=(4, 4)),
        "stack": {"kernel": rng.normal(size=(2, 4, 4)), "bias": rng.normal(size=(2, 4))},
        "out": rng.normal(size=(4, 2)),
    }
    batches = [
        (rng.integers(0, 7, (n, 2)), rng.normal(size=(n, 2, 4)), rng.normal(size=(n, 2, 2)))
        for n in sizes
    ]
    return jax.tree.map(jnp.asarray, (params, batches))


def stepper(loss_fn, tx, **options):
    differentiate = cqjax.value_and_grad(loss_fn, **options)

    def step(params, state, *batch):
        _, grads, captures = differentiate(params, *batch)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    return quickly(step)


def run(tx, loss_fn, params, batches, **options):
    state, step = tx.init(params), stepper(loss_fn, tx, **options)
    visited = []
    for batch in batches:
        params, state = step(params, state, *batch)
        visited.append(params)
    return visited, state


def plans(loss_fn, params, batches, **options):
    return cqjax.plan(loss_fn, **options)(params, *joined(batches))


INNER = {
    "csgd": lambda plan: cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None),
    "relative": lambda plan: cqjax.csgd(RATE, damping=0.0, relative_damping=0.1, max_change=None),
    "bounded": lambda plan: cqjax.cmomentum(RATE, max_change=0.02),
    "back-matching": lambda plan: optax.chain(
        cqjax.scale_by_back_matching(), optax.sgd(RATE, momentum=0.9)
    ),
    "across": lambda plan: optax.chain(
        cqjax.scale_by_consequentialism(
            damping=DAMPING, plan=plan, update_every=2, ema_decay=0.7, relative_damping=0.0
        ),
        optax.sgd(RATE),
    ),
    "kernels": lambda plan: optax.partition(
        {
            "ours": cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None),
            "adam": optax.adam(RATE),
        },
        lambda params: jax.tree.map(lambda p: "ours" if p.ndim == 2 else "adam", params),
    ),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.usefixtures("float64")
def test_separate_calls(name):
    """Two updates from microbatches of unequal sizes are those from two whole batches."""
    params, batches = problem((4, 9, 9, 9, 4, 9))
    plan = plans(loss_fn, params, batches[:3])
    inner = INNER[name](plan)
    got, state = run(cqjax.multi_steps(inner, 3, plan=plan), loss_fn, params, batches)
    assert state.gradient_step == 2 and state.mini_step == 0 and state.batch_size == 0
    want, _ = run(inner, loss_fn, params, [joined(batches[:3]), joined(batches[3:])])
    for i in (0, 1):
        assert_close(got[i], params, rtol=0)
        assert_close(got[3 + i], got[2], rtol=0)
    assert_close([got[2], got[5]], want)


@pytest.mark.usefixtures("float64")
def test_a_batch_smaller_than_the_plans():
    """Its rows are counted: for the mean eigenvalue, and since they do not span the features."""
    params, batches = problem((9, 9, 1, 2, 9, 9))
    plan = plans(loss_fn, params, batches[:2])
    inner = optax.chain(
        cqjax.scale_by_consequentialism(relative_damping=0.1, plan=plan, update_every=2),
        optax.sgd(RATE),
    )
    got, state = run(cqjax.multi_steps(inner, 2, plan=plan), loss_fn, params, batches)
    assert state.inner_state[0].inverses
    wholes = [joined(batches[i : i + 2]) for i in (0, 2, 4)]
    want, _ = run(inner, loss_fn, params, wholes, solver="primal")
    assert_close(got[1::2], want)


@pytest.mark.usefixtures("float64")
def test_split_over_devices():
    """Each microbatch over two devices, by `shard_map`, with the plan of the whole batch on one."""
    params, batches = problem((8, 8))
    tx = cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None)
    split = cqjax.multi_steps(tx, 2, plan=plans(loss_fn, params, batches))
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=kinds, devices=jax.devices()[:2])
    whole, parts = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def local_loss(params, x, y):
        return jax.lax.pmean(loss_fn(params, x, y), "data")

    def step(params, state, x, y):
        _, grads, captures = cqjax.value_and_grad(local_loss)(params, x, y)
        updates, state = split.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    specs = (whole, whole, parts, parts)
    mapped = quickly(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=whole))
    got, state = params, split.init(params)
    for batch in batches:
        got, state = mapped(got, state, *batch)
    assert_close(got, run(tx, loss_fn, params, [joined(batches)])[0][0])


@pytest.mark.usefixtures("float64")
def test_what_is_not_finite_ends_with_its_batch():
    params, batches = problem((6, 6, 6, 6))
    bad = (batches[0][0].at[0, 0].set(jnp.nan), batches[0][1])
    plan = plans(loss_fn, params, batches[:2])
    tx = cqjax.multi_steps(
        cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None), 2, plan=plan
    )
    got, state = run(tx, loss_fn, params, [bad, *batches[1:]])
    assert jnp.sum(state.inner_state[0].fallbacks) > 0
    want, _ = run(
        cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None),
        loss_fn,
        got[1],
        [joined(batches[2:])],
    )
    assert_close(got[3], want[0])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("float64")
def test_lookups_shared_and_scanned_layers(reduction):
    params, batches = tokens_problem((5, 5))

    def loss(params, tokens, x, y):
        return tokens_loss(params, tokens, x, y) * (len(x) if reduction == "sum" else 1)

    options = {"loss_reduction": reduction}
    plan = plans(loss, params, batches, **options)
    assert [b.name for b in plan.blocks if b.shared] == ["position"]
    tx = cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0)
    got, _ = run(cqjax.multi_steps(tx, 2, plan=plan), loss, params, batches, **options)
    want, _ = run(tx, loss, params, [joined(batches)], **options)
    if reduction == "sum":  # of what is not solved for, the mean over the microbatches
        want[0]["gain"] = params["gain"] + (want[0]["gain"] - params["gain"]) / 2
    assert_close(got[1], want[0])


@pytest.mark.parametrize("options", [{"max_dim": 3, "block_size": 3}, {"skip": "c/w"}])
@pytest.mark.usefixtures("float64")
def test_options_of_capture(options):
    params, batches = problem((5, 7))
    options = {**options, "solver": "primal"}
    tx = cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None)
    plan = plans(loss_fn, params, batches, **options)
    got, _ = run(cqjax.multi_steps(tx, 2, plan=plan), loss_fn, params, batches, **options)
    want, _ = run(tx, loss_fn, params, [joined(batches)], **options)
    assert_close(got[1], want[0])


@functools.cache
def linear(k, d):
    """The transformation and its step for a linear layer with a bias."""
    plan = cqjax.plan(squared_error)(*linear_layer.problem(k, d, 2, bias=True))
    tx = cqjax.multi_steps(
        cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0), k, plan=plan
    )
    return tx, stepper(squared_error, tx)


@given(st.lists(st.sampled_from([1, 2, 7]), min_size=1, max_size=3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_sizes(sizes, seed):
    """Against NumPy's solve for the whole batch."""
    with jax.enable_x64(True):
        initial, x, y = linear_layer.problem(sum(sizes), 3, 2, bias=True, seed=seed)
        tx, step = linear(len(sizes), 3)
        params, state = initial, tx.init(initial)
        ends = np.cumsum(sizes)
        for start, end in zip(ends - sizes, ends, strict=True):
            params, state = step(params, state, x[start:end], y[start:end])
        update = linear_layer.expected(initial, x, y, DAMPING)
        assert_close(params, jax.tree.map(jnp.add, initial, update))


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("how", ["scan", "optax"])
@pytest.mark.usefixtures("float64")
def test_in_the_loss(how, solver):
    """Grams add, rows stack; with the dual, nlms too."""
    params, batches = problem((4, 4, 4))
    x, y = joined(batches)

    def scanned(params, x, y):
        parts = jax.tree.map(lambda a: a.reshape(3, 4, *a.shape[1:]), (x, y))

        @jax.checkpoint
        def add(total, part):
            return total + loss_fn(params, *part) / 3, None

        return jax.lax.scan(add, jnp.zeros(()), parts)[0]

    by_optax = optax.microbatching.microbatch(
        jax.checkpoint(loss_fn), (1, 2), 4, optax.microbatching.AccumulationType.MEAN
    )
    micro = scanned if how == "scan" else by_optax
    for tx in (
        cqjax.csgd(RATE, damping=DAMPING, relative_damping=0.0, max_change=None),
        cqjax.nlms(RATE),
    )[: 1 + (solver == "dual")]:
        got, _ = run(tx, micro, params, [(x, y)], solver=solver)
        want, _ = run(tx, loss_fn, params, [(x, y)], solver=solver)
        assert_close(got, want)


@pytest.mark.parametrize("draw", range(5))
def test_how_far_off_the_last_rows_alone_are(draw):
    """Digits, 64 → 10 without bias, from zero, λ = 1e-3, four microbatches of 16: in float64."""
    images, labels = load_digits(return_X_y=True)
    of_batch = np.random.default_rng(draw).permutation(len(images))[:64]
    x, y = images[of_batch] / 16, np.eye(10)[labels[of_batch]]

    def update(rows):
        xx = rows.T @ rows + 1e-3 * np.eye(64)
        return len(rows) * np.linalg.solve(xx, x.T @ -y / len(x))

    def loss(w):
        return 0.5 * np.mean(np.sum((x @ w - y) ** 2, 1))

    whole, last = update(x), update(x[-16:])
    # as docs/composition.md says
    assert 169 < np.linalg.norm(last) / np.linalg.norm(whole) < 341
    assert loss(0 * whole) == 0.5 and loss(-0.5 * whole) < 0.16 and loss(-0.5 * last) > 1e5
