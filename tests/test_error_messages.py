"""Errors of options, chains of layers and statistics: what was got, expected, and is to be done."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import cqjax
from cqjax import ChainLayer, back_matching_rates, scale_by_back_matching

PARAMS = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
X = jnp.ones((4, 3))


def chained(params, x):
    return jnp.mean((jax.nn.relu(x @ params["a"]) @ params["b"]) ** 2)


def branched(params, x):
    return jnp.mean((x @ params["a"] + x @ params["b"]) ** 2)


def repeated(params, x):
    hidden, _ = jax.lax.scan(lambda h, _: (h @ params["a"], None), x, length=2)
    return jnp.mean((hidden @ params["b"]) ** 2)


def shared(params, x):
    return jnp.mean((x @ params["a"] @ params["b"] @ params["a"]) ** 2)


def plan(loss=chained, x=X, **kwargs):
    return cqjax.plan(loss, **kwargs)(PARAMS, x)


def updated(tx, **kwargs):
    return tx.update(PARAMS, tx.init(PARAMS), **{"params": PARAMS} | kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nothing(cqjax.Statistic):
    """A statistic from which no length of outputs follows."""

    @classmethod
    def take(cls, site, trip):
        return cls()


MEASURED = {"factors": "measured", "plan": plan()}

ERRORS = {
    # name: (what is done, what is said)
    "rates of a description": (
        lambda: back_matching_rates([ChainLayer("a", 3, 3)], PARAMS, value_fn=jnp.sum),
        r"plan is a list: value_fn measures .* expected cqjax.plan\(loss_fn\)\(params, ...\)",
    ),
    "no such factors": (
        lambda: scale_by_back_matching(plan(), factors="exact"),
        "factors='exact': expected one of 'chain', 'measured'",
    ),
    "refreshed in between": (
        lambda: scale_by_back_matching(plan(), refresh_every=2.5),
        "refresh_every=2.5: expected a whole number, one or more",
    ),
    "no decay": (
        lambda: scale_by_back_matching(plan(), decay=1.0),
        "decay=1.0: expected a number from 0 to below 1",
    ),
    "measured without a plan": (
        lambda: scale_by_back_matching([ChainLayer("a", 3, 3)], factors="measured"),
        r'plan is a list: factors="measured" needs plan=, made by cqjax.plan\(loss_fn\)',
    ),
    "no plan": (
        lambda: updated(scale_by_back_matching()),
        r"scale_by_back_matching: no plan. Pass plan=cqjax.plan\(.* or captures= to update",
    ),
    "no parameters": (
        lambda: updated(scale_by_back_matching(plan()), params=None),
        r"scale_by_back_matching: no parameters; call update\(grads, state, params\)",
    ),
    "a bound without parameters": (
        lambda: updated(cqjax.clip_by_output_change(), params=None),
        r"clip_by_output_change: no parameters .*call update\(grads, state, params, captures=cap",
    ),
    "a bound without rows or their second moment": (
        lambda: updated(
            cqjax.clip_by_output_change(),
            captures=cqjax.value_and_grad(chained, capture=Nothing)(PARAMS, X)[2],
        ),
        "the second moment of a was not captured, only Nothing; pass capture=cqjax.Gram",
    ),
    "no loss to measure with": (
        lambda: updated(scale_by_back_matching(**MEASURED)),
        r'"measured"\): no loss to measure with. Call update\(.*value_fn=lambda params',
    ),
    "measured within a mask": (
        lambda: updated(
            optax.masked(scale_by_back_matching(**MEASURED), {"a": True, "b": False}),
            value_fn=lambda p: chained(p, X),
        ),
        r'"measured"\): some parameters are masked.* Place it outside .*; skip= of cqjax.plan',
    ),
    "a chain within a mask": (
        lambda: updated(optax.masked(scale_by_back_matching(plan()), {"a": True, "b": False})),
        "the parameters have no b, whose norm .* they are a. .*outside of the mask; skip= of cqj",
    ),
    "rates without a batch size": (
        lambda: back_matching_rates(
            cqjax.plan(lambda p, x, y: jnp.sqrt(chained(p, x)))(PARAMS, X, jnp.ones(7)), PARAMS
        ),
        "the batch size could not be inferred: .* Pass batch_size= to cqjax.plan or cqjax.value",
    ),
    "value_fn with auxiliary results": (
        lambda: back_matching_rates(plan(), PARAMS, value_fn=lambda p: (chained(p, X), 0)),
        r"value_fn returns a pair; expected the loss alone: lambda p: loss_fn\(p\)\[0\]",
    ),
    "value_fn of another loss": (
        lambda: back_matching_rates(plan(), PARAMS, value_fn=lambda p: jnp.mean(X @ p["a"])),
        r"value_fn's layers are a \(3, 3\); expected .* b \(3, 3\): make the plan of the same loss",
    ),
    "a description of other parameters": (
        lambda: back_matching_rates([ChainLayer("w", 3, 3)], PARAMS),
        r"a layer has a parameter 'w', which is not among the parameters \(a, b\): describe it by",
    ),
    "branches": (
        lambda: back_matching_rates(plan(branched), PARAMS),
        'form no chain: the loss reads a, b. Measure .* factors="measured"',
    ),
    "a loop": (
        lambda: back_matching_rates(plan(repeated), PARAMS),
        'form no chain: a feeds itself, in a loop. Measure .* factors="measured"',
    ),
    "a shared weight": (
        lambda: back_matching_rates(plan(shared), PARAMS),
        'form no chain: a is used by several layers. Measure .* factors="measured"',
    ),
    "captures of other parameters": (
        lambda: cqjax.csgd(0.1).update(
            {"w": X},
            cqjax.csgd(0.1).init({"w": X}),
            captures=cqjax.value_and_grad(chained)(PARAMS, X)[2],
        ),
        r"a parameter [ab], which is not among the updates \(w\): .* take both from the same call",
    ),
    "rows of a lookup": (
        lambda: cqjax.value_and_grad(lambda p, i: jnp.mean(p["a"][i]), solver="dual")(
            PARAMS, jnp.array([0, 1])
        )[2]["a"][0].rows(),
        r"rows of a were not captured, only .* \(a lookup's rows never are\)",
    ),
    **{
        f"precision={precision!r}": (
            lambda p=precision: cqjax.value_and_grad(chained, precision=p),
            r"precision=.*: expected what jax.lax.dot_general takes: 'highest', 'high', 'default'",
        )
        for precision in ("best", 3, ["highest"], ("high", "best"))
    },
}


@pytest.mark.parametrize("name", ERRORS)
def test_message(name):
    act, message = ERRORS[name]
    error = TypeError if name == "value_fn with auxiliary results" else ValueError
    with pytest.raises(error, match=message):
        act()


@pytest.mark.parametrize("make", [cqjax.plan, cqjax.value_and_grad])
@pytest.mark.parametrize("precision", [None, "high", jax.lax.Precision.DEFAULT, ("high", "high")])
def test_precision_as_jax_has_it(make, precision):
    make(chained, precision=precision)(PARAMS, X)


def test_a_parameter_that_was_not_captured():
    with pytest.raises(KeyError, match="w"):
        cqjax.value_and_grad(chained)(PARAMS, X)[2]["w"]
