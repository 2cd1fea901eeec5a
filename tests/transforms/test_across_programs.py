"""Statistics across batches under JAX's transformations, in Optax's chains; and what is refused."""

import contextlib
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import (
    DAMPING,
    DECAY,
    OPTIONS,
    inverses,
    joined,
    layer,
    quickly,
    rows_of,
    run,
    transformation,
)
from across_batches import program as linear_program
from across_batches import stepper as linear_stepper
from linear_layer import squared_error

import cqjax

# A network with a bias, a lookup and a stack. Every weight has many rows.

ROWS, STEPS = 48, 5


def loss_fn(params, x, ids, y):
    h = jnp.tanh(x @ params["w"] + params["b"][None]) + params["table"][ids]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    return jnp.mean(jnp.sum((h @ params["last"] - y) ** 2, -1))


def make(dtype=jnp.float32, seed=0):
    """(params, batches); the batches are stacked."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 4), "b": (4,), "table": (5, 4), "stack": (2, 4, 4), "last": (4, 2)}
    params = {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
    x, y = (jnp.asarray(rng.normal(size=(STEPS, ROWS, d)), dtype) for d in (3, 2))
    return params, (x, jnp.asarray(rng.integers(0, 5, (STEPS, ROWS))), y)


def chain(name, params, batches):
    batch = jax.tree.map(lambda a: a[0], batches)
    plan = cqjax.plan(loss_fn)(params, *batch)
    scale = cqjax.scale_by_consequentialism(
        damping=0.1, relative_damping=0.0, plan=plan, **OPTIONS[name]
    )
    return optax.chain(scale, optax.sgd(0.03, momentum=0.9))


def stepper(tx):
    def step(carry, batch):
        params, state = carry
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    return step


def train(step, carry, batches):
    for t in range(len(batches[0])):
        carry = step(carry, jax.tree.map(lambda a, t=t: a[t], batches))
    return carry


@functools.cache
def program(name):
    """The transformation and its jitted step, in float64."""
    tx = chain(name, *make(jnp.float64))
    return tx, quickly(stepper(tx))


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("average", jnp.bfloat16),
        ("kept", jnp.float32),
        ("different periods", jnp.bfloat16),
    ],
)
def test_one_program_takes_all_steps(name, dtype):
    """The state consists of arrays, in float32, whose shapes and dtypes stay."""
    params, batches = make(dtype)
    tx = chain(name, params, batches)
    state = tx.init(params)
    assert bool(state[0].moments) == ("ema_decay" in OPTIONS[name])
    assert bool(state[0].inverses) == ("update_every" in OPTIONS[name])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    kept = jax.tree.leaves((state[0].moments, [k.inverse for k in state[0].inverses.values()]))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}
    before = jax.tree.map(jnp.copy, (params, state))
    step = quickly(stepper(tx), donate_argnums=0)
    with strict():
        after = train(step, (params, state), batches)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert step._cache_size() == 1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert (after[1][0].count, after[1][0].fallbacks.sum()) == (STEPS, 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["kept", "different periods"])
def test_scan_over_steps_and_vmap_over_seeds(name):
    """Three networks in one program, states included, equal the same networks one by one."""
    params, batches = make(jnp.float64)
    tx, step = program(name)
    seeds = [params, *(jax.tree.map(lambda p, c=c: c * p, params) for c in (0.5, -0.8))]
    want = [train(step, (p, tx.init(p)), batches) for p in seeds]

    def one(params):
        carry = params, tx.init(params)
        return jax.lax.scan(lambda c, b: (stepper(tx)(c, b), None), carry, batches)[0]

    got = quickly(jax.vmap(one))(jax.tree.map(lambda *p: jnp.stack(p), *seeds))
    for i, one in enumerate(want):
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], got), one, rtol=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["kept", "different periods"])
def test_training_resumed_within_a_period(name):
    """From a file of NumPy arrays: bit for bit what it would have been."""
    params, batches = make(jnp.float64)
    tx, step = program(name)
    carry = params, tx.init(params)
    parts = [jax.tree.map(lambda a, s=s: a[s], batches) for s in (slice(2), slice(2, None))]
    halfway = train(step, carry, parts[0])
    stored = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, halfway)))
    leaves, _ = jax.tree.flatten(stored)
    restored = jax.tree.unflatten(jax.tree.structure(carry), map(jnp.asarray, leaves))
    want = train(step, halfway, parts[1])
    for resumed in (restored, stored):
        chex.assert_trees_all_equal(train(step, resumed, parts[1]), want)


# In a chain.


def run_in(wrapped):
    """`run`, of what a linear layer's transformation is wrapped in."""
    params, batches = layer((40, 25, 40, 40))
    return batches, run(wrapped, linear_stepper(squared_error, wrapped), params, batches)[0]


def wanted(results, batches, name, *, bias=True, handed=lambda grads: grads, damping=DAMPING):
    """[W; b] of the updates: the inverses, applied to what is handed over."""
    made = inverses([rows_of(b, bias) for b in batches], damping, **OPTIONS[name])
    for (grads, _), inverse in zip(results, made, strict=True):
        h = handed(grads)
        yield inverse @ joined(h if bias else {"w": h["w"]})


NAMES = ["average", "kept", "different periods"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("how", "name"), [*(("masked", name) for name in NAMES), ("partition", "different periods")]
)
def test_weights_without_their_biases(how, name):
    """XᵀX is without the constant feature then, and a bias gets what is due to it elsewhere."""
    tx, _ = linear_program(name)
    if how == "masked":
        wrapped = optax.masked(tx, {"w": True, "b": False})
    else:
        wrapped = optax.partition({0: tx, 1: optax.scale(3.0)}, {"w": 0, "b": 1})
    batches, results = run_in(wrapped)
    want = wanted(results, batches, name, bias=False)
    for (grads, updates), w in zip(results, want, strict=True):
        np.testing.assert_allclose(updates["w"], w, rtol=1e-8)
        b = grads["b"] * (1.0 if how == "masked" else 3.0)
        np.testing.assert_allclose(updates["b"], b, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_masked_weights_have_no_statistics():
    wrapped = optax.masked(linear_program("different periods")[0], {"w": False, "b": True})
    state = wrapped.init(layer((40,))[0]).inner_state
    assert not state.moments and not state.inverses
    for grads, updates in run_in(wrapped)[1]:
        chex.assert_trees_all_equal(updates, grads)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_handed_over_is_preconditioned(name):
    """A clipped gradient, with weight decay added."""
    before = optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.3))
    params, _ = layer((40,))

    def handed(grads):
        return before.update(grads, before.init(params), params)[0]

    batches, results = run_in(optax.chain(before, linear_program(name)[0]))
    for (_, updates), both in zip(
        results, wanted(results, batches, name, handed=handed), strict=True
    ):
        np.testing.assert_allclose(joined(updates), both, rtol=1e-8)


STATIC = ("plan", "update_every", "capture_every")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_injected_hyperparameters(name):
    """Dampings and the decay are arrays of the state then; the rest is static."""
    params, (batch,) = layer((40,))
    plan = cqjax.plan(squared_error)(params, *batch)
    inject = optax.inject_hyperparams(cqjax.scale_by_consequentialism, static_args=STATIC)
    given = {"damping": optax.linear_schedule(1.0, 5.0, 4), "relative_damping": 0.0}
    tx = inject(**given, plan=plan, **OPTIONS[name])
    assert ("ema_decay" in tx.init(params).hyperparams) == ("ema_decay" in OPTIONS[name])
    batches, results = run_in(tx)
    want = wanted(results, batches, name, damping=lambda t, xx: 1.0 + t)
    for (_, updates), both in zip(results, want, strict=True):
        np.testing.assert_allclose(joined(updates), both, rtol=1e-8)


# What is refused.


@pytest.fixture
def linear():
    params, (batch,) = layer((40,))
    return params, batch


@pytest.mark.parametrize("name", OPTIONS)
def test_without_a_plan(name):
    with pytest.raises(ValueError, match=r"keep statistics.*pass plan=cqjax.plan\(loss_fn\)"):
        cqjax.scale_by_consequentialism(**OPTIONS[name])


@pytest.mark.parametrize("value", [0, -2, 2.0, "3", jnp.asarray(3)])
@pytest.mark.parametrize("argument", ["update_every", "capture_every"])
def test_bad_periods(linear, argument, value):
    params, batch = linear
    with pytest.raises(ValueError, match=rf"^{argument}=.*expected a positive.*static_args"):
        transformation(params, batch, ema_decay=DECAY, **{argument: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 2.0, float("nan")])
def test_bad_decays(linear, value):
    params, batch = linear
    with pytest.raises(ValueError, match=rf"^ema_decay={value}: expected .*less than 1"):
        transformation(params, batch, ema_decay=value)


def test_capture_every_without_an_average(linear):
    params, batch = linear
    with pytest.raises(ValueError, match="^capture_every=2 without ema_decay: .*update_every"):
        transformation(params, batch, update_every=2, capture_every=2)


def test_periods_that_are_injected_must_be_static(linear):
    params, batch = linear
    plan = cqjax.plan(squared_error)(params, *batch)
    inject = optax.inject_hyperparams(cqjax.scale_by_consequentialism, static_args="plan")
    with pytest.raises(ValueError, match='update_every=2: .*inject_hyperparams: static_args="upd'):
        inject(plan=plan, update_every=2).init(params)


def test_a_plan_that_was_not_made(linear):
    """`cqjax.plan(loss_fn)` is a method yet."""
    plan = cqjax.plan(squared_error)
    with pytest.raises(TypeError, match="plan.*method.*expected"):
        cqjax.scale_by_consequentialism(plan=plan, ema_decay=DECAY).init(linear[0])


def two(params, x):
    return jnp.mean(x @ params["w"]) + jnp.mean(x @ params["v"])


def first(params, x):
    return jnp.mean(x @ params["w"]) + jnp.sum(params["v"] ** 2)


def narrow(params, x):
    return two(jax.tree.map(lambda p: p[:2], params), x[:, :2])


def none(params, x):
    return jnp.sum(params["w"] ** 2) + jnp.sum(params["v"] ** 2)


@pytest.mark.parametrize("options", [OPTIONS["average"], OPTIONS["kept average"]])
@pytest.mark.parametrize(
    ("planned", "evaluated", "message"),
    [
        (two, first, "statistics of v, which was not captured; make the plan with the same loss"),
        (first, two, "v was captured, but is not in the plan.*; make the plan with the same loss"),
        (narrow, two, r"shape \(1, 2, 2\) for [vw]; expected \(1, 3, 3\): make the plan with the"),
        (none, two, "[vw] was captured, but is not in the plan.*; make the plan with the same"),
    ],
    ids=["missing", "extra", "other shape", "empty"],
)
def test_a_plan_of_another_loss(planned, evaluated, message, options):
    params, x = {"w": jnp.ones((3, 2)), "v": jnp.ones((3, 2))}, jnp.ones((8, 3))
    tx = cqjax.scale_by_consequentialism(plan=cqjax.plan(planned)(params, x), **options)

    def update(params, x):
        _, grads, captures = cqjax.value_and_grad(evaluated)(params, x)
        return tx.update(grads, tx.init(params), captures=captures)

    with pytest.raises(ValueError, match=f"^scale_by_consequentialism: .*{message}"):
        jax.eval_shape(update, params, x)


def test_a_plan_of_another_loss_without_an_average():
    """An inverse that was to be kept, of a weight that is not captured or has another shape."""
    params, x = {"w": jnp.ones((3, 2)), "v": jnp.ones((3, 2))}, jnp.ones((80, 3))
    tx = cqjax.scale_by_consequentialism(plan=cqjax.plan(two)(params, x), update_every=9)
    state = tx.init(params)
    assert set(state.inverses) == {"v", "w"}
    _, grads, captures = cqjax.value_and_grad(first)(params, x)
    with pytest.raises(ValueError, match="statistics of v, which was not captured; make the plan"):
        tx.update(grads, state, captures=captures)
    _, grads, captures = cqjax.value_and_grad(narrow)(params, x)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 3\) for [vw]; expected \(1, 2, 2\)"):
        tx.update(grads, state, captures=captures)
