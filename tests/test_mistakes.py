"""Mistakes of the first hour: each ends in a message that says what to do."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.training import train_state

import cqjax

PARAMS, X = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))


def loss_fn(params, x):
    return jnp.mean((x @ params["w"]) ** 2)


def differentiated(params=PARAMS):
    return cqjax.value_and_grad(loss_fn)(params, X)


MODULE = r"the parameters hold a Linear, a module of flax.nnx, .*; use cqjax.nnx.value_and_grad"


@pytest.mark.parametrize("make", [cqjax.value_and_grad, lambda f: cqjax.plan(f)])
@pytest.mark.parametrize("within", [lambda m: m, lambda m: {"layers": [m]}])
def test_a_module_of_nnx(make, within):
    params = within(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=MODULE):
        make(lambda model, x: jnp.mean(x))(params, X)


def test_flaxs_own_train_state():
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=cqjax.cadam())
    _, grads, captures = differentiated()
    with pytest.raises(ValueError, match=r"no captures were .*cqjax.training.TrainState does"):
        state.apply_gradients(grads=grads, captures=captures)


@pytest.mark.parametrize(
    "tx",
    [
        cqjax.csgd(0.1),
        cqjax.cadam(),
        cqjax.nlms(0.1),
        cqjax.scale_by_learning_rates(0.1, 0.1),
        optax.chain(optax.clip(1.0), cqjax.scale_by_consequentialism()),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_dictionaries_and_others(tx, frozen):
    """A FrozenDict of parameters with a dict of gradients, or the reverse; two of a kind work."""
    kinds = [PARAMS, freeze(PARAMS)]
    own, other = kinds[frozen], kinds[not frozen]
    _, grads, captures = cqjax.value_and_grad(loss_fn, solver="dual")(own, X)
    state = tx.init(own)
    updates, _ = tx.update(grads, state, own, captures=captures)
    assert type(optax.apply_updates(own, updates)) is type(own)
    names = f"a {type(own).__name__} and the parameters a {type(other).__name__}, .*unfreeze"
    with pytest.raises(ValueError, match=names):
        tx.update(grads, tx.init(other), other, captures=captures)


@pytest.mark.parametrize(("leaf", "kind"), [("relu", "str"), ("float32", "str"), (len, "builtin")])
def test_a_leaf_that_is_no_array(leaf, kind):
    message = f"^the parameter layers/name is a {kind}.*; expected an array. Pass what is not train"
    params = {"layers": {"name": leaf}, **PARAMS}
    for make in (cqjax.plan, cqjax.value_and_grad):
        with pytest.raises(TypeError, match=message):
            make(loss_fn)(params, X)


RATES = {
    "csgd": ("learning_rate", cqjax.csgd),
    "cmomentum": ("learning_rate", cqjax.cmomentum),
    "cnesterov": ("learning_rate", cqjax.cnesterov),
    "crmsprop": ("learning_rate", cqjax.crmsprop),
    "cadam": ("learning_rate", cqjax.cadam),
    "without a limit": ("learning_rate", lambda rate: cqjax.csgd(rate, max_change=None)),
    "uncovered": (
        "uncovered_learning_rate",
        lambda rate: cqjax.cadam(uncovered_learning_rate=rate or ()),
    ),
    "nlms": ("learning_rate", cqjax.nlms),
    "lsalr": ("learning_rate", cqjax.lsalr),
    "back_matching_sgd": ("learning_rate", cqjax.back_matching_sgd),
    "covered": ("covered", lambda rate: cqjax.scale_by_learning_rates(rate, 0.1)),
    "others": ("uncovered", lambda rate: cqjax.scale_by_learning_rates(0.1, rate)),
    "clip": ("learning_rate", lambda rate: cqjax.clip_by_output_change(learning_rate=rate)),
    "max_change": ("max_change", cqjax.clip_by_output_change),
    "damping": ("damping", lambda rate: cqjax.scale_by_consequentialism(damping=rate)),
    "weight_decay": ("weight_decay", lambda rate: cqjax.cadam(weight_decay=rate)),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("value", ["0.1", None, [0.1]])
def test_a_rate_that_is_no_number(name, value):
    argument, make = RATES[name]
    with pytest.raises(TypeError, match=rf"^{argument}=.*: expected a number, or a schedule"):
        make(value)


@pytest.mark.parametrize("rate", [0.1, 1, np.float32(0.1), jnp.float32(0.1), lambda count: 0.1])
def test_rates_of_every_kind(rate):
    tx = cqjax.cadam(rate, uncovered_learning_rate=rate, weight_decay=0.1)
    _, grads, captures = differentiated()
    tx.update(grads, tx.init(PARAMS), PARAMS, captures=captures)
