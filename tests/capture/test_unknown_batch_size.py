"""Where N is unknown, messages and plans name the arrays by which it was looked for."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import cqjax

PARAMS, X = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))


def loss_fn(params, batch, *args, **kwargs):
    return jnp.sqrt(jnp.mean((batch["x"] @ params["w"]) ** 2))  # no mean of terms


ARGS = ({"x": X, "y": jnp.ones(7)}, jax.random.key(0), 3.0), {"weights": jnp.ones((5, 1))}
NAMED = "args[0]['x'] (4, 3), args[0]['y'] (7,), kwargs['weights'] (5, 1)"


def message(loss_fn, *args, params=PARAMS, value_and_grad=cqjax.value_and_grad, **kwargs):
    """What an update says, the captures having crossed `jax.jit`."""
    _, grads, captures = jax.jit(value_and_grad(loss_fn))(params, *args, **kwargs)
    tx = cqjax.csgd(0.1)
    with pytest.raises(ValueError, match="the batch size could not be inferred") as raised:
        tx.update(grads, tx.init(params), params, captures=captures)
    return str(raised.value)


def test_an_update_names_them():
    args, kwargs = ARGS
    assert f"leading dimension ({NAMED}). Pass" in message(loss_fn, *args, **kwargs)


def test_a_plan_names_them():
    args, kwargs = ARGS
    plan = cqjax.plan(loss_fn)(PARAMS, *args, **kwargs)
    assert "N = unknown: the loss is no sum or mean" in str(plan) and f"({NAMED})" in str(plan)
    with pytest.raises(ValueError, match=r"one leading dimension \(args\[0\]\['x'\] \(4, 3\), "):
        cqjax.back_matching_rates(plan, PARAMS)


def test_many_are_cut_short():
    batch = {"x": X, **{f"y{i}": jnp.ones(5 + i) for i in range(7)}}
    said = message(loss_fn, batch)
    assert "args[0]['y4'] (9,), 2 more)" in said and "y5" not in said


def test_none_at_all():
    assert "(there are no arrays among them)" in message(lambda p: loss_fn(p, {"x": X}))


def test_modules_do_not_count():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def loss(model, x, teacher, y):
        return jnp.sqrt(jnp.mean((model(x) - teacher(x)) ** 2)) + jnp.mean(y)

    plan = cqjax.nnx.plan(loss)(model, X, model, y=jnp.ones(7))
    assert plan.unknown == "args[0] (4, 3), kwargs['y'] (7,)"


def test_what_is_known_needs_none():
    assert not cqjax.plan(loss_fn)(PARAMS, {"x": X}).unknown
    assert not cqjax.plan(loss_fn, batch_size=4)(PARAMS, {"x": X, "y": jnp.ones(7)}).unknown
