"""What one bad batch costs: the loss 20 healthy steps later, in the table of docs/diagnostics.md.

`python tests/attacks/test_faults.py` prints the table anew.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "diagnostics.md"
RATES = {"csgd": 0.2, "cnesterov": 0.05, "cadam": 0.02}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PERIODS = {
    "float32": ("", "update_every=4", "update_every=5"),
    "bfloat16": ("", "update_every=4"),
}
WIDTHS = (8, 16, 16, 1)
ROWS, BEFORE, AFTER = 64, 10, 20
"""Rows of a batch, and batches before the bad one and after it. Of every four, an older one's
inverse is kept in it; of every five, its own is due."""
WORST = 1.5
"""What a fault may multiply the loss by."""
SLOW = {("cadam", "rate × 100")}
"""What takes longer; the page says why, and what to do."""


def loss_fn(params, x, y, shift):
    """Three layers and a gain that no layer covers; `shift` can put out the second one's units."""
    h = jax.nn.relu(x.astype(params["w0"].dtype) @ params["w0"] + params["b0"])
    h = jax.nn.relu(h @ params["w1"] + params["b1"] - shift.astype(h.dtype)) * params["gain"]
    z = h @ params["w2"] + params["b2"]
    return jnp.mean(jnp.sum((z.astype(y.dtype) - y) ** 2, -1))


def network(dtype):
    rng = np.random.default_rng(0)
    params = {"gain": jnp.ones(WIDTHS[2], dtype)}
    for i, (d, o) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        params[f"w{i}"] = jnp.asarray(rng.normal(size=(d, o)) * (2 / d) ** 0.5, dtype)
        params[f"b{i}"] = jnp.zeros(o, dtype)
    return params


@functools.cache
def batches(number, rows=ROWS, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, rows, WIDTHS[0]))
    y = (
        np.abs(x[..., :2]).sum(-1, keepdims=True)
        - x[..., 2:3]
        + 0.1 * rng.normal(size=(number, rows, 1))
    )
    shift = np.zeros(number)
    return [tuple(jnp.asarray(a[i], jnp.float32) for a in (x, y, shift)) for i in range(number)]


FAULTS = {
    # name: what happens to (x, y, shift); the rate is multiplied in the step of its name
    "NaN input": lambda x, y, s: (x.at[0, 0].set(jnp.nan), y, s),
    "NaN target": lambda x, y, s: (x, y.at[0].set(jnp.nan), s),
    "∞ input": lambda x, y, s: (x.at[0, 0].set(jnp.inf), y, s),
    "1e18 input": lambda x, y, s: (x.at[0, 0].set(1e18), y, s),
    "rate × 100": lambda *batch: batch,
    "10 rows": lambda x, y, s: (x[:10], y[:10], s),
    "equal rows": lambda x, y, s: (x.at[:].set(x[0]), y.at[:].set(y[0]), s),
    "dead layer": lambda x, y, s: (x, y, s + 1e3),
}


def losses(name, dtype, period, faults=FAULTS, **options):
    """20 steps after each fault, or after a healthy batch (""), on rows of their own."""
    params = network(DTYPES[dtype])
    healthy = batches(BEFORE + 1 + AFTER)
    if period:
        plan = cqjax.plan(loss_fn)(params, *healthy[0])
        options |= {"plan": plan, "update_every": int(period.split("=")[1])}

    def optimizer(factor=1.0):
        return getattr(cqjax, name)(factor * RATES[name], **options)

    @jax.jit
    def step(params, state, batch, factor):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *batch)
        updates, state = optimizer(factor).update(grads, state, params, captures=captures)
        return optax.apply_updates(params, updates), state

    one = jnp.ones(())
    start = params, optimizer().init(params)
    for batch in healthy[:BEFORE]:
        start = step(*start, batch, one)
    (test,) = batches(1, 512, seed=2)
    found = {}
    for fault in ("", *faults):
        bad = FAULTS[fault](*healthy[BEFORE]) if fault else healthy[BEFORE]
        params, state = step(*start, bad, 100 * one if fault == "rate × 100" else one)
        for batch in healthy[BEFORE + 1 :]:
            params, state = step(params, state, batch, one)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state))), fault
        found[fault] = float(loss_fn(params, *test))
    return found


def ratios(*case, **options):
    """The loss without a fault, and for each fault what it multiplies the loss by."""
    found = losses(*case, **options)
    healthy = found.pop("")
    return healthy, {fault: loss / healthy for fault, loss in found.items()}


CASES = [(n, d, p) for n in RATES for d in DTYPES for p in PERIODS[d]]


def label(name, dtype, period):
    return f"`{name}({RATES[name]}{period and ', ' + period})`, {dtype}"


def line(*case):
    healthy, found = ratios(*case)
    return " | ".join(
        [f"| {label(*case)}", f"{healthy:.2f}", *(f"{r:.2f}" for r in found.values())]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_training_goes_on(case):
    """Parameters and state are finite, and the losses are those of the page."""
    healthy, found = ratios(*case)
    for fault, ratio in found.items():
        assert ratio < WORST or (case[0], fault) in SLOW, (fault, ratio)
    (row,) = (x for x in PAGE.read_text().splitlines() if x.startswith(f"| {label(*case)} |"))
    numbers = [float(cell) for cell in row.split("|")[2:-1]]
    # Rounding differs between machines, and grows in 20 steps.
    np.testing.assert_allclose([healthy, *found.values()], numbers, rtol=0.2)


@pytest.mark.parametrize("period", PERIODS["float32"])
def test_a_tighter_bound_makes_up_for_a_rate_that_was_too_high(period):
    """As the page says."""
    case = "cadam", "float32", period
    (ratio,) = ratios(*case, faults=["rate × 100"], max_change=0.1)[1].values()
    assert ratio < WORST


def test_a_member_of_an_ensemble_is_hit_alone():
    """By `jax.vmap`, with what is kept: the others' numbers are those of a healthy batch."""
    params, good = network(jnp.float32), batches(1)[0]
    tx = cqjax.cadam(0.02, plan=cqjax.plan(loss_fn)(params, *good), update_every=4)

    def step(carry, batch):
        params, state = carry
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    @jax.vmap
    def train(*both):
        each = jax.tree.map(lambda *a: jnp.stack(a), good, both, good)
        return jax.lax.scan(step, (params, tx.init(params)), each)[0]

    hit = train(*(jnp.stack(pair) for pair in zip(FAULTS["NaN input"](*good), good, strict=True)))
    spared = train(*(jnp.stack([a, a]) for a in good))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(hit))
    assert hit[1][0].fallbacks[0].any()
    for got, want in zip(jax.tree.leaves(hit), jax.tree.leaves(spared), strict=True):
        np.testing.assert_array_equal(got[1], want[1])


if __name__ == "__main__":
    print("| | no fault |", " | ".join(FAULTS), "|")
    print("| --- |", " | ".join(["---:"] * (1 + len(FAULTS))), "|")
    for each in CASES:
        print(line(*each), "|", flush=True)
