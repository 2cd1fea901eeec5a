"""Statistics across batches of few rows: used for other rows only where they span the features."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo_moments as ref
from across_batches import (
    DECAY,
    OPTIONS,
    gradient,
    inverses,
    joined,
    layer,
    rows_of,
    run,
    stepper,
    transformation,
)
from linear_layer import problem, squared_error
from zoo_moments import DAMPING

import cqjax

pytestmark = pytest.mark.usefixtures("float64")

FEATURES = 5


@pytest.mark.parametrize(
    "sizes",
    [(9,) * 7, (10,) * 7, (10, 9, 9, 10, 9, 10, 10), (9, 10, 10, 9, 10, 10, 9)],
    ids=["few", "enough", "shrinks", "grows"],
)
@pytest.mark.parametrize("name", ["every third", "kept", "kept average", "different periods"])
def test_on_either_side_of_twice_the_features(name, sizes):
    """A plan says whether an inverse is kept; each batch, whether it is of use for its rows.

    And whether it has to enter the average.
    """
    params, batches = layer(sizes, FEATURES)
    tx = transformation(params, batches[0], **OPTIONS[name])
    kept = "update_every" in OPTIONS[name] and ref.spans(sizes[0], FEATURES)
    assert bool(tx.init(params).inverses) == kept
    results, state = run(tx, stepper(squared_error, tx), params, batches)
    wanted = inverses([*map(rows_of, batches)], features=FEATURES, **OPTIONS[name])
    for batch, (_, got), inverse in zip(batches, results, wanted, strict=True):
        np.testing.assert_allclose(joined(got), inverse @ gradient(params, batch), rtol=1e-7)
    assert state.fallbacks.sum() == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"ema_decay": DECAY}], ids=["kept", "kept average"])
def test_which_weights_have_an_inverse_in_the_state(options, bias):
    """Those whose features, bias not counted, are at most half as many as the rows."""
    for n, d in itertools.product((15, 16, 17), (7, 8, 9)):
        args = jax.eval_shape(lambda n=n, d=d: problem(n, d, 2, bias=bias))
        plan = cqjax.plan(squared_error)(*args)
        tx = cqjax.scale_by_consequentialism(plan=plan, update_every=5, **options)
        state = jax.eval_shape(tx.init, args[0])
        assert set(state.inverses) == ({"w"} if n >= 2 * d else set()), (n, d)
        assert set(state.moments) == ({"w"} if options else set())


@pytest.mark.parametrize(("max_dim", "kept"), [(None, True), (9, True), (8, False)])
def test_no_inverse_is_larger_than_max_dim(max_dim, kept):
    """8 features and a bias: 9."""
    params, batches = layer((8,), 8)
    (x, y), enough = batches[0], problem(16, 8, 2, bias=True)[1:]
    for batch, spans in (((x, y), False), (enough, True)):
        plan = cqjax.plan(squared_error, max_dim=max_dim)(params, *batch)
        tx = cqjax.scale_by_consequentialism(plan=plan, update_every=2, ema_decay=DECAY)
        state = tx.init(params)
        assert (bool(state.moments), bool(state.inverses)) == (kept, kept and spans)


def masked_error(params, x, y, mask):
    errors = jnp.square(x @ params["w"] + params["b"] - y).sum(-1)
    return 0.5 * (mask * errors).sum() / mask.sum()


@pytest.mark.parametrize("name", ["kept", "every third", "kept average"])
def test_rows_that_do_not_count_are_known_at_run_time(name):
    """A padded batch is one of the rows that are left, on either side of twice the features."""
    sizes = (10, 9, 9, 10, 9, 10, 10)
    params, batches = layer(sizes, FEATURES)

    def padded(x, y):
        left = jnp.zeros((12 - len(x), 1))
        x, y = (jnp.concatenate([a, left + jnp.ones(a.shape[1])]) for a in (x, y))
        return x, y, jnp.arange(12) < 12 - len(left)

    plan = cqjax.plan(masked_error)(params, *padded(*batches[0]))
    tx = cqjax.scale_by_consequentialism(
        damping=DAMPING, relative_damping=0.0, plan=plan, **OPTIONS[name]
    )
    step = stepper(masked_error, tx)
    results, state = run(tx, step, params, [padded(*batch) for batch in batches])
    wanted = inverses([*map(rows_of, batches)], features=FEATURES, **OPTIONS[name])
    for batch, (_, got), inverse in zip(batches, results, wanted, strict=True):
        np.testing.assert_allclose(joined(got), inverse @ gradient(params, batch), rtol=1e-7)
    assert state.fallbacks.sum() == 0 and bool(state.inverses) == ("update_every" in OPTIONS[name])


AVERAGE = {"ema_decay": 0.95}
SMALL = [  # rows, options of the transformation
    (70, {"update_every": 5}),
    (128, {"update_every": 5}),
    (70, AVERAGE | {"update_every": 5}),
    (70, AVERAGE | {"capture_every": 5}),
]


def sixty_four_features(n, across):
    """For 8 batches of n rows at λ = 1e-3: their [X, 1], their gradients, the updates."""
    params = problem(1, 64, 2, bias=True)[0]
    batches = [problem(n, 64, 2, seed=i)[1:] for i in range(8)]
    plan = cqjax.plan(squared_error)(params, *batches[0])
    tx = cqjax.scale_by_consequentialism(damping=1e-3, relative_damping=0.0, plan=plan, **across)
    results, state = run(tx, stepper(squared_error, tx), params, batches)
    assert state.fallbacks.sum() == 0
    grads = [gradient(params, batch) for batch in batches]
    return [*map(rows_of, batches)], grads, [joined(u) for _, u in results]


def relative_norms(rows, grads, updates):
    """The norms of updates, relative to those of the batches' own."""
    for x, h, u in zip(rows, grads, updates, strict=True):
        exact = ref.inverse_of(x.T @ x, len(x), 1e-3) @ h
        yield np.linalg.norm(u) / np.linalg.norm(exact)


@pytest.mark.parametrize(("n", "across"), SMALL)
def test_updates_are_not_much_larger_than_exact_ones(n, across):
    """Inverses that do not know a batch's rows would be 1/λ along them."""
    ratios = [*relative_norms(*sixty_four_features(n, across))]
    assert max(ratios) < 5 and min(ratios) > 1 / 5, ratios


@pytest.mark.parametrize(
    "periods", [{"update_every": 5}, {"capture_every": 5}, {"update_every": 5, "capture_every": 5}]
)
def test_periods_do_not_enlarge_the_updates_of_averages_of_few_rows(periods):
    """They change nothing. With them, updates would be 1e5 times the exact ones.

    An average's own are up to 43 times those: in the eighth batch it has 64 rows for 65 unknowns.
    """
    rows, grads, updates = sixty_four_features(8, AVERAGE | periods)
    wanted = inverses(rows, 1e-3, **AVERAGE, features=64)
    for h, u, inverse in zip(grads, updates, wanted, strict=True):
        np.testing.assert_allclose(u, inverse @ h, rtol=1e-5, atol=1e-5 * np.abs(u).max())
    ratios = [*relative_norms(rows, grads, updates)]
    assert max(ratios[:4]) < 5 and max(ratios) < 100, ratios
