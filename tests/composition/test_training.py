"""`cqjax.training.TrainState` against Flax's, and against the same steps without either."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly
from flax import serialization
from flax.training import train_state
from two_layers import assert_close

import cqjax
from cqjax.training import TrainState


class Net(nn.Module):
    eight_bit: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16)(x))
        if self.eight_bit:
            x = nn.tanh(nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x))
        return nn.Dense(16)(x)


X, Y = (jnp.asarray(a) for a in np.random.default_rng(0).normal(size=(2, 16, 16)).astype("f"))


def loss_fn(variables, x, y, model):
    return jnp.mean(jnp.sum((model.apply(variables, x) - y) ** 2, -1))


def unjitted(state, x, y):
    def loss(params, x, y):
        return jnp.mean(jnp.sum((state.apply_fn(params, x) - y) ** 2, -1))

    _, grads, captures = cqjax.value_and_grad(loss)(state.params, x, y)
    if isinstance(state, TrainState):
        return state.apply_gradients(grads=grads, captures=captures)
    return state.apply_gradients(grads=grads)


step = quickly(unjitted)


def created(tx, cls=TrainState, **fields):
    model = Net(**fields)
    variables = model.init(jax.random.key(0), X)
    return cls.create(apply_fn=model.apply, params=variables, tx=tx)


def by_hand(tx, steps=2):
    model = Net()
    params = model.init(jax.random.key(0), X)
    state = tx.init(params)

    @quickly
    def once(params, state):
        fn = cqjax.value_and_grad(lambda p, x, y: loss_fn(p, x, y, model))
        _, grads, captures = fn(params, X, Y)
        updates, state = tx.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = once(params, state)
    return params, state


TX = cqjax.cmomentum(0.1, damping=1.0, relative_damping=0.0, max_change=None)


def test_captures_are_forwarded():
    state = created(TX)
    for _ in range(2):
        state = step(state, X, Y)
    assert_close((state.params, state.opt_state), by_hand(TX), rtol=1e-4)
    assert state.step == 2 and state.tx is TX


@pytest.mark.parametrize("eight_bit", [False, True])
def test_an_optimizer_without_captures_is_as_in_flax(eight_bit):
    """Also where gradients overwrite a collection."""
    tx = optax.sgd(0.1, momentum=0.9)
    got = created(tx, eight_bit=eight_bit)
    want = created(tx, train_state.TrainState, eight_bit=eight_bit)
    for _ in range(2):
        got, want = step(got, X, Y), step(want, X, Y)
    assert_close(got.params, want.params, rtol=1e-5)
    same = jax.tree.leaves(got.opt_state), jax.tree.leaves(want.opt_state)
    assert_close(*same, rtol=1e-5)


def test_beside_a_collection_that_gradients_overwrite():
    """Layers that were captured get ours; the collection is its gradient; the rest has SGD."""
    state = created(
        cqjax.csgd(0.1, damping=0.1, relative_damping=0.0, max_change=None), eight_bit=True
    )

    def loss(params, x, y):
        return loss_fn(params, x, y, Net(eight_bit=True))

    _, grads, captures = quickly(cqjax.value_and_grad(loss))(state.params, X, Y)
    assert set(captures) == {
        f"params/Dense_{i}/{name}" for i in (0, 2) for name in ("kernel", "bias")
    }
    new = state.apply_gradients(grads=grads, captures=captures)
    overwritten = "_overwrite_with_gradient"
    assert_close(new.params[overwritten], grads[overwritten], rtol=0)
    moved = jax.tree.map(jnp.subtract, new.params["params"], state.params["params"])
    plain = jax.tree.map(lambda g: -0.1 * g, grads["params"])
    assert_close(moved["Dense_1"], plain["Dense_1"], rtol=1e-5)
    (capture,) = captures["params/Dense_0/kernel"]
    x = np.concatenate([X, np.ones((16, 1))], 1).astype(np.float64)
    dz = np.asarray(capture.rows().dz[0], np.float64)
    u = 16 * x.T @ np.linalg.solve(x @ x.T + 0.1 * np.eye(16), dz)
    np.testing.assert_allclose(moved["Dense_0"]["kernel"], -0.1 * u[:-1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(moved["Dense_0"]["bias"], -0.1 * u[-1], rtol=1e-3, atol=1e-5)


def test_fields_of_a_subclass():
    class WithStatistics(TrainState):
        batch_stats: Any = None

    model = Net()
    params = model.init(jax.random.key(0), X)
    state = WithStatistics.create(
        apply_fn=model.apply, params=params, tx=optax.sgd(0.1), batch_stats={"mean": 0.0}
    )
    new = state.apply_gradients(grads=params, batch_stats={"mean": 1.0})
    assert isinstance(new, WithStatistics) and new.batch_stats == {"mean": 1.0}


def test_extra_arguments():
    """A line search takes the loss's value, and a function for it."""
    model, search = Net(), optax.scale_by_backtracking_linesearch(15)
    state = created(
        optax.chain(
            cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0),
            optax.scale(-1.0),
            search,
        )
    )

    @quickly
    def search_step(state):
        fn = cqjax.value_and_grad(lambda p, x, y: loss_fn(p, x, y, model))
        value, grads, captures = fn(state.params, X, Y)

        def value_fn(params, captures):
            del captures
            return loss_fn(params, X, Y, model)

        extra = {"value": value, "grad": grads, "value_fn": value_fn}
        return state.apply_gradients(grads=grads, captures=captures, extra_args=extra), value

    state, before = search_step(state)
    state, after = search_step(state)
    assert after < 0.8 * before


def test_no_captures():
    state = created(TX)
    with pytest.raises(ValueError, match="scale_by_consequentialism: no captures were passed"):
        state.apply_gradients(grads=state.params)


def test_serialisation_and_donation():
    first = step(created(TX), X, Y)
    restored = serialization.from_bytes(created(TX), serialization.to_bytes(first))
    assert_close(jax.tree.leaves(restored), jax.tree.leaves(first), rtol=0)
    donating = quickly(unjitted, donate_argnums=0)
    want = step(first, X, Y)
    assert_close(donating(jax.tree.map(jnp.asarray, restored), X, Y).params, want.params, rtol=1e-6)
