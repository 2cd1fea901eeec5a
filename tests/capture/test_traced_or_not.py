"""What is captured, and how often its rows count, is the same whether `jax.jit` traces or not."""

import jax
import pytest
import zoo

import cqjax


@pytest.mark.parametrize("name", [case.name for case in zoo.CASES])
def test_plans_of_the_zoo_are_the_same(name):
    case = zoo.by_name(name)
    loss_fn, params, args = zoo.made(name)
    plans = []

    def planned(params, *args):
        plans.append(cqjax.plan(loss_fn, **case.kwargs)(params, *args))

    planned(params, *args)  # nothing is traced but the parameters
    jax.eval_shape(planned, params, *args)
    jax.eval_shape(lambda params: planned(params, *args), params)  # the arguments are closed over
    first, *others = plans
    for plan in others:
        assert plan.blocks == first.blocks and plan.parameters == first.parameters
        assert plan.batch_size_source == first.batch_size_source
        assert plan.examples == first.examples
