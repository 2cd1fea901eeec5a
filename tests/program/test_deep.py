"""Deep networks: the work grows with the number of layers, no faster, and nothing recurses."""

import sys

import jax
import jax.numpy as jnp
import pytest

import cqjax
from cqjax.program.number_sets import members

X = jnp.ones((4, 2))


def residual(depth):
    params = [{"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))} for _ in range(depth)]

    def loss_fn(params, x):
        for layer in params:
            x = x + jax.nn.relu(x @ layer["a"]) @ layer["b"]
        return jnp.mean((x - 1) ** 2)

    return loss_fn, params


def work(function):
    """How many lines of cqjax it runs; each turn of a loop within one line counts, too."""
    lines = 0

    def count(frame, event, arg):
        nonlocal lines
        lines += 1
        return count

    def of_cqjax(frame, event, arg):
        return count if "/cqjax/" in frame.f_code.co_filename else None

    before = sys.gettrace()  # a measurement of coverage, say
    sys.settrace(of_cqjax)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def planned(loss_fn, params):
    plan = cqjax.plan(loss_fn)(params, X)
    return plan, str(plan), plan.flow.nodes, cqjax.back_matching_units(plan)


def updated(loss_fn, params):
    tx = cqjax.csgd(0.1)

    def step(params, x):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
        assert len(dict(captures.items())) == len(captures)
        return tx.update(grads, tx.init(params), params, captures=captures)

    return jax.eval_shape(step, params, X)


@pytest.mark.parametrize("run", [planned, updated])
def test_twice_the_depth_is_twice_the_work(run):
    run(*residual(3))  # what is done once in a process
    single, double = (work(lambda n=n: run(*residual(n))) for n in (20, 40))
    assert double < 2.1 * single


def test_each_layer_of_a_residual_network_reads_all_below():
    flow = cqjax.plan(residual(5)[0])(residual(5)[1], X).flow
    sources = [sorted(members(node.sources)) for node in flow.nodes]
    assert sources == [each for k in range(5) for each in ([2 * j + 1 for j in range(k)], [2 * k])]
    assert sorted(members(flow.top)) == [1, 3, 5, 7, 9]


def test_it_is_deeper_than_the_stack():
    """The residual stream, and a constant that comes through as many steps."""
    depth = 1200
    assert depth > sys.getrecursionlimit()
    blocks, params = residual(depth)

    def loss_fn(params, x):
        constant = jnp.ones(())
        for _ in range(depth):
            constant = constant * 0.5 + 1
        return blocks(params["blocks"], x @ (constant * params["w"]))

    plan = cqjax.plan(loss_fn)({"blocks": params, "w": jnp.eye(2)}, X)
    assert plan.batch_size == X.size and not plan.uncovered()
    assert plan.flow.top.bit_count() == depth + 1
