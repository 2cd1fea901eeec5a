"""Under JAX's transformations, and what the compiled programs hold."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax


class Net(nn.Module):
    """A small network with a convolution, a scanned stack and two dense layers."""

    width: int = 6

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (3, 3), strides=2)(x))
        x = nn.tanh(nn.Dense(self.width)(x.reshape(len(x), -1)))
        body = nn.scan(
            nn.remat(Cell), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = body(self.width)(x, None)
        return nn.Dense(2)(x)


class Cell(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(self.width)(x)), None


def loss_fn(params, x, y):
    return jnp.mean(jnp.sum((Net().apply(params, x) - y) ** 2, -1))


TX = cqjax.csgd(0.1, damping=1e-1, relative_damping=0.0, max_change=None)


def step(params, state, x, y):
    loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
    updates, state = TX.update(grads, state, params, captures=captures)
    return optax.apply_updates(params, updates), state, loss


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(4, 5, 6, 6, 2)), jnp.float32), jnp.asarray(
        rng.normal(size=(4, 5, 2)), jnp.float32
    )


@pytest.fixture(scope="module")
def params(batches):
    return Net().init(jax.random.key(0), batches[0][0])


@pytest.fixture(scope="module")
def trained(params, batches):
    """Parameters and losses after four jitted steps."""
    state, losses, jitted = TX.init(params), [], jax.jit(step)
    for x, y in zip(*batches, strict=True):
        params, state, loss = jitted(params, state, x, y)
        losses.append(loss)
    assert losses[-1] < losses[0]
    return params, jnp.stack(losses)


def assert_close(got, want, rtol=1e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def test_eager_equals_jitted(params, batches):
    x, y = batches[0][0], batches[1][0]
    assert_close(step(params, TX.init(params), x, y), jax.jit(step)(params, TX.init(params), x, y))


def test_scan_over_steps(params, batches, trained):
    def body(carry, batch):
        params, state, loss = step(*carry, *batch)
        return (params, state), loss

    (got, _), losses = jax.jit(lambda c, b: jax.lax.scan(body, c, b))(
        (params, TX.init(params)), batches
    )
    assert_close((got, losses), trained)


def test_vmap_over_seeds(batches):
    x, y = batches[0][0], batches[1][0]
    keys = jax.random.split(jax.random.key(1), 3)
    many = jax.vmap(lambda key: Net().init(key, x))(keys)
    states = jax.vmap(TX.init)(many)
    got = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))(many, states, x, y)
    for i in range(3):
        one = jax.tree.map(lambda p, i=i: p[i], many)
        want = jax.jit(step)(one, TX.init(one), x, y)
        assert_close(jax.tree.map(lambda a, i=i: a[i], got), want)


def test_captures_cross_jit_vmap_scan_and_tree_map(params, batches):
    fn = cqjax.value_and_grad(loss_fn)
    x, y = batches[0][0], batches[1][0]
    _, grads, captures = jax.jit(fn)(params, x, y)
    doubled = jax.tree.map(lambda a: 2 * a, captures)
    assert captures.batch_size == 5
    assert jax.tree.structure(doubled) == jax.tree.structure(captures)
    update = jax.jit(lambda g, s, c: TX.update(g, s, captures=c)[0])
    want = update(grads, TX.init(params), captures)
    many = jax.jit(jax.vmap(fn, in_axes=(None, 0, 0)))(params, *batches)
    updates = jax.vmap(update, in_axes=(0, None, 0))(many[1], TX.init(params), many[2])
    assert_close(jax.tree.map(lambda a: a[0], updates), want)
    _, (_, grads, captures) = jax.lax.scan(lambda c, batch: (c, fn(params, *batch)), None, batches)
    first = jax.tree.map(lambda a: a[0], (grads, captures))
    assert_close(update(first[0], TX.init(params), first[1]), want)


def test_donated_buffers(params, batches, trained):
    jitted = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    state = TX.init(params)
    for x, y in zip(*batches, strict=True):
        params, state, _ = jitted(params, state, x, y)
    assert_close(params, trained[0])


def test_the_second_call_does_not_retrace(params, batches):
    traces = []

    def counted(params, x, y):
        traces.append(None)
        return loss_fn(params, x, y)

    @jax.jit
    def jitted(params, state, x, y):
        _, grads, captures = cqjax.value_and_grad(counted)(params, x, y)
        updates, state = TX.update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    state = TX.init(params)
    for x, y in zip(*batches, strict=True):
        params, state = jitted(params, state, x, y)
    assert len(traces) == 1
    apart = jax.jit(lambda g, s, c: TX.update(g, s, captures=c))
    gradient = jax.jit(cqjax.value_and_grad(counted))
    for x, y in zip(*batches, strict=True):
        _, grads, captures = gradient(params, x, y)
        apart(grads, state, captures)
    assert len(traces) == 2
    assert apart._cache_size() == 1


def test_data_parallel_sharding_under_jit(params, batches):
    """With the batch split over all devices there are, the update is the single device's."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x, y = (jnp.concatenate([batch[0]] * jax.device_count()) for batch in batches)
    want = jax.jit(step)(params, TX.init(params), x, y)
    args = (jax.device_put(params, copied), TX.init(params))
    got = jax.jit(step)(*args, jax.device_put(x, split), jax.device_put(y, split))
    assert_close(got, want)


# Compiled programs.


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


def dots(program):
    """How many matrix products and convolutions the optimised program holds."""
    text = program.as_text()
    return len(re.findall(r" (?:dot|convolution)\(", text)) + text.count("__cpu$dot")


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_unused_captures_cost_nothing(params, batches, solver):
    x, y = batches[0][0], batches[1][0]
    plain = compiled(jax.value_and_grad(loss_fn), params, x, y)
    ours = cqjax.value_and_grad(loss_fn, solver=solver)
    assert dots(plain) > 5
    assert dots(compiled(lambda *a: ours(*a)[:2], params, x, y)) == dots(plain)


class MLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width, use_bias=False)(x))
        return nn.Dense(10, use_bias=False)(x)


def test_the_dual_replaces_the_weight_gradient_product():
    """Each layer has one product of its weight's size, as with the plain gradient."""
    model, x = MLP((64, 64, 64)), jnp.ones((8, 64))
    params = model.init(jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    tx = cqjax.csgd(0.1)

    def plain(params, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

    def ours(params, x):
        _, grads, captures = cqjax.value_and_grad(loss)(params, x)
        updates, _ = tx.update(grads, tx.init(params), params, captures=captures)
        return optax.apply_updates(params, updates)

    def weight_sized(fn):
        text = compiled(fn, params, x).as_text()
        return len(re.findall(r"f32\[64,(?:64|10)\]\{[\d,]*\} dot\(", text))

    assert weight_sized(plain) == weight_sized(ours) == 4


def test_memory_under_remat_does_not_grow_by_the_activations():
    """With Gram captures, rematerialised layers keep d x d per layer, not n x d."""
    layers, width, rows = 12, 32, 8192

    def loss(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
        return jnp.mean(x**2)

    params, x = jnp.ones((layers, width, width)), jnp.ones((rows, width))
    plain = compiled(jax.value_and_grad(loss), params, x).memory_analysis()
    fn = cqjax.value_and_grad(loss, solver="primal")
    ours = compiled(fn, params, x).memory_analysis()
    growth = ours.temp_size_in_bytes - plain.temp_size_in_bytes
    activation = 4 * rows * width
    assert growth < 2 * activation  # all layers' would be `layers` times that


@pytest.mark.parametrize("attribute", ["plan", "__call__"])
def test_a_losss_attributes_are_its_own(attribute):
    """Those of a callable object, too, do not take the place of ours."""

    class Loss:
        def __call__(self, params, x):
            return jnp.mean(x @ params["w"])

    loss_fn = Loss()
    setattr(loss_fn, attribute, "the loss's own")
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    differentiate = cqjax.value_and_grad(loss_fn)
    assert differentiate.plan(params, x).parameters[0].status == "covered"
    assert differentiate(params, x)[0] == 3
