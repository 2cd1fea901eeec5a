"""Statistics across batches, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
import zoo_moments as ref
from across_batches import (
    DAMPING,
    DECAY,
    OPTIONS,
    gradient,
    inverses,
    joined,
    layer,
    moment,
    program,
    rows_of,
    run,
    stepper,
    transformation,
)
from linear_layer import assert_close, expected, problem, squared_error

import cqjax

pytestmark = pytest.mark.usefixtures("float64")

FORMS = [
    ("mlp", {"update_every": 2}, (8, 3, 8)),
    ("mlp", {"update_every": 2, "capture_every": 2}, (7, 7, 7)),  # two layers, one of which spans
    ("conv_same", {"update_every": 2}, (4, 4, 4)),
    ("conv_grouped", {}, (4, 4, 4)),
    ("embed", {"update_every": 2}, (4, 4, 4)),  # a diagonal
    ("scan_layers", {"update_every": 2, "capture_every": 2}, (6, 6, 6)),
    ("shared_module", {}, (4, 4, 4)),  # one weight, two sites
    ("kernel_slices", {}, (4, 4, 4)),  # several weights that are one parameter
]


@pytest.mark.parametrize(("name", "options", "sizes"), FORMS)
def test_every_form_of_a_weight(name, options, sizes):
    """N (N M̂ + λI)⁻¹ H; with periods, of what the last due steps made, where rows span.

    A lookup's inverse costs nothing, and is of the average as it is.
    """
    case = zoo.by_name(name)
    loss_fn, params, args = case.make(jnp.float64)
    batches = ref.batches(case, args, sizes)
    plan = cqjax.plan(loss_fn)(params, *batches[0])
    given = {"damping": DAMPING, "relative_damping": 0.0, "ema_decay": DECAY}
    tx = cqjax.scale_by_consequentialism(plan=plan, **given, **options)
    step, state = stepper(loss_fn, tx), tx.init(params)
    past, kept, own, spanned = {}, {}, {}, {}
    positions = 4 if name == "embed" else 1  # its loss is a mean over tokens
    for t, batch in enumerate(batches):
        grads, updates, state = step(params, state, *batch)
        moments = ref.second_moments(case, params, batch)
        terms = positions * sizes[t]
        for site, new in moments.items():
            spanned.setdefault(site, new.spans and site != "params/embed/embedding")
            if t % options.get("capture_every", 1) == 0 or not new.spans:
                past.setdefault(site, []).append(new.xx / terms)
            mean = terms * ref.average(past[site], DECAY)
            own[site] = ref.inverse_of(mean, terms, DAMPING)
            if new.spans and spanned[site]:
                if t % options.get("update_every", 1) == 0:
                    kept[site] = own[site]
                own[site] = kept[site]
        assert_close(ref.flat(updates), ref.updates(case, moments, ref.flat(grads), own), 1e-7)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    assert (state.count, state.fallbacks.sum()) == (3, 0)
    assert len(state.moments) == len(moments)
    assert len(state.inverses) == sum(spanned.values()) * ("update_every" in options)


def test_slices_of_one_parameter_have_statistics_of_their_own():
    case = zoo.by_name("kernel_slices")
    loss_fn, params, args = case.make(jnp.float64)
    (args,) = ref.batches(case, args, [16])
    plan = cqjax.plan(loss_fn)(params, *args)
    tx = cqjax.scale_by_consequentialism(plan=plan, ema_decay=DECAY, update_every=2)
    state = tx.init(params)
    labels = {"by_output[0]", "by_output[1]", "by_input[0]", "by_input[1]"}
    assert set(state.moments) == set(state.inverses) == labels
    _, _, state = stepper(loss_fn, tx)(params, state, *args)
    moments = ref.second_moments(case, params, args)
    for label in labels:
        want = moments[label.replace("[", "#").removesuffix("]")].xx / len(args[0])
        total, weight = state.moments[label]
        np.testing.assert_allclose(total, (1 - DECAY) * want, rtol=1e-9)
        np.testing.assert_allclose(weight, 1 - DECAY)


# A linear layer, whose inputs are the batch's.


@pytest.mark.parametrize("name", OPTIONS)
def test_seven_batches(name):
    """Of different sizes: N is that of the batch whose XᵀX the inverse is of."""
    params, batches = layer((40, 25, 40, 25, 40, 25, 40), bias=name != "every third")
    results, state = run(*program(name, "b" in params), params, batches)
    wanted = inverses([rows_of(b, "b" in params) for b in batches], **OPTIONS[name])
    for batch, (_, got), inverse in zip(batches, results, wanted, strict=True):
        np.testing.assert_allclose(joined(got), inverse @ gradient(params, batch), rtol=1e-8)
    assert state.fallbacks.sum() == 0


@pytest.mark.parametrize("name", ["average", "kept", "kept average"])
def test_damping_is_that_of_the_step_in_which_the_inverse_is_made(name):
    """Absolute by a schedule, and relative to the mean eigenvalue of what is inverted."""
    params, batches = layer((40,) * 4)
    schedule = optax.linear_schedule(1.0, 5.0, 4)
    tx = transformation(params, batches[0], schedule, relative_damping=0.1, **OPTIONS[name])
    results, _ = run(tx, stepper(squared_error, tx), params, batches)

    def damping(t, xx):
        return 1.0 + t + 0.1 * np.linalg.eigvalsh(xx).mean()

    wanted = inverses([*map(rows_of, batches)], damping, **OPTIONS[name])
    for batch, (_, got), inverse in zip(batches, results, wanted, strict=True):
        np.testing.assert_allclose(joined(got), inverse @ gradient(params, batch), rtol=1e-8)


@pytest.mark.parametrize("shape", [(40, 5), (6, 30)])
def test_an_average_of_equal_batches_is_the_batch(shape):
    """Whatever the solver would be without it. Of an average all eigenvalues may be positive."""
    params, x, y = problem(*shape, 2, bias=True)
    tx = transformation(params, (x, y), relative_damping=0.1, ema_decay=DECAY)
    xx = moment(rows_of((x, y)))
    want = expected(params, x, y, DAMPING + 0.1 * np.trace(xx) / len(xx))
    for _, got in run(tx, stepper(squared_error, tx), params, [(x, y)] * 3)[0]:
        assert_close(got, want, 1e-7)


def test_what_costs_less_to_solve_than_to_keep_is_solved_exactly():
    """Many rows: the inverse of the last due step. Few: the update without a period."""
    (wide, few), (narrow, many) = layer((3,) * 4, 30), layer((40,) * 4)
    params = {"few": wide, "many": narrow}

    def loss(params, few, many):
        return squared_error(params["few"], *few) + squared_error(params["many"], *many)

    batches = list(zip(few, many, strict=True))
    plan = cqjax.plan(loss, batch_size=40)(params, *batches[0])
    tx = cqjax.scale_by_consequentialism(
        damping=DAMPING, plan=plan, update_every=3, relative_damping=0.0
    )
    step, state = stepper(loss, tx, batch_size=40), tx.init(params)
    assert set(state.inverses) == {"many/w"}
    for batch, inverse in zip(
        batches, inverses([*map(rows_of, many)], update_every=3), strict=True
    ):
        _, updates, state = step(params, state, *batch)
        want = inverse @ gradient(narrow, batch[1])
        np.testing.assert_allclose(joined(updates["many"]), want, rtol=1e-8)
        exact = jax.tree.map(lambda u: u * 40 / 3, expected(wide, *batch[0], DAMPING))
        assert_close(updates["few"], exact)


# Numbers that are not finite.


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("when", "bad"), [(0, np.nan), (1, np.inf), (6, np.nan)], ids=["first", "between", "due"]
)
@pytest.mark.parametrize("name", ["average", "kept", "kept average"])
def test_a_batch_that_is_not_finite_is_forgotten(name, when, bad):
    """Its own update is finite; the others are as if it had not been.

    Where nothing is kept from before, the next batch's is, due or not.
    """
    params, batches = layer((40,) * 9)
    x, y = batches[when]
    batches[when] = x.at[1, 2].set(bad), y
    results, state = run(*program(name), params, batches)
    updates = [u for _, u in results]
    assert all(np.isfinite(u).all() for u in jax.tree.leaves((updates, state)))
    assert state.fallbacks.sum() >= 1
    wanted = inverses([*map(rows_of, batches)], **OPTIONS[name])
    for t, (got, inverse) in enumerate(zip(updates, wanted, strict=True)):
        if t != when:
            want = inverse @ gradient(params, batches[t])
            np.testing.assert_allclose(joined(got), want, rtol=1e-8)


@pytest.mark.parametrize("spoiled", [0, 1], ids=["inputs", "targets"])
@pytest.mark.parametrize("when", [0, 1], ids=["due", "between"])
@pytest.mark.parametrize("name", ["average", "kept", "kept average"])
def test_a_batch_that_is_not_finite_is_counted_once(name, when, spoiled):
    """As it is without averages and periods, whether or not the inverse is due."""
    params, batches = layer((40,) * 2)
    batches[when] = tuple(
        a.at[0, 0].set(np.nan) if at == spoiled else a for at, a in enumerate(batches[when])
    )
    _, state = run(*program(name), params, batches)
    assert state.fallbacks.sum() == 1


def test_a_stack_loses_only_the_layer_that_is_not_finite():
    """A layer whose moments overflow keeps its old average; the others' go on."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2)))}

    def loss(params, x):
        z = jnp.einsum("lnd,ldo->lno", x, params["w"])
        return jnp.sum(jnp.mean(z, 1))

    x = np.random.default_rng(1).normal(size=(3, 2, 9, 4))
    x[1, 1] *= 1e200  # its square overflows
    plan = cqjax.plan(loss, batch_size=9)(params, x[0])
    tx = cqjax.scale_by_consequentialism(
        damping=DAMPING, plan=plan, ema_decay=DECAY, relative_damping=0.0
    )
    step, state = stepper(loss, tx, batch_size=9), tx.init(params)
    for batch in x:
        grads, updates, state = step(params, state, batch)
    for i, steps in ((0, (0, 1, 2)), (1, (0, 2))):
        xx = ref.average([moment(x[t, i]) for t in steps], DECAY)
        want = ref.inverse_of(xx, 9, DAMPING) @ np.asarray(grads["w"][i])
        np.testing.assert_allclose(updates["w"][i], want, rtol=1e-8)
