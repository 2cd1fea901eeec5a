"""A linear layer over several batches: its inverses in float64 NumPy, by loops; and a stepper."""

import functools

import jax
import numpy as np
import zoo_moments as ref
from linear_layer import problem, squared_error
from zoo_moments import DAMPING

import cqjax

DECAY = 0.7

OPTIONS = {
    "average": {"ema_decay": DECAY},
    "the last batch": {"ema_decay": 0.0},
    "every third": {"ema_decay": DECAY, "capture_every": 3},
    "kept": {"update_every": 3},
    "kept average": {"ema_decay": DECAY, "update_every": 2},
    "different periods": {"ema_decay": DECAY, "update_every": 2, "capture_every": 3},
}


def quickly(fn, **kwargs):
    """`fn` under jit, compiled in little time since it runs a few times."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fn, compiler_options=options, **kwargs)


def stepper(loss_fn, tx, **kwargs):
    """(params, state, *batch) -> (gradients, updates, state), jitted."""
    fn = cqjax.value_and_grad(loss_fn, **kwargs)

    def step(params, state, *batch):
        _, grads, captures = fn(params, *batch)
        return grads, *tx.update(grads, state, params, captures=captures)

    return quickly(step)


def layer(sizes, d=5, *, bias=True):
    """(params, batches of these sizes) of a linear layer with two outputs."""
    params = problem(1, d, 2, bias=bias)[0]
    return params, [problem(n, d, 2, seed=i)[1:] for i, n in enumerate(sizes)]


def transformation(params, batch, damping=DAMPING, relative_damping=0.0, **options):
    """`scale_by_consequentialism` with the plan of a linear layer."""
    plan = cqjax.plan(squared_error)(params, *batch)
    return cqjax.scale_by_consequentialism(
        damping=damping, relative_damping=relative_damping, plan=plan, **options
    )


@functools.cache
def program(name, bias=True):
    """The transformation with these `OPTIONS` for 40 rows in float64, and its stepper."""
    params, (batch,) = layer((40,), bias=bias)
    tx = transformation(params, batch, **OPTIONS[name])
    return tx, stepper(squared_error, tx)


def run(tx, step, params, batches):
    """([(gradients, updates) of each batch], state)."""
    state, results = tx.init(params), []
    for batch in batches:
        grads, updates, state = step(params, state, *batch)
        results.append((grads, updates))
    return results, state


def joined(tree):
    """[W; b], or W where there is no b."""
    return np.concatenate([np.asarray(tree[k]).reshape(-1, 2) for k in ("w", "b") if k in tree])


def rows_of(batch, bias=True):
    """[X, 1], or X."""
    x = np.asarray(batch[0])
    return np.concatenate([x, np.ones((len(x), 1))], 1) if bias else x


def gradient(params, batch):
    """H, of the mean over the batch of half the squared error."""
    rows = rows_of(batch, "b" in params)
    return rows.T @ (rows @ joined(params) - np.asarray(batch[1])) / len(rows)


def moment(rows):
    """XᵀX, row by row."""
    return ref.second_moment(rows[None], None)[0]


def inverses(
    batches, damping=DAMPING, *, ema_decay=None, update_every=1, capture_every=1, features=5
):
    """N (XᵀX + λI)⁻¹ as it is applied to each batch's update.

    Args:
      batches: X of each batch. One that is not finite is not heard of.
      damping: λ, or a function of the step and XᵀX.
      ema_decay: of the average that XᵀX / N is taken from; None for the batch's own.
      update_every: steps from one inversion to the next; 1 if the first batch has too few rows,
        and as long as one is lacking. A batch with too few rows has its own, which is not kept.
      capture_every: steps from one batch in the average to the next; those with too few rows are
        all in it.
      features: of which a batch has too few rows for others, if not twice as many; no bias.
    """
    past, inverse, lacking = [], np.eye(batches[0].shape[1]), True
    if not ref.spans(len(batches[0]), features):
        update_every = 1
    for t, rows in enumerate(batches):
        xx, n = moment(rows), len(rows)
        due = t % capture_every == 0 or not past or not ref.spans(n, features)
        if due and np.isfinite(rows).all():
            past.append(xx / n)
        if ema_decay is not None and past:
            xx = n * ref.average(past, ema_decay)
        lacking |= t % update_every == 0
        few, own = not ref.spans(n, features), inverse
        if (lacking or few) and np.isfinite(xx).all():
            strength = damping(t, xx) if callable(damping) else damping
            own = ref.inverse_of(xx, n, strength)
            lacking, inverse = (lacking, inverse) if few else (False, own)
        yield own
