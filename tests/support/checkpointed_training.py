"""A small network, optimizers whose states outlive a batch, and Orbax's checkpoints of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from across_batches import quickly

import cqjax

ROWS, STEPS, STOP = 48, 9, 5  # 5 is in the middle of periods of 2 and of 3
MICROBATCHES = 3


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return 0.5 * jnp.mean(jnp.sum((hidden @ params["w2"] + params["b2"] - y) ** 2, -1))


def problem():
    """(params, batches); batch t is (x[t], y[t])."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 16), "b1": (16,), "w2": (16, 8), "b2": (8,)}
    params = {k: jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for k, s in shapes.items()}
    return params, [jnp.asarray(rng.normal(size=(2, ROWS, 8)), jnp.float32) for _ in range(STEPS)]


def _consequentialism(**options):
    def make(plan):
        scale = cqjax.scale_by_consequentialism(
            damping=0.1, relative_damping=0.0, plan=plan, **options
        )
        return optax.chain(scale, optax.sgd(0.05, momentum=0.9))

    return make


OPTIMIZERS = {  # of the plan for a batch, which has several microbatches for "multi_steps"
    "update_every": _consequentialism(update_every=3),
    "ema_decay": _consequentialism(ema_decay=0.8),
    "capture_every": _consequentialism(ema_decay=0.8, capture_every=2),
    "all periods": _consequentialism(ema_decay=0.8, capture_every=2, update_every=3),
    "cadam": lambda plan: cqjax.cadam(0.01),
    "back-matching": lambda plan: cqjax.back_matching_sgd(
        0.02, plan=plan, factors="measured", refresh_every=3
    ),
    "conjugate gradient": lambda plan: optax.chain(
        cqjax.scale_by_conjugate_gradient(), optax.scale(-0.02)
    ),
    "multi_steps": lambda plan: cqjax.multi_steps(
        _consequentialism(ema_decay=0.8, update_every=2)(plan), MICROBATCHES, plan=plan
    ),
}


@functools.cache
def training(name):
    """(transformation, jitted step)."""
    params, _ = problem()
    rows = ROWS * (MICROBATCHES if name == "multi_steps" else 1)
    batch = jax.ShapeDtypeStruct((rows, 8), jnp.float32)
    tx = OPTIMIZERS[name](cqjax.plan(loss_fn)(params, batch, batch))

    def step(params, opt_state, batch):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            captures=captures,
            value_fn=lambda params: loss_fn(params, *batch),
        )
        return optax.apply_updates(params, updates), opt_state

    return tx, quickly(step)


def train(step, state, batches):
    for batch in batches:
        state = step(*state, batch)
    return state


def save(folder, step, state):
    with ocp.CheckpointManager(folder) as manager:
        params, opt_state = state
        tree = {"params": params, "opt_state": opt_state}
        assert manager.save(step, args=ocp.args.StandardSave(tree))


def restore(folder, tx, sharding_of=None):
    """The last checkpoint's (step, state), in trees that only the optimizer's init knows."""
    params = jax.eval_shape(lambda: problem()[0])
    tree = {"params": params, "opt_state": jax.eval_shape(tx.init, params)}
    if sharding_of is not None:
        tree = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_of(a.shape)), tree
        )
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        tree = manager.restore(step, args=ocp.args.StandardRestore(tree))
    return step, (tree["params"], tree["opt_state"])
