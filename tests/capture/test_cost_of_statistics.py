"""The precision of the products that statistics are made of."""

import jax
import jax.numpy as jnp
import pytest
import zoo
from jaxpr_equations import equations
from linear_layer import assert_close, problem, squared_error
from zoo_moments import DAMPING, updated

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


def products(jaxpr):
    """(equation, {precision of its operands}), for every matrix product and convolution."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            pair = eqn.params["precision"] or (None,)
            yield eqn, {None if p is None else p.name.lower() for p in pair}


def precisions(loss_fn, params, args, holds, **options):
    """Of the products that `holds(their shapes)`, and of the others, in an update."""
    fn = cqjax.value_and_grad(loss_fn, **options)
    _, grads, captures = jax.eval_shape(fn, params, *args)
    tx = cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(lambda g, c: tx.update(g, state, captures=c))(grads, captures)
    chosen, others = [], []
    for eqn, precision in products(jaxpr):
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        (chosen if holds(eqn.primitive.name, shapes) else others).append(precision)
    assert chosen and others
    return set.union(*chosen), set.union(*others)


PRECISIONS = ["default", "high", "highest"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_of_the_primal(precision):
    """XᵀX as asked; its inverse, and that times the gradient, at the highest."""
    args = problem(11, 7, 2, bias=True)

    def of_rows(_, shapes):
        return any(11 in shape for shape in shapes)

    found = precisions(
        squared_error, args[0], args[1:], of_rows, solver="primal", precision=precision
    )
    assert found == ({precision}, {"highest"})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_of_the_dual(precision):
    """XXᵀ and Xᵀ times the solution as asked; the solution at the highest."""
    args = problem(5, 13, 2)
    fn = cqjax.value_and_grad(squared_error, solver="dual", precision=precision)
    tx = cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0)

    def update(params, x, y):
        _, grads, captures = fn(params, x, y)
        return tx.update(grads, tx.init(params), captures=captures)

    found = {}
    for eqn, pair in products(jax.make_jaxpr(update)(*args)):
        found.setdefault(eqn.outvars[0].aval.shape, set()).update(pair)
    # The loss's own product and its gradient are of the same shapes, and the inverse is of XXᵀ's.
    assert found.pop((5, 2)) == {None, "highest"}
    assert found.pop((13, 2)) | found.pop((2, 13), set()) == {None, precision}
    assert found.pop((5, 5)) == {precision, "highest"}
    assert not found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("stride", "ways"), [(1, {"conv_general_dilated"}), (3, {"dot_general"})])
def test_precision_of_a_convolution(stride, ways, precision):
    """By the autocorrelation, and by patches where windows do not overlap."""
    params, x = {"k": jnp.ones((3, 3, 2, 2))}, jnp.ones((17, 9, 9, 2))

    def loss(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        z = jax.lax.conv_general_dilated(x, params["k"], strides, "SAME", dimension_numbers=numbers)
        return jnp.mean(z**2)

    seen = set()

    def of_input(name, shapes):
        found = name == "conv_general_dilated" or any(n % 17 == 0 for s in shapes for n in s)
        seen.update({name} if found else ())
        return found

    found = precisions(loss, params, (x,), of_input, solver="primal", precision=precision)
    assert found == ({precision}, {"highest"})
    assert ways <= seen and ("conv_general_dilated" in seen) == (stride == 1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_within_a_loop(precision):
    """There XᵀX is taken in the backward pass."""
    case = zoo.by_name("microbatch_scan")
    loss_fn, params, args = case.make()
    fn = cqjax.value_and_grad(loss_fn, solver="primal", precision=precision)
    found = [pair for _, pair in products(jax.make_jaxpr(fn)(params, *args))]
    assert found.count({precision}) == 2  # the two weights'
    assert set.union(*found) == {None, precision}


SOLVERS = {"mlp": "dual", "conv_1d": "primal"}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="its products are of lower precision")
@pytest.mark.parametrize(("name", "solver"), SOLVERS.items())
def test_on_a_cpu_precision_changes_nothing(name, solver):
    loss_fn, params, args = zoo.by_name(name).make(jnp.float64)
    (_, low), (_, high) = (
        updated(loss_fn, params, args, solver=solver, precision=precision)
        for precision in ("default", jax.lax.Precision.HIGHEST)
    )
    assert_close(low, high, 1e-12)
