"""Flax's boxes around parameters: as if there were none."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly

import cqjax

INIT = nn.initializers.lecun_normal()


@flax.struct.dataclass
class Labelled(nn.meta.AxisMetadata):
    """A box whose content has another name than Flax's `value`."""

    array: jax.Array
    label: str = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.array

    def replace_boxed(self, val):
        return self.replace(array=val)

    def add_axis(self, index, params):
        return self

    remove_axis = add_axis


def labelled(init):
    return lambda *args: Labelled(init(*args), "inner")


NAMES = (None, "model")
BOXES = {
    "none": INIT,
    "partitioned": nn.with_partitioning(INIT, NAMES),
    "logical": nn.with_logical_partitioning(INIT, NAMES),
    "of one's own": labelled(INIT),
    "in a box": labelled(nn.with_partitioning(INIT, NAMES)),
}
X, Y = jax.random.normal(jax.random.key(0), (5, 4)), jnp.ones((5, 2))


class Net(nn.Module):
    kernel: object

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (1,), kernel_init=self.kernel)(x[:, None])[:, 0]
        return nn.Dense(2, kernel_init=self.kernel)(jnp.tanh(x))


def case(box):
    """(loss, parameters); with the same numbers in any box."""
    model = Net(BOXES[box])

    def loss_fn(params, x, y):
        return 0.5 * jnp.mean(jnp.sum((model.apply(params, x) - y) ** 2, -1))

    return loss_fn, model.init(jax.random.key(1), X)


PATHS = [f"params/{layer}/{name}" for layer in ("Conv_0", "Dense_0") for name in ("bias", "kernel")]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(
    ("selection", "covered"),
    [
        ({}, PATHS),
        ({"only": nn.Dense}, PATHS[2:]),
        ({"skip": nn.Dense}, PATHS[:2]),
        ({"only": "params/Dense_0/kernel"}, PATHS[3:]),
        ({"skip": "*/kernel"}, []),
    ],
    ids=str,
)
def test_selection(box, selection, covered):
    loss_fn, params = case(box)
    plan = cqjax.plan(loss_fn, **selection)(params, X, Y)
    assert [p.path for p in plan.parameters] == PATHS
    assert [p.layer for p in plan.parameters] == ["Conv", "Conv", "Dense", "Dense"]
    assert [p.path for p in plan.parameters if p.status == "covered"] == covered


@functools.cache
def updates(box):
    """From solves, and from what is kept, masked or added up between them; taken out of boxes."""
    loss_fn, params = case(box)
    differentiate = cqjax.value_and_grad(loss_fn)
    plan = differentiate.plan(params, X, Y)
    solve = functools.partial(cqjax.scale_by_consequentialism, relative_damping=0.5)
    transformations = (
        optax.chain(solve(plan=plan, ema_decay=0.9), cqjax.clip_by_output_change(0.01)),
        optax.masked(solve(), {"params": {"Conv_0": True, "Dense_0": False}}),
        cqjax.multi_steps(solve(), 1, plan=plan),
        cqjax.scale_by_back_matching(plan),
    )

    @quickly
    def run(params):
        _, grads, captures = differentiate(params, X, Y)
        return [
            tx.update(grads, tx.init(params), params, captures=captures)[0]
            for tx in transformations
        ]

    results = run(params)
    for result in results:
        assert jax.tree.structure(result) == jax.tree.structure(params)
    return nn.meta.unbox(results)


@pytest.mark.parametrize("box", list(BOXES)[1:])
def test_updates(box):
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(same, updates(box), updates("none"))


def test_a_weight_that_flax_gives_to_no_layer():
    """Its bias is selected by the layer's class; the weight must not be left out in silence."""

    class Joined(nn.Module):
        @nn.compact
        def __call__(self, x):
            parts = self.param("kernel", lambda _: {"main": jnp.ones((4, 2))})
            return x @ parts["main"] + self.param("bias", nn.initializers.zeros, (2,))

    params = Joined().init(jax.random.key(0), X)
    plan = cqjax.plan(lambda p, x: jnp.mean(Joined().apply(p, x) ** 2), skip=Joined)
    with pytest.raises(
        ValueError, match="layer of params/kernel/main is unknown, though params/bias, .* of Joined"
    ):
        plan(params, X)
