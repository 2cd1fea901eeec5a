"""A jaxpr as a flat list of steps: what is written once, what is needed, what depends on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import cqjax
from cqjax.program.steps import Kind, flatten

W, XS = jnp.arange(16.0).reshape(4, 4) / 16, jnp.ones((3, 5, 4))


def scanned(w, v, xs):
    """A weight handed on as it is, a changing carry, one that nobody reads, and a stack."""

    same = jax.jit(lambda w: w)  # else JAX itself makes it a constant

    def body(carry, x):
        w, total, unread = carry
        return (same(w), total + jnp.mean(x @ w), unread + jnp.mean(x @ v)), jnp.tanh(x)

    (_, total, _), ys = jax.lax.scan(body, (w, 0.0, 0.0), xs)
    return total, ys


def branched(w, v, xs):
    return jax.lax.cond(xs.sum() > 0, lambda h: h @ w, lambda h: h @ v, xs[0])


def called(w, v, xs):
    inner = jax.jit(lambda h: jax.checkpoint(jnp.tanh)(h @ w))
    return inner(inner(xs[0])) @ v


FUNCTIONS = [scanned, branched, called]


def program(fn):
    return flatten(jax.make_jaxpr(fn)(W, W, XS))[0]


def kinds(fn):
    return [step.kind for step in program(fn).steps if step.kind is not Kind.EQUATION]


def names(fn, variables):
    """The primitives of the equations that write some of these."""
    return {
        step.equation.primitive.name
        for step in program(fn).steps
        if step.kind is Kind.EQUATION and not set(step.writes).isdisjoint(variables)
    }


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_every_variable_is_written_once_and_before_it_is_read(fn):
    """Only what a trip leaves for the next is read before."""
    flat, _ = flatten(jax.make_jaxpr(fn)(W, W, XS))
    known = {*flat.inputs, *flat.literals}
    for step in flat.steps:
        reads = step.reads[:1] if step.kind is Kind.CARRY else step.reads
        assert known.issuperset(reads)
        assert known.isdisjoint(step.writes)
        known.update(step.writes)
    assert known.issuperset(flat.outputs)


def test_borders():
    """A carry that the body hands on as it is enters like a constant."""
    assert kinds(scanned) == [
        Kind.ENTER,  # v
        Kind.SLICE,
        Kind.ENTER,  # w
        *[Kind.CARRY] * 2,
        *[Kind.LAST] * 2,
        Kind.STACK,
    ]
    assert kinds(branched) == [Kind.ENTER, Kind.ENTER, Kind.JOIN]
    assert kinds(called) == []


def test_a_call_leaves_its_steps_only():
    steps = program(called).steps
    assert [s.equation.primitive.name for s in steps].count("dot_general") == 3
    assert [s.recomputed for s in steps if s.equation.primitive.name == "tanh"] == [True, True]


def test_loops_and_positions():
    (product, *_) = (
        s for s in program(scanned).steps if s.equation.primitive.name == "dot_general"
    )
    assert product.loops == (3,)
    assert len(product.position) == 2


def test_needed():
    """The total needs the product with w, and not that with v, nor the stack."""
    flat = program(scanned)
    needed = flat.needed(flat.outputs[:1])
    w, v, xs = flat.inputs
    assert {w, xs} <= needed and v not in needed
    assert "dot_general" in names(scanned, needed) and "tanh" not in names(scanned, needed)
    assert v not in flat.needed(flat.outputs) and "tanh" in names(
        scanned, flat.needed(flat.outputs)
    )


def test_dependent():
    """From trip to trip too: the total depends on every slice."""
    flat = program(scanned)
    w, v, xs = flat.inputs
    assert {flat.outputs[0], flat.outputs[1]} <= flat.dependent({xs})
    assert flat.outputs[0] in flat.dependent({w})
    assert flat.outputs[1] not in flat.dependent({w}) | flat.dependent({v})
    condition = program(branched)
    assert set(condition.outputs) <= condition.dependent(condition.inputs[2:])


def test_constants_within_an_opaque_body_count():
    table = np.arange(4.0)
    flat, constants = flatten(
        jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: c + table, x))(
            jnp.ones(4)
        )
    )
    held = {number for number, const in constants if np.array_equal(const, table)}
    assert set(flat.outputs) <= flat.dependent(held)


def test_no_values_are_kept():
    """So a plan outlives its trace: nothing in a program is an array or a jaxpr."""
    for name in ("scan_layers", "mlp", "conv_same"):
        loss_fn, params, args = zoo.by_name(name).make()
        for step in flatten(jax.make_jaxpr(loss_fn)(params, *args))[0].steps:
            for param in jax.tree.leaves(dict(step.equation.params)):
                assert not isinstance(param, jax.Array | np.ndarray)
                assert not hasattr(getattr(param, "jaxpr", param), "eqns")


# What the walk makes of scans.


def dead(params, xs):
    """A carry whose last value nobody reads has a product with v; so has what is stacked."""

    def body(carry, x):
        _, total = carry
        return (jnp.tanh(x @ params["v"]), total + jnp.mean(x @ params["w"])), x @ params["v"]

    return jax.lax.scan(body, (xs[0], 0.0), xs)[0][1]


def handed_on(params, xs):
    """w is handed from trip to trip as it is, through a call."""
    same = jax.jit(lambda w: w)

    def body(carry, x):
        w, total = carry
        return (same(w), total + jnp.mean(jnp.tanh(x @ w))), None

    w, total = jax.lax.scan(body, (params["w"], 0.0), xs)[0]
    return total + jnp.mean(xs[0] @ w @ params["v"])


def exchanged(params, xs):
    """The first trip has w, the others v."""

    def body(carry, x):
        w, total = carry
        return (params["v"], total + jnp.mean(jnp.tanh(x @ w))), None

    return jax.lax.scan(body, (params["w"], 0.0), xs)[0][1]


PARAMS = {"w": W, "v": W.T + 1}


def statuses(loss_fn):
    return {p.path: (p.status, p.notes) for p in cqjax.plan(loss_fn)(PARAMS, XS).parameters}


def test_what_the_loss_does_not_depend_on_is_no_site():
    assert statuses(dead) == {
        "v": ("uncovered", ("is not reached by the loss",)),
        "w": ("covered", ()),
    }


def test_a_weight_handed_on_as_it_is():
    """Its rows are those of all trips, and of the product after them."""
    assert statuses(handed_on)["w"][0] == "covered"
    _, grads, captures = cqjax.value_and_grad(handed_on, capture=cqjax.Rows, batch_size=20)(
        PARAMS, XS
    )
    (capture,) = captures["w"]
    rows = capture.rows()
    assert rows.x.shape == (1, 3 * 5 + 5, 4)
    np.testing.assert_allclose(rows.x[0].T @ rows.dz[0], grads["w"], rtol=1e-5)


def stacked_again(params, xs):
    """Each trip has a weight of its own, and returns it."""
    same = jax.jit(lambda w: w)

    def body(total, trip):
        w, x = trip
        return total + jnp.mean(jnp.tanh(x @ w)), same(w)

    total, ws = jax.lax.scan(body, 0.0, (params["ws"], xs))
    return total + jnp.sum(ws**2)


def test_weights_that_a_scan_returns():
    """Their gradient is not only that of the products: with decay, say."""
    params = {"ws": jnp.stack([W, W.T, W + 1])}
    (parameter,) = cqjax.plan(stacked_again)(params, XS).parameters
    assert parameter.status == "partly covered"
    assert parameter.notes == ("is returned by a scan",)


def test_a_weight_that_a_trip_replaces():
    assert statuses(exchanged) == {
        "v": ("uncovered", ("is returned by a scan",)),
        "w": ("uncovered", ("is changed from trip to trip of a scan",)),
    }


def no_trips(params, xs):
    """Without trips, the loss is that of the first value: x w, and not x."""
    first = xs[0] @ params["w"]
    last = jax.lax.scan(lambda c, _: (jnp.zeros_like(c) + xs[0], None), first, None, length=0)[0]
    return jnp.mean(last**2) + jnp.mean(xs[1] @ params["w"] @ params["v"])


def no_trips_of_weights(params, xs):
    first = 2 * params["w"]
    last = jax.lax.scan(lambda c, _: (params["v"], None), first, None, length=0)[0]
    return jnp.mean(xs[0] @ last) + jnp.mean(xs[1] @ params["w"])


def test_a_scan_without_trips_returns_its_first_value():
    _, grads, captures = cqjax.value_and_grad(no_trips, capture=cqjax.Rows, batch_size=20)(
        PARAMS, XS
    )
    assert {capture.block.exact for capture in captures.blocks} == {True}
    rows = captures["w"][0].rows()
    assert rows.x.shape == (1, 10, 4)
    np.testing.assert_allclose(rows.x[0].T @ rows.dz[0], grads["w"], rtol=1e-5)
    _, _, captures = cqjax.value_and_grad(no_trips_of_weights, capture=cqjax.Rows, batch_size=20)(
        PARAMS, XS
    )
    assert captures["w"][0].rows().x.shape == (1, 10, 4)


def by_platform(params, xs):
    """Of the results, one comes of the batch, the other of constants and of v."""

    def both(x, ones, v):
        return 2 * x, ones @ v

    x, row = jax.lax.platform_dependent(xs, jnp.ones((1, 4)), params["v"], cpu=both, default=both)
    return jnp.mean((x @ params["w"] + row @ params["w"]) ** 2)


def test_branches_for_platforms():
    """Taps cannot follow into them. What depends on the batch is known all the same."""
    assert statuses(by_platform) == {
        "v": ("uncovered", ("enters a branch for one platform",)),
        "w": ("covered", ()),
    }
    (block,) = cqjax.plan(by_platform)(PARAMS, XS).blocks
    assert [site.shared for site in block.sites] == [False, True]
