"""What a trace leaves behind in the process, until `jax.clear_caches()`."""

import gc

import jax
import jax.numpy as jnp
import optax

import cqjax

TRACES = 4
PARAMS = {
    "table": jnp.ones((7, 5)),
    "k": jnp.ones((3, 3, 1, 2)),
    "w": jnp.ones((5, 3)),
    "b": jnp.ones(3),
    "stack": jnp.ones((2, 3, 3)),
    "top": jnp.ones((3, 2)),
}
ARGS = jnp.ones((8, 5)), jnp.arange(8) % 7, jnp.ones((8, 4, 4, 1)), jnp.ones(8)


def fresh():
    """A new function each time, as a closure in a loop over experiments is."""

    def loss_fn(params, x, words, images, mask):
        h = jnp.tanh((x + params["table"][words]) @ params["w"] + params["b"])
        layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        h, _ = jax.lax.scan(layer, h, params["stack"])
        z = jax.lax.conv_general_dilated(
            images, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        errors = jnp.square(h @ params["top"] + z.mean((1, 2)) - 1).sum(-1)
        return jnp.sum(mask * errors) / jnp.sum(mask)

    return loss_fn


def plain():
    loss_fn, tx = fresh(), optax.adam(0.1)

    def step(params, *args):
        _, grads = jax.value_and_grad(loss_fn)(params, *args)
        return tx.update(grads, tx.init(params), params)

    jax.eval_shape(step, PARAMS, *ARGS)


def ours():
    """Rows and second moments, kept inverses, changed updates, microbatches, a bound, a signal."""
    loss_fn = fresh()
    plan = cqjax.plan(loss_fn, solver="primal")(PARAMS, *ARGS)
    kept = cqjax.cadam(0.1, plan=plan, update_every=3, ema_decay=0.9)
    by_rows = optax.chain(cqjax.csgd(0.1), cqjax.clip_by_output_change(1.0))
    several = cqjax.multi_steps(cqjax.csgd(0.1), 2, plan=plan)

    def step(params, *args):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *args)
        _, _, moments = cqjax.value_and_grad(loss_fn, solver="primal")(params, *args)
        matched = cqjax.value_and_grad(loss_fn, signal="matched")(params, *args)[1]
        changed = jax.tree.map(jnp.add, grads, params)
        return matched, [
            tx.update(updates, tx.init(params), params, captures=captured)[0]
            for tx, updates, captured in (
                (by_rows, grads, captures),
                (by_rows, changed, captures),
                (kept, changed, moments),
                (several, changed, moments),
            )
        ]

    jax.eval_shape(step, PARAMS, *ARGS)


def left_behind(trace):
    """How many objects each trace leaves, after the first few."""
    for _ in range(2):
        trace()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(TRACES):
        trace()
    gc.collect()
    return (len(gc.get_objects()) - before) / TRACES


def test_no_more_than_plain_jax_leaves():
    """One `jnp.einsum` alone would leave 26: it makes a `jax.jit` that JAX keeps."""
    # Caches of bounded size grow and shrink by a few.
    assert left_behind(ours) <= max(left_behind(plain), 0) + 10
