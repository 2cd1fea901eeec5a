"""What is refused, with the message that docs/composition.md quotes."""

import functools
import pathlib

import jax.numpy as jnp
import optax
import pytest

import cqjax

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "composition.md"


def loss_fn(params, x):
    return jnp.mean((x @ params["w"]) ** 2)


def joined_loss(params, x):
    return jnp.mean((x @ jnp.concatenate([params["a"], params["b"]], 1)) ** 2)


ARGS = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
OURS = cqjax.scale_by_consequentialism()


def plan(**options):
    return cqjax.plan(loss_fn, **options)(*ARGS)


def update(tx, params=None, loss=loss_fn, *, captured=True, **extra):
    """One update, of parameters that need not be those of the loss."""
    own = {"a": jnp.ones((3, 1)), "b": jnp.ones((3, 1))} if loss is joined_loss else ARGS[0]
    value, grads, captures = cqjax.value_and_grad(loss)(own, ARGS[1])
    params = own if params is None else params
    extra = {**extra, "captures": captures} if captured else extra
    tx.update(grads, tx.init(params), params, **extra)


def looked_ahead(wrap=lambda tx: tx):
    pair = optax.LookaheadParams.init_synced(ARGS[0])
    update(wrap(optax.lookahead(OURS, 2, 0.5)), pair)


def searched(search):
    value, grads = 1.0, ARGS[0]
    tx = optax.chain(OURS, optax.scale(-1.0), search)
    update(tx, value=value, grad=grads, value_fn=lambda params: loss_fn(params, ARGS[1]))


def update_with_captures_of_another_call():
    (_, grads, _), (*_, captures) = (cqjax.value_and_grad(loss_fn)(*ARGS) for _ in range(2))
    OURS.update(grads, OURS.init(ARGS[0]), captures=captures)


def back_matched():
    tx = cqjax.scale_by_back_matching(plan(), factors="measured")
    update(optax.masked(tx, {"w": False}), value_fn=lambda params: loss_fn(params, ARGS[1]))


REFUSED = {
    "no captures": (ValueError, lambda: update(OURS, captured=False)),
    "a wrapper in a chain": (ValueError, lambda: looked_ahead(optax.chain)),
    "lookahead": (TypeError, looked_ahead),
    "sam": (TypeError, lambda: update(optax.contrib.sam(OURS, optax.sgd(0.1)))),
    "backtracking": (TypeError, lambda: searched(optax.scale_by_backtracking_linesearch(5))),
    "zoom": (TypeError, lambda: searched(optax.scale_by_zoom_linesearch(5))),
    "MultiSteps": (ValueError, lambda: update(optax.MultiSteps(cqjax.csgd(0.1), 4))),
    "twice": (ValueError, lambda: update(optax.chain(OURS, cqjax.csgd(0.1)))),
    "another call": (ValueError, update_with_captures_of_another_call),
    "flatten": (ValueError, lambda: update(optax.flatten(OURS))),
    "half a weight masked": (
        ValueError,
        lambda: update(optax.masked(OURS, {"a": True, "b": False}), loss=joined_loss),
    ),
    "a period injected": (
        ValueError,
        lambda: update(
            optax.inject_hyperparams(cqjax.scale_by_consequentialism)(plan=plan(), update_every=5)
        ),
    ),
    "no plan": (ValueError, lambda: cqjax.scale_by_consequentialism(update_every=5)),
    "rows": (ValueError, lambda: update(cqjax.multi_steps(cqjax.nlms(0.1), 2, plan=plan()))),
    "another plan": (
        ValueError,
        lambda: update(cqjax.multi_steps(OURS, 2, plan=plan(skip="w"))),
    ),
    "too large": (
        ValueError,
        lambda: cqjax.multi_steps(
            OURS, 2, plan=cqjax.plan(loss_fn, max_dim=2)(ARGS[0], jnp.ones((2, 3)))
        ),
    ),
    "measured in a mask": (ValueError, back_matched),
}


def plain(text):
    """Without the marks of code, in one line."""
    return " ".join(text.replace("`", "").replace("'", "").split())


def quoted():
    """The messages of the table."""
    _, _, table = DOCUMENT.read_text().partition("## Refused")
    rows = [line.split(" | ") for line in table.partition("\n## ")[0].splitlines() if "|" in line]
    return [plain(row[1]) for row in rows[2:]]


@functools.cache
def refusal(name):
    """The message that the call ends with."""
    error, call = REFUSED[name]
    with pytest.raises(error) as raised:
        call()
    return plain(str(raised.value))


@pytest.mark.parametrize("name", REFUSED)
def test_as_documented(name):
    assert any(message in refusal(name) for message in quoted()), refusal(name)


def test_every_message_of_the_document_is_one_that_is_raised():
    messages = [refusal(name) for name in REFUSED]
    for message in quoted():
        assert any(message in got for got in messages), message


def test_other_arguments_of_multi_steps():
    with pytest.raises(ValueError, match="every_k=0: expected a positive integer"):
        cqjax.multi_steps(OURS, 0, plan=plan())
    with pytest.raises(TypeError, match="plan is a NoneType; expected a Plan: cqjax.plan"):
        cqjax.multi_steps(OURS, 2, plan=None)
    with pytest.raises(ValueError, match="multi_steps: no captures were passed"):
        update(cqjax.multi_steps(OURS, 2, plan=plan()), captured=False)


def test_sums_of_another_shape():
    split = cqjax.multi_steps(OURS, 2, plan=plan(max_dim=1, block_size=1, solver="primal"))
    with pytest.raises(
        ValueError, match=r"moment of w has shape \(1, 3, 3\); expected \(3, 1, 1\)"
    ):
        update(split)
