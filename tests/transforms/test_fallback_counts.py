"""Where the state of `scale_by_consequentialism` counts solves that failed: at which layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_layer import first_step, problem, squared_error

import cqjax

NAMES = ("first", "second", "third")
TX = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)


def loss_fn(params, batches):
    """Three layers side by side; leaves: first/b, first/w, ..., third/w."""
    losses = (squared_error(params[name], *batches[name]) for name in NAMES)
    return sum(losses, start=jnp.zeros(()))


def make(bad=()):
    """(params, batches); the inputs of the layers named in `bad` have a NaN."""
    problems = {name: problem(4, 3, 2, bias=True, seed=i) for i, name in enumerate(NAMES)}
    params = {name: p for name, (p, _, _) in problems.items()}
    batches = {
        name: (x.at[0, 0].set(jnp.nan) if name in bad else x, y)
        for name, (_, x, y) in problems.items()
    }
    return params, batches


def step_of(tx, **kwargs):
    def step(params, state, batches):
        _, grads, captures = cqjax.value_and_grad(loss_fn, **kwargs)(params, batches)
        return tx.update(grads, state, params, captures=captures)[1]

    return jax.jit(step)


STEP = step_of(TX)


def at(counts):
    """Each layer's count: at the weight, and none at the bias."""
    by_name = np.asarray(counts).reshape(*counts.shape[:-1], 3, 2)
    assert counts.dtype == jnp.int32 and not by_name[..., 0].any()
    return by_name[..., 1].tolist()


def test_each_layer_has_its_own():
    params, _ = make()
    state = TX.init(params)
    assert at(state.fallbacks) == [0, 0, 0]
    for bad, want in (("second", [0, 1, 0]), (("second", "third"), [0, 2, 1]), ((), [0, 2, 1])):
        state = STEP(params, state, make(bad)[1])
        assert at(state.fallbacks) == want


def test_over_scan_cond_and_vmap():
    params, good = make()
    many = jax.tree.map(lambda *b: jnp.stack(b), make("first")[1], good, make("third")[1])

    def scanned(state):
        def maybe(state, batch):
            due = jnp.isnan(batch["third"][0]).any() | jnp.isnan(batch["first"][0]).any()
            return jax.lax.cond(due, lambda: STEP(params, state, batch), lambda: state), None

        return jax.lax.scan(maybe, state, many)[0]

    state = scanned(TX.init(params))
    assert at(state.fallbacks) == [1, 0, 1] and state.count == 2
    each = jax.vmap(lambda batch: STEP(params, TX.init(params), batch))(many)
    assert at(each.fallbacks) == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_masked_leaves_have_a_place():
    params, batches = make(("first", "third"))
    mask = {name: jax.tree.map(lambda _, n=name: n != "first", params[name]) for name in NAMES}
    tx = optax.masked(TX, mask)
    state = step_of(tx)(params, tx.init(params), batches)
    assert at(state.inner_state.fallbacks) == [0, 0, 1]


def test_partition():
    params, batches = make(NAMES)
    labels = {name: jax.tree.map(lambda _, n=name: n == "first", params[name]) for name in NAMES}
    tx = optax.partition({True: optax.adam(0.1), False: TX}, labels)
    state = step_of(tx)(params, tx.init(params), batches)
    (counts,) = (n for _, n in optax.tree.get_all_with_path(state, "fallbacks"))
    assert at(counts) == [0, 1, 1]


def test_injected_hyperparameters():
    params, batches = make("second")
    tx = optax.inject_hyperparams(cqjax.scale_by_consequentialism)(
        damping=1e-2, relative_damping=0.0
    )
    state = step_of(tx)(params, tx.init(params), batches)
    assert at(state.inner_state.fallbacks) == [0, 1, 0]


def test_counts_are_no_parameters():
    params, batches = make("second")
    state = STEP(params, TX.init(params), batches)
    mapped = optax.tree.map_params(TX, lambda p: p + 1, state)
    assert at(mapped.fallbacks) == [0, 1, 0]


def test_a_stack_counts_each_of_its_layers_at_one_place():
    """And a parameter without a solve whether its gradient was finite."""
    params = {"other": jnp.ones(()), "scale": jnp.ones(()), "stack": jnp.ones((3, 2, 2))}

    def loss(params, x):
        z = jnp.einsum("lnd,ldo->lno", x, params["stack"])
        return jnp.mean(jnp.sum(z**2, 0)) * params["scale"] + params["other"]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)))
    x = x.at[:2, 0].set(jnp.inf)
    *_, state = first_step(TX, loss, params, x, batch_size=4)
    assert state.fallbacks.tolist() == [0, 1, 2]


def test_slices_and_joined_weights_count_at_the_first_parameter():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones((2, 4))}

    def loss(params, x):
        joined = x @ jnp.concatenate([params["a"], params["b"]], 1)
        left, right = params["c"][:, :2], params["c"][:, 2:]
        return jnp.mean(joined**2) + jnp.mean((x @ left) ** 2) + jnp.mean((x @ right) ** 3)

    x = jnp.ones((3, 2)).at[0, 0].set(jnp.nan)
    *_, state = first_step(TX, loss, params, x)
    assert state.fallbacks.tolist() == [1, 0, 2]


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_a_state_made_for_other_parameters(solver):
    params, batches = make()
    fn = jax.jit(cqjax.value_and_grad(loss_fn, solver=solver))
    _, grads, captures = fn(params, batches)
    message = r"the state has counts of shape \(2,\); expected \(6,\).*first/b, first/w.*init"
    with pytest.raises(ValueError, match=message):
        TX.update(grads, TX.init(params["first"]), captures=captures)
