"""What statistics may cost: subsample and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
import zoo_moments as ref
from across_batches import stepper
from jaxpr_equations import equations
from linear_layer import assert_close, expected, problem, squared_error
from zoo_moments import DAMPING, block_inverses, second_moments, updated, updates

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


# subsample.

SUBSAMPLED = [
    ("mlp", 3, 25),
    ("mlp", 100, 25),  # of its layers one in 4 rows, and one in 3
    ("mlp", 3, 7),  # one in 1
    ("dense_leading_dims", 2, 11),
    ("conv_grouped", 3, 5),
    ("conv_grouped", 100, 5),
    ("embed", 4, 25),
    ("scan_layers", 9, 55),
    ("microbatch_scan", 2, 24),
]


@pytest.mark.parametrize(("name", "every", "size"), SUBSAMPLED)
def test_one_in_so_many_rows(name, every, size):
    """Or examples of a convolution, from the first on: m of n, and XᵀX times n / m.

    Fewer are left out of weights whose features would have fewer than two rows each.
    """
    case = zoo.by_name(name)
    loss_fn, params, args = case.make(jnp.float64)
    (args,) = ref.batches(case, args, [size])
    grads, got = updated(loss_fn, params, args, solver="primal", subsample=every)
    moments = second_moments(case, params, args, every)
    want = updates(case, moments, grads, block_inverses(moments, size, {}))
    assert_close(got, want, 1e-8)


@pytest.mark.parametrize("shape", [(7, 4, 2), (1, 4, 2)])
def test_all_rows_are_exact(shape):
    params, x, y = problem(*shape, bias=True)
    _, got = updated(squared_error, params, (x, y), solver="primal", subsample=1)
    assert_close(got, expected(params, x, y, DAMPING), 1e-8)


@pytest.mark.parametrize("name", ["mlp", "conv_same"])
def test_the_dual_takes_all_rows(name):
    case = zoo.by_name(name)
    loss_fn, params, args = case.make(jnp.float64)
    (args,) = ref.batches(case, args, [25])
    grads, got = updated(loss_fn, params, args, solver="dual", subsample=3)
    moments = second_moments(case, params, args)
    want = updates(case, moments, grads, block_inverses(moments, len(args[0]), {}))
    assert_close(got, want, 1e-8)


@pytest.mark.parametrize("name", ["dense_leading_dims", "conv_same"])
def test_an_average_takes_the_same_rows_whatever_was_captured(name):
    """It is a sum of XᵀX in any case: `solver` may change what that costs, not the rows."""
    case = zoo.by_name(name)
    loss_fn, params, args = case.make(jnp.float64)
    (args,) = ref.batches(case, args, [13])
    averages = []
    for solver in ("primal", "dual"):
        options = {"solver": solver, "subsample": 2}
        plan = cqjax.plan(loss_fn, **options)(params, *args)
        assert {block.subsample for block in plan.blocks} == {2}
        tx = cqjax.scale_by_consequentialism(plan=plan, ema_decay=0.5)
        _, _, state = stepper(loss_fn, tx, **options)(params, tx.init(params), *args)
        averages.append({label: moment.total for label, moment in state.moments.items()})
    assert_close(*averages, 1e-8)


@pytest.mark.parametrize(("rows", "every"), [(44, 7), (40, 6)])
def test_blocks_from_one_in_so_many_rows(rows, every):
    """Two for each feature of a block, of which there are fewer than of the weight."""
    params, x, y = problem(rows, 6, 2)
    grads, got = updated(squared_error, params, (x, y), max_dim=3, block_size=3, subsample=7)
    want = np.zeros_like(grads["w"])
    for part in (slice(3), slice(3, 6)):
        xx = rows / 7 * ref.second_moment(np.asarray(x)[None, :, part], None, every)[0]
        want[part] = ref.inverse_of(xx, rows, DAMPING) @ grads["w"][part]
    assert_close(got, {"w": want}, 1e-8)


@pytest.mark.parametrize("name", ["mlp", "conv_same", "scan_layers"])
def test_the_plan_says_what_it_saves(name):
    """The fewer rows, the fewer operations; what is left is the inverse and its product."""
    case = zoo.by_name(name)
    loss_fn, params, args = case.make(jnp.float64)
    (args,) = ref.batches(case, args, [100])
    (path, *_) = sorted(case.covered)

    def added(every):
        plan = cqjax.plan(loss_fn, solver="primal", subsample=every)(params, *args)
        line = next(line for line in str(plan).splitlines() if line.startswith(path))
        return float(line.split("primal")[1].split()[0].removesuffix("%"))

    costs = [added(every) for every in (1, 2, 4, 10**6)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    np.testing.assert_allclose(costs[0] - costs[1], 2 * (costs[1] - costs[2]), atol=0.5)


ROWS = [  # rows, features, subsample, the effective one
    (128, 64, 8, 1),
    (127, 64, 8, 1),
    (255, 64, 8, 1),
    (256, 64, 8, 2),
    (1023, 64, 8, 7),
    (1024, 64, 8, 8),
    (10**4, 64, 8, 8),
    (8, 64, 8, 1),
    (1, 1, 10**6, 1),
    (40, 1, 10**6, 20),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "d", "every", "effective"), ROWS)
def test_twice_as_many_rows_as_features_are_left(n, d, every, effective, bias):
    """Or all, if there are no more. The bias is not counted."""
    args = jax.eval_shape(lambda: problem(n, d, 2, bias=bias))
    for solver in ("primal", "dual"):
        (block,) = cqjax.plan(squared_error, solver=solver, subsample=every)(*args).blocks
        assert block.subsample == effective == ref.subsampled(every, n, d)


# precision.


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
    tx = cqjax.scale_by_consequentialism(DAMPING)
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
    tx = cqjax.scale_by_consequentialism(DAMPING)

    def update(params, x, y):
        _, grads, captures = fn(params, x, y)
        return tx.update(grads, tx.init(params), captures=captures)

    found = {}
    for eqn, pair in products(jax.make_jaxpr(update)(*args)):
        found.setdefault(eqn.outvars[0].aval.shape, set()).update(pair)
    assert found.pop((5, 2)) | found.pop((2, 13)) == {None}  # the loss's own, and its gradient
    assert found.pop((1, 5, 5)) | found.pop((1, 13, 2)) == {precision}
    assert found.pop((1, 5, 2)) == {"highest"}
    assert set.union(*found.values()) == {"highest"}


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
