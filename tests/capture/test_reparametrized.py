"""What a plan says of weights that a loss makes of parameters."""

import pickle

import jax
import jax.numpy as jnp
import pytest

import cqjax

X, Y = jnp.ones((8, 3)), jnp.ones((8, 2))
PARAMS = {"v": jnp.ones((3, 2)), "g": jnp.ones(2), "b": jnp.zeros(2)}


def loss_fn(params, x, y):
    weight = params["g"] * params["v"] / jnp.linalg.norm(params["v"], axis=0)
    return jnp.mean(jnp.sum((x @ weight + params["b"] - y) ** 2, -1))


def statuses(loss, params=PARAMS, *args, **options):
    plan = cqjax.plan(loss, reparametrized="nearest", **options)(params, *(args or (X, Y)))
    return {p.path: p.status for p in plan.parameters}


def test_without_the_option_reasons_name_it():
    uncovered = cqjax.plan(loss_fn)(PARAMS, X, Y).uncovered()
    assert uncovered["b"] == ("is the bias of a layer whose weight is not solved for",)
    for path in ("v", "g"):
        assert all('reparametrized="nearest"' in reason for reason in uncovered[path])


def test_with_it_the_plan_says_of_what_the_weight_is_made():
    plan = cqjax.plan(loss_fn, reparametrized="nearest", solver="dual")(PARAMS, X, Y)
    assert plan.uncovered() == {}
    assert [block.solver for block in plan.blocks] == ["primal"]
    table = str(plan).splitlines()
    assert sum("W = f(g, v)" in line for line in table) == 2
    assert any(line.endswith("bias of g + v") for line in table)
    assert str(pickle.loads(pickle.dumps(plan))) == str(plan)


def test_another_use_of_a_parameter_leaves_it_partly_covered():
    def penalised(params, x, y):
        return loss_fn(params, x, y) + jnp.sum(params["v"] ** 2)

    found = statuses(penalised)
    assert found == {"v": "partly covered", "g": "covered", "b": "covered"}


def test_the_same_weight_made_twice_is_one():
    def siamese(params, x, y):
        return loss_fn(params, x, y) + loss_fn(params, 2 * x, y)

    plan = cqjax.plan(siamese, reparametrized="nearest")(PARAMS, X, Y)
    assert [len(block.sites) for block in plan.blocks] == [2]


def test_two_weights_of_one_parameter_are_not_covered():
    def twice(params, x, y):
        hidden = jnp.tanh(x @ (params["v"] * params["g"]))
        return jnp.mean(jnp.sum((x @ (params["v"] * jnp.exp(params["g"])) - hidden) ** 2, -1))

    plan = cqjax.plan(twice, reparametrized="nearest")(PARAMS, X, Y)
    (reason,) = plan.uncovered()["v"]
    assert reason.startswith("is made into the weights of 2 products")


def test_a_layer_keeps_its_coverage_where_its_weight_makes_another():
    def tied(params, x, y):
        hidden = jnp.tanh(x @ params["v"])
        return jnp.mean(jnp.sum((x @ (params["v"] * params["g"]) - hidden) ** 2, -1))

    assert statuses(tied) == {"v": "partly covered", "g": "uncovered", "b": "uncovered"}


def test_iterations_of_spectral_normalisation_are_no_layers():
    def spectral(params, x, y, u):
        weight = params["v"]
        left = jax.lax.stop_gradient(weight @ u)
        left = left / jnp.linalg.norm(left)
        norm = left @ weight @ u
        return jnp.mean(jnp.sum((x @ (weight / norm) - y) ** 2, -1))

    u = jnp.array([0.6, 0.8])
    params = {"v": jnp.ones((3, 2))}
    plan = cqjax.plan(spectral, reparametrized="nearest", batch_size=8)(params, X, Y, u)
    assert [(block.rows, len(block.sites)) for block in plan.blocks] == [(8, 1)]
    assert plan.parameters[0].status == "covered"
    _, grads, captures = cqjax.value_and_grad(spectral, reparametrized="nearest")(params, X, Y, u)
    tx = cqjax.scale_by_consequentialism()
    updates, state = tx.update(grads, tx.init(params), captures=captures)
    assert jnp.isfinite(updates["v"]).all()
    assert not state.fallbacks.any()


def test_a_factor_of_the_batch_makes_no_weight():
    def gated(params, x, y):
        return jnp.mean(jnp.sum((x @ (params["v"] * jnp.tanh(x.sum())) - y) ** 2, -1))

    plan = cqjax.plan(gated, reparametrized="nearest")(PARAMS, X, Y)
    assert plan.uncovered()["v"] == ("enters `mul`, which is no matrix product",)


def test_what_is_refused():
    with pytest.raises(ValueError, match="reparametrized='all'"):
        cqjax.value_and_grad(loss_fn, reparametrized="all")
    with pytest.raises(ValueError, match="back-matching knows no weights"):
        cqjax.value_and_grad(loss_fn, reparametrized="nearest", signal="matched")
    differentiate = cqjax.value_and_grad(loss_fn, reparametrized="nearest")
    plan = differentiate.plan(PARAMS, X, Y)
    with pytest.raises(ValueError, match="makes the weight of g \\+ v of parameters"):
        cqjax.multi_steps(cqjax.csgd(0.1), 2, plan=plan)
    _, _, captures = differentiate(PARAMS, X, Y)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(captures)
