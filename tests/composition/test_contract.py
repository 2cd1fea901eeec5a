"""What every transformation of Optax keeps to, for each of ours, in the spirit of Optax's tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from across_batches import quickly
from two_layers import assert_close

import cqjax

OPTIONS = {"solver": "dual"}  # nlms needs rows


def loss_fn(params, x, y):
    """One layer, and a gain that is no weight of a product."""
    z = jnp.tanh(x @ params["w"] + params["b"]) * params["gain"]
    return jnp.mean(jnp.sum((z - y) ** 2, -1))


def problem(dtype):
    """(params, three batches), in this dtype."""
    rng = np.random.default_rng(0)
    shapes = {"w": (5, 4), "b": (4,), "gain": (4,)}
    params = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    batches = [(rng.normal(size=(12, 5)), rng.normal(size=(12, 4))) for _ in range(3)]
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, batches))


def kept(**options):
    """`scale_by_consequentialism` with something in its state."""
    return lambda plan: cqjax.scale_by_consequentialism(
        damping=0.1, relative_damping=0.0, plan=plan, **options
    )


MADE = {
    "scale_by_consequentialism": lambda plan: cqjax.scale_by_consequentialism(
        damping=0.1, relative_damping=0.0
    ),
    "update_every": kept(update_every=2),
    "ema_decay": kept(ema_decay=0.9),
    "both": kept(update_every=2, ema_decay=0.9, capture_every=3),
    "scale_by_nlms": lambda plan: cqjax.scale_by_nlms(0.1),
    "clip_by_output_change": lambda plan: cqjax.clip_by_output_change(0.1),
    "scale_by_learning_rates": lambda plan: cqjax.scale_by_learning_rates(0.1, 0.01),
    "scale_by_back_matching": lambda plan: cqjax.scale_by_back_matching(plan),
    "measured": lambda plan: cqjax.scale_by_back_matching(plan, factors="measured"),
    "scale_by_lsalr": lambda plan: cqjax.scale_by_lsalr(),
    "fletcher_reeves": lambda plan: cqjax.scale_by_conjugate_gradient("fletcher_reeves"),
    "hestenes_stiefel": lambda plan: cqjax.scale_by_conjugate_gradient(),
    "csgd": lambda plan: cqjax.csgd(0.1, damping=0.1, relative_damping=0.0),
    "cmomentum": lambda plan: cqjax.cmomentum(0.1, damping=0.1, relative_damping=0.0),
    "cnesterov": lambda plan: cqjax.cnesterov(0.1, damping=0.1, relative_damping=0.1),
    "crmsprop": lambda plan: cqjax.crmsprop(0.1, damping=0.1, relative_damping=0.0),
    "cadam": lambda plan: cqjax.cadam(0.1, damping=0.1, relative_damping=0.0),
    "nlms": lambda plan: cqjax.nlms(0.1),
    "lsalr": lambda plan: cqjax.lsalr(0.1),
    "back_matching_sgd": lambda plan: cqjax.back_matching_sgd(0.1, plan=plan),
    "multi_steps": lambda plan: cqjax.multi_steps(cqjax.cmomentum(0.1), 2, plan=plan),
}

WITHOUT_SOLVES = {
    "clip_by_output_change",
    "scale_by_learning_rates",
    "scale_by_back_matching",
    "measured",
    "scale_by_lsalr",
    "fletcher_reeves",
    "hestenes_stiefel",
    "lsalr",
    "back_matching_sgd",
}


@pytest.fixture(params=MADE)
def name(request):
    return request.param


def case(name, dtype=jnp.float32):
    """(transformation, params, batches), in this dtype."""
    params, batches = problem(dtype)
    return MADE[name](cqjax.plan(loss_fn, **OPTIONS)(params, *batches[0])), params, batches


def types(tree):
    """Structure, shapes, dtypes and weak types."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def step(tx, params, state, batch):
    """A step, with everything that any of them takes and an argument that none does."""
    value, grads, captures = cqjax.value_and_grad(loss_fn, **OPTIONS)(params, *batch)
    updates, state = tx.update(
        grads,
        state,
        params,
        captures=captures,
        value=value,
        value_fn=lambda params: loss_fn(params, *batch),
        an_argument_that_nobody_expects=1,
    )
    return updates, optax.apply_updates(params, updates), state


def run(tx, params, state, batches):
    """All steps, jitted one by one, and how often the step was traced."""
    traces = []

    @quickly
    def jitted(params, state, batch):
        traces.append(None)
        return step(tx, params, state, batch)

    for batch in batches:
        updates, params, state = jitted(params, state, batch)
    return updates, params, state, len(traces)


@functools.cache
def trained(name):
    tx, params, batches = case(name)
    return run(tx, params, tx.init(params), batches)


def test_one_trace_for_all_steps(name):
    """Also: unknown extra arguments are accepted, and the state stays what it was, and finite."""
    tx, params, _ = case(name)
    updates, _, state, traces = trained(name)
    assert traces == 1
    assert types(updates) == types(params)
    assert types(state) == types(tx.init(params))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((updates, state)))


def test_arrays_are_all_that_a_state_holds(name):
    tx, params, _ = case(name)
    state = tx.init(params)
    if name in ("update_every", "ema_decay", "both"):
        assert state.inverses if name != "ema_decay" else state.moments
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(tx) is tx


def test_initialised_under_jit(name):
    tx, params, _ = case(name)
    state, jitted = tx.init(params), jax.jit(tx.init)(params)
    assert types(jitted) == types(state)
    assert_close(jitted, state, rtol=0)


def test_map_over_what_is_like_the_parameters(name):
    """`optax.tree.map_params` finds the trees of the parameters' structure, and them alone."""
    tx, params, _ = case(name)
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert_close(same, state, rtol=0)
    shapes = []
    optax.tree.map_params(tx, lambda leaf, p: shapes.append((leaf.shape, p.shape)), state, params)
    assert all(got == want for got, want in shapes)
    momentum = {"cmomentum", "cnesterov", "crmsprop", "lsalr", "back_matching_sgd", "multi_steps"}
    trees = 2 if name in {"cadam", "hestenes_stiefel"} else name in momentum | {"fletcher_reeves"}
    trees += name == "multi_steps"
    assert len(shapes) == trees * len(jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(name, dtype):
    """Updates have the parameters' dtypes, and states keep theirs, so that `cond` takes them."""
    with jax.enable_x64(dtype == jnp.float64):
        tx, params, batches = case(name, dtype)
        state = tx.init(params)

        def perhaps(go, params, state):
            def go_on():
                return step(tx, params, state, batches[0])[::2]

            return jax.lax.cond(go, go_on, lambda: (params, state))

        assert types(jax.eval_shape(perhaps, True, params, state)) == types((params, state))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_within_multi_steps_of_optax(name, dtype):
    """What solves refuses; the others keep to the contract."""
    tx, params, batches = case(name, dtype)
    tx = optax.MultiSteps(tx, 2)
    if name not in WITHOUT_SOLVES:
        with pytest.raises(ValueError, match="called by optax.MultiSteps.*use cqjax.multi_steps"):
            jax.eval_shape(functools.partial(step, tx), params, tx.init(params), batches[0])
        return
    updates, _, state = jax.eval_shape(
        functools.partial(step, tx), params, tx.init(params), batches[0]
    )
    assert types(updates) == types(params)
    assert types(state) == types(tx.init(params))


def test_replicas_through_scan(name):
    """With the result of single steps for each of the replicas that `vmap` trains together."""
    tx, params, batches = case(name)

    def train(params, batches):
        def body(carry, batch):
            _, *carry = step(tx, *carry, batch)
            return tuple(carry), None

        return jax.lax.scan(body, (params, tx.init(params)), batches)[0]

    many = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    got = quickly(jax.vmap(train, in_axes=(0, None)))(many, stacked)
    assert_close(jax.tree.map(lambda leaf: leaf[0], got), trained(name)[1:3], rtol=2e-4)


DAMPINGS = {"damping": 0.1, "relative_damping": 0.2}
OF_ALIASES = {**DAMPINGS, "weight_decay": 0.01, "max_change": 0.2}
NUMBERS = {
    "scale_by_consequentialism": DAMPINGS,
    "scale_by_nlms": {"eps": 0.1},
    "clip_by_output_change": {"max_change": 0.1, "learning_rate": 2.0},
    "scale_by_learning_rates": {"covered": 0.1, "uncovered": 0.01},
    "csgd": {"learning_rate": 0.1, **OF_ALIASES},
    "cmomentum": {"learning_rate": 0.1, "momentum": 0.8, **OF_ALIASES},
    "cnesterov": {"learning_rate": 0.1, "momentum": 0.8, **OF_ALIASES},
    "crmsprop": {"learning_rate": 0.1, "decay": 0.8, "eps": 1e-3, **OF_ALIASES},
    "cadam": {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-3, **OF_ALIASES},
    "nlms": {"learning_rate": 0.1, "eps": 0.1},
    "lsalr": {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.01},
    "scale_by_back_matching": {"refresh_every": 2, "decay": 0.8},
    "back_matching_sgd": {
        "learning_rate": 0.01,
        "momentum": 0.8,
        "weight_decay": 0.1,
        "refresh_every": 2,
        "decay": 0.8,
    },
}


@pytest.mark.parametrize("factory", NUMBERS)
def test_injected_numbers(factory):
    """Every number can be one that `inject_hyperparams` holds in its state."""
    params, batches = problem(jnp.float32)
    make, numbers, more = getattr(cqjax, factory), NUMBERS[factory], {}
    if "back_matching" in factory:
        more = {"plan": cqjax.plan(loss_fn)(params, *batches[0]), "factors": "measured"}
    plain, injected = make(**numbers, **more), optax.inject_hyperparams(make)(**numbers, **more)
    _, want, want_state, _ = run(plain, params, plain.init(params), batches)
    _, got, got_state, traces = run(injected, params, injected.init(params), batches)
    assert set(got_state.hyperparams) >= set(numbers) and traces == 1
    assert types(got_state) == types(injected.init(params))
    assert_close(got, want, rtol=2e-4)
    assert_close(got_state.inner_state, want_state, rtol=2e-4)


def test_an_injected_average_decays():
    """Periods are structure and stay Python's; the average's decay is a number."""
    params, batches = problem(jnp.float32)
    options = {
        "plan": cqjax.plan(loss_fn)(params, *batches[0]),
        "ema_decay": 0.9,
        "update_every": 2,
    }
    plain = cqjax.scale_by_consequentialism(damping=0.1, relative_damping=0.0, **options)
    make = optax.inject_hyperparams(cqjax.scale_by_consequentialism, static_args="update_every")
    want = run(plain, params, plain.init(params), batches)[1]
    injected = make(damping=0.1, relative_damping=0.0, **options)
    got, state = run(injected, params, injected.init(params), batches)[1:3]
    np.testing.assert_allclose(state.hyperparams["ema_decay"], 0.9, rtol=1e-6)
    assert_close(got, want, rtol=2e-4)
