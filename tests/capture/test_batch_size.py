"""N, the number of terms that a loss averages over, read off its program."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax

RNG = np.random.default_rng(0)
B, T, D, K = 16, 24, 8, 5
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, K, (B, T)))
W = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
MASK = jnp.asarray(RNG.uniform(size=(B, T)) < 0.4, jnp.float32)
LEFT = int(MASK.sum())


def entropy(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y)


def of_tokens(w, x, y):
    return entropy(w, x, y).mean()


def masked(w, x, y, m):
    return jnp.sum(entropy(w, x, y) * m) / jnp.sum(m)


def over_microbatches(w, x):
    def body(total, part):
        return total + jnp.mean((part @ w) ** 2), None

    return jax.lax.scan(body, 0.0, x.reshape(4, B // 4, T, D))[0] / 4


def smoothed(w, x, y):
    logs = jax.nn.log_softmax(x @ w)
    return jnp.mean(0.9 * entropy(w, x, y) - 0.1 * jnp.mean(logs, -1))


CASES = {
    "tokens": (of_tokens, (X, Y), B * T),
    "closure": (lambda w: of_tokens(w, X, Y), (), B * T),
    "partial": (functools.partial(of_tokens, x=X, y=Y), (), B * T),
    "time-major": (of_tokens, (X.swapaxes(0, 1), Y.T), B * T),
    "statistics as an argument": (
        lambda w, x, y, mean: of_tokens(w, x - mean, y),
        (X, Y, X.mean((0, 1))),
        B * T,
    ),
    "old-style key": (
        lambda w, x, y, key: of_tokens(w, x + jax.random.normal(key, x.shape), y),
        (X, Y, jax.random.PRNGKey(0)),
        B * T,
    ),
    "class weights": (
        lambda w, x, y, each: jnp.mean(entropy(w, x, y) * each[y]),
        (X, Y, jnp.arange(1.0, K + 1)),
        B * T,
    ),
    "weighted by class weights": (
        lambda w, x, y, each: jnp.sum(entropy(w, x, y) * each[y]) / jnp.sum(each[y]),
        (X, Y, jnp.arange(1.0, K + 1)),
        float(jnp.arange(1.0, K + 1)[Y].sum()),
    ),
    "masked tokens": (masked, (X, Y, MASK), LEFT),
    "mean with where": (
        lambda w, x, y, m: jnp.mean(entropy(w, x, y), where=m > 0),
        (X, Y, MASK),
        LEFT,
    ),
    "average": (
        lambda w, x, y, m: jnp.average(entropy(w, x, y), weights=m),
        (X, Y, MASK),
        LEFT,
    ),
    "normalised weights": (
        lambda w, x, y, m: jnp.sum(entropy(w, x, y) * (m / m.sum())),
        (X, Y, MASK),
        LEFT,
    ),
    "times the inverse": (
        lambda w, x, y, m: jnp.sum(jnp.where(m > 0, entropy(w, x, y), 0)) * (1 / m.sum()),
        (X, Y, MASK),
        LEFT,
    ),
    "product with the mask": (
        lambda w, x, y, m: entropy(w, x, y).ravel() @ m.ravel() / m.sum(),
        (X, Y, MASK),
        LEFT,
    ),
    "sum": (lambda w, x, y: entropy(w, x, y).sum(), (X, Y), 1),
    "half a sum": (lambda w, x: 0.5 * jnp.sum((x @ w) ** 2), (X,), 1),
    "sum over a number": (lambda w, x, y: entropy(w, x, y).sum() / (B * T), (X, Y), B * T),
    "sum times a number": (lambda w, x, y: entropy(w, x, y).sum() * (1 / (B * T)), (X, Y), B * T),
    "half": (lambda w, x: jnp.mean(jnp.sum((x @ w) ** 2, -1)) / 2, (X,), B * T),
    "weight of a tenth": (lambda w, x: 0.1 * jnp.mean(jnp.sum((x @ w) ** 2, (1, 2))), (X,), B),
    "mean over outputs": (lambda w, x: jnp.mean((x @ w) ** 2), (X,), B * T * K),
    "mean of means": (lambda w, x, y: entropy(w, x, y).mean(1).mean(), (X, Y), B * T),
    "L2": (lambda w, x: jnp.mean(jnp.sum((x @ w) ** 2, -1)) + jnp.sum(w**2) / D, (X,), B * T),
    "one-hot": (
        lambda w, x, y: -jnp.mean(jnp.sum(jax.nn.one_hot(y, K) * jax.nn.log_softmax(x @ w), -1)),
        (X, Y),
        B * T,
    ),
    "smoothed labels": (smoothed, (X, Y), B * T),
    "microbatches": (over_microbatches, (X,), B * T * K),
    "mapped": (lambda w, x: jnp.mean(jax.lax.map(lambda a: jnp.mean((a @ w) ** 2), x)), (X,), 1920),
    "vmapped": (
        lambda w, x, y: jnp.mean(jax.vmap(functools.partial(of_tokens, w))(x, y)),
        (X, Y),
        B * T,
    ),
    "a loop in Python": (
        lambda w, x, y: sum(of_tokens(w, x[i], y[i]) for i in range(B)) / B,
        (X, Y),
        B * T,
    ),
    "branches": (
        lambda w, x, y: jax.lax.cond(
            x[0, 0, 0] > 0, lambda: of_tokens(w, x, y), lambda: 2 * of_tokens(w, x, y)
        ),
        (X, Y),
        B * T,
    ),
    "rematerialised": (jax.checkpoint(of_tokens), (X, Y), B * T),
    "scaled": (lambda w, x, y: 1024 * of_tokens(w, x, y), (X, Y), B * T),
    "the larger of two": (
        lambda w, x: jnp.mean((x @ w) ** 2) + jnp.mean((x[:4] @ w) ** 2),
        (X,),
        B * T * K,
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_says_it(name, jit):
    loss_fn, args, expected = CASES[name]

    def size(w, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cqjax.value_and_grad(loss_fn)(w, *args)[2].batch_size

    got = (jax.jit(size) if jit else size)(W, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["tokens", "masked tokens", "sum", "microbatches"])
def test_plans_say_where_it_comes_from(name):
    loss_fn, args, expected = CASES[name]
    text = {
        "tokens": "N = 384, mean over 16 × 24 terms",
        "masked tokens": "N = the computed divisor of the sum",
        "sum": "N = 1, a sum",
        "microbatches": "N = 1920, mean over 4 × 4 × 24 × 5 terms",
    }[name]
    assert str(cqjax.plan(loss_fn)(W, *args)).splitlines()[-1].endswith(text)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (W, *args))
    plan = cqjax.plan(loss_fn)(*abstract)
    assert plan.batch_size == (None if name == "masked tokens" else expected)
    assert str(plan).endswith(text)


def test_what_is_given_counts():
    _, _, captures = cqjax.value_and_grad(of_tokens, batch_size=7)(W, X, Y)
    assert captures.batch_size == 7
    plan = cqjax.plan(of_tokens, loss_reduction="sum")(W, X, Y)
    assert plan.batch_size == 1 and plan.batch_size_source.endswith('as loss_reduction="sum" says')


def test_where_the_walk_ends_the_arguments_say_it():
    def loss_fn(w, x):
        return jnp.sqrt(jnp.mean((x @ w) ** 2))

    plan = cqjax.plan(loss_fn)(W, X)
    assert plan.batch_size == B and "leading dimension of the arguments" in str(plan)
    plan = cqjax.plan(lambda w, x, y: loss_fn(w, x))(W, X, jnp.ones(3))
    assert plan.batch_size is None and "N = unknown" in str(plan)


def test_two_answers_are_a_warning():
    loss_fn, args, _ = CASES["sum"]
    with pytest.warns(UserWarning, match=r"N = 1 .*leading dimension 16 .*\(16, 24, 8\)"):
        cqjax.value_and_grad(loss_fn)(W, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cqjax.value_and_grad(loss_fn, loss_reduction="sum")(W, *args)
        # A mean over more than the leading dimension explains itself.
        cqjax.value_and_grad(of_tokens)(W, X, Y)


def test_a_scaled_loss_with_as_many_times_fewer_terms_has_the_same_update():
    """As mixed precision has it."""

    def update(scale):
        def loss_fn(w):
            return scale * of_tokens(w, X, Y)

        _, grads, captures = cqjax.value_and_grad(loss_fn, batch_size=B * T / scale)(W)
        tx = cqjax.scale_by_consequentialism()
        return tx.update(grads, tx.init(W), captures=captures)[0]

    np.testing.assert_allclose(update(1024.0), update(1.0), rtol=1e-5)


def test_a_plan_holds_nothing_of_the_trace():
    """Of a mask's sum, too: it can be returned, and compared."""
    plans = []

    @jax.jit
    def run(w, x, y, m):
        plans.append(cqjax.plan(masked)(w, x, y, m))
        return jnp.zeros(())

    run(W, X, Y, MASK)
    plans.append(cqjax.plan(masked)(W, X, Y, MASK))
    assert plans[0].batch_size is plans[1].batch_size is None
    assert str(plans[0]) == str(plans[1])


def test_a_long_loop_in_python():
    """More summands than Python allows calls within calls."""

    def loss_fn(w, x):
        total = jnp.sum((x[0, 0] @ w) ** 2)
        return sum([total] * 1100) / 1100

    assert cqjax.plan(loss_fn)(W, X).batch_size == 1100
