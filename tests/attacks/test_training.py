"""One bad batch in a training run, for every optimizer: finite, counted, and what follows it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly

import cqjax

SIZES = (4, 6, 6, 2)
ROWS = 32
GOOD = 8
"""Batches before the bad one; twice as many follow."""


def loss_fn(params, x, y, spoil):
    """Three layers; `spoil` is added to the second one's input."""
    h = jax.nn.relu(x @ params["w0"] + params["b0"]) + spoil
    h = jax.nn.relu(h @ params["w1"] + params["b1"])
    z = h @ params["w2"] + params["b2"]
    return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, -1))


def make(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {}
    for i, (d, o) in enumerate(zip(SIZES, SIZES[1:], strict=False)):
        params[f"w{i}"] = jnp.asarray(rng.normal(size=(d, o)) / d**0.5, dtype)
        params[f"b{i}"] = jnp.zeros(o, dtype)
    x = rng.normal(size=(ROWS, SIZES[0]))
    y = np.stack([np.sin(x[:, 0]), x[:, 1] * x[:, 2]], 1)
    batch = x, y, np.zeros((ROWS, SIZES[1]))
    return params, tuple(jnp.asarray(a, dtype) for a in batch)


def chain(rate, **options):
    def optimizer(plan):
        given = options | {"plan": plan} if options else {}
        return optax.chain(
            cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0, **given),
            optax.sgd(rate),
        )

    return optimizer


def conjugate(plan):
    return optax.chain(cqjax.scale_by_conjugate_gradient(), optax.scale(-0.05))


def rates(plan):
    return cqjax.back_matching_sgd(0.02, plan=plan)


OPTIMIZERS = {
    # name: (how statistics are captured, the optimizer of a plan)
    "dual": ({"solver": "dual"}, chain(0.05)),
    "primal": ({"solver": "primal"}, chain(0.05)),
    "momentum": (
        {},
        lambda plan: cqjax.cnesterov(0.01, damping=0.1, relative_damping=0.0, max_change=None),
    ),
    "kept": ({"solver": "primal"}, chain(0.05, update_every=3)),
    "average": ({"solver": "primal"}, chain(0.05, ema_decay=0.5)),
    "kept average": ({}, chain(0.05, ema_decay=0.5, update_every=2, capture_every=2)),
    "matched": ({"signal": "matched"}, chain(0.05)),
    "nlms": ({"solver": "dual"}, lambda plan: cqjax.nlms(0.005, 1e-2)),
    "back-matching's rates": ({}, rates),
    "lsalr": ({}, lambda plan: cqjax.lsalr(0.02)),
    "conjugate gradient": ({}, conjugate),
}
CONSEQUENTIALISM = list(OPTIMIZERS)[:7]


@functools.cache
def program(name, dtype=jnp.float32):
    """(optimizer, jitted step) of an optimizer."""
    kwargs, optimizer = OPTIMIZERS[name]
    params, batch = make(dtype)
    tx = optimizer(cqjax.plan(loss_fn, **kwargs)(params, *batch))

    def step(params, state, *batch):
        loss, grads, captures = cqjax.value_and_grad(loss_fn, **kwargs)(params, *batch)
        update = optax.with_extra_args_support(tx).update
        updates, state = update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state, loss

    return tx, quickly(step)


class Run(NamedTuple):
    """Losses before each step, the last parameters and state, and what the bad step counted."""

    losses: list
    params: dict
    state: object
    counted: np.ndarray


def counts(state):
    found = [np.asarray(n) for _, n in optax.tree.get_all_with_path(state, "fallbacks")]
    return found[0] if found else np.zeros(6, int)


def train(name, attack, when=GOOD, dtype=jnp.float32):
    tx, step = program(name, dtype)
    params, batch = make(dtype)
    state, losses, counted = tx.init(params), [], None
    for t in range(3 * GOOD):
        before = counts(state)
        taken = attack(*batch) if t == when else batch
        params, state, loss = step(params, state, *taken)
        losses.append(float(loss))
        if t == when:
            counted = counts(state) - before
        assert all(np.isfinite(p).all() for p in jax.tree.leaves(params)), t
    return Run(losses, params, state, counted)


def spoil_with(value):
    return lambda x, y, spoil: (x, y, spoil.at[3, 2].set(value))


def inputs(change):
    return lambda x, y, spoil: (change(x), y, spoil)


ATTACKS = {
    "NaN": spoil_with(jnp.nan),
    "infinity": spoil_with(jnp.inf),
    "zeros": inputs(jnp.zeros_like),
    "duplicates": inputs(lambda x: jnp.broadcast_to(x[:1], x.shape)),
    "1e18": inputs(lambda x: 1e18 * x),
    "1e-18": inputs(lambda x: 1e-18 * x),
    "ill-conditioned": inputs(lambda x: x[:, :1] + 1e-12 * x),
}
ALIKE = ("zeros", "duplicates", "1e-18", "ill-conditioned")
"""Batches whose rows are all nearly the same."""
LEFT_BEHIND = {
    # float32 holds no intercept of outputs of 1e18, and a gradient of 1e36 is no update
    *((name, "1e18") for name in OPTIMIZERS if name not in ("dual", "nlms")),
    # a method for whole objectives, not batches
    ("conjugate gradient", "duplicates"),
}
"""What stays finite, but does not recover within the run."""


def bad_step(name):
    """A step in which what is kept is renewed."""
    return GOOD + 1 if name == "kept" else GOOD


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_batch(name, attack):
    """Parameters stay finite, and training goes on."""
    run = train(name, ATTACKS[attack], bad_step(name))
    if attack in ("NaN", "infinity"):
        assert not np.isfinite(run.losses[bad_step(name)])
    if (name, attack) not in LEFT_BEHIND:
        assert run.losses[-1] < 0.8 * run.losses[0]


@pytest.mark.parametrize("name", CONSEQUENTIALISM)
def test_what_is_counted(name):
    """In the leaves b0, b1, b2, w0, w1, w2.

    A NaN in the second layer's input is one in its and the next one's outputs. (The derivative of
    relu is 0 there: the first layer hears nothing of it, but of an infinity it does.)
    """
    for attack, want in (("NaN", [0, 0, 0, 0, 1, 1]), ("infinity", [0, 0, 0, 1, 1, 1])):
        assert train(name, ATTACKS[attack], bad_step(name)).counted.tolist() == want
    for attack in ALIKE:  # of which no inverse is kept: it would be 1/λ along other rows
        counted = train(name, ATTACKS[attack], bad_step(name)).counted
        assert counted[3] == (name == "kept") and (name == "kept" or counted.sum() == 0)


@pytest.mark.parametrize("name", ["kept", "average", "kept average"])
def test_what_the_first_batch_does_not_give_the_next_one_does(name):
    """A NaN at the start costs one update, not a period."""
    run = train(name, ATTACKS["NaN"], when=0)
    assert counts(run.state).tolist() == [0, 0, 0, 0, 1, 1]
    assert run.losses[-1] < 0.8 * run.losses[1]


def test_an_ensemble_under_vmap_inverts_only_where_one_is_due():
    """Whether a member lacks an inverse is asked of all: a condition remains a condition."""
    tx = program("kept")[0]
    params, batch = make()
    seeds = jax.tree.map(lambda p: jnp.stack([p, -p]), params)

    def one(params):
        def step(state, _):
            _, grads, captures = cqjax.value_and_grad(loss_fn, solver="primal")(params, *batch)
            return tx.update(grads, state, params, captures=captures)[1], None

        return jax.lax.scan(step, tx.init(params), length=5)[0]

    jaxpr = jax.make_jaxpr(jax.vmap(one))(seeds)
    assert "cholesky" in str(jaxpr) and "cholesky" not in {e.primitive.name for e in always(jaxpr)}


def always(jaxpr):
    """The equations that are evaluated whatever the conditions are."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        if eqn.primitive.name != "cond":
            for value in eqn.params.values():
                if hasattr(getattr(value, "jaxpr", value), "eqns"):
                    yield from always(value)


@pytest.mark.parametrize("name", ["average", "kept average"])
def test_what_is_left_out_of_an_average_is_counted(name):
    """XᵀX overflows in the first layer and is infinite in the others; the average is as before."""
    tx, step = program(name)
    params, batch = make()
    state = tx.init(params)
    for _ in range(2):  # the next one is due
        params, state, _ = step(params, state, *batch)
    x, y, spoil = batch
    _, after, _ = step(params, state, x.at[0, 0].set(1e20), y, spoil)
    assert (counts(after) - counts(state))[3] == 1
    np.testing.assert_array_equal(after[0].moments["w0"].total, state[0].moments["w0"].total)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["dual", "primal", "nlms"])
def test_16_bit_models(name, dtype):
    """They learn, count nothing, and survive a NaN."""
    run = train(name, lambda *batch: batch, dtype=dtype)
    assert run.losses[-1] < 0.8 * run.losses[0] and counts(run.state).sum() == 0
    assert {p.dtype for p in jax.tree.leaves(run.params)} == {jnp.dtype(dtype)}
    spoiled = train(name, ATTACKS["NaN"], dtype=dtype)
    assert spoiled.losses[-1] < 0.8 * spoiled.losses[0]
