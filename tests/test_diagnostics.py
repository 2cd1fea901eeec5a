"""`cqjax.diagnostics` against NumPy's singular values, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_layer import first_step, problem, squared_error

import cqjax
from cqjax.diagnostics import report

pytestmark = pytest.mark.usefixtures("float64")

MU, DAMPING = 0.4, 0.3
SHAPES = [(4, 7, 2), (9, 3, 2), (5, 5, 1)]
quick_report = jax.jit(functools.partial(report, relative_damping=0.0))


def step(args, damping=DAMPING, change=lambda u: u, loss=squared_error, **kwargs):
    """(captures, updates, state) of C-SGD, whose updates were changed."""
    _, captures, updates, state = first_step(
        cqjax.csgd(MU, damping=damping, relative_damping=0.0, max_change=None),
        loss,
        *args,
        **kwargs,
    )
    return captures, jax.tree.map(change, updates), state


def rows_of(x):
    return np.concatenate([np.asarray(x), np.ones((len(x), 1))], 1)


def joined(tree):
    return np.concatenate([np.asarray(tree["w"]), np.asarray(tree["b"])[None]])


def references(args, updates, solver, damping=DAMPING):
    """Every number of a report on one layer, by its singular value decomposition."""
    params, x, y = args
    rows = rows_of(x)
    targets = -MU * (rows @ joined(params) - np.asarray(y))
    moved = rows @ joined(updates)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    s = s[s > 1e-9 * s[0]]
    u = u[:, : len(s)]
    matrix = rows @ rows.T if solver == "dual" else rows.T @ rows
    p = s / s.sum()
    reached = u @ u.T @ targets
    return {
        "condition": np.linalg.cond(matrix + damping * np.eye(len(matrix))),
        "restricted_condition": (s[0] / s[-1]) ** 2,
        "rank": len(s),
        "effective_rank": np.prod(p**-p),
        "effective_dimension": np.trace(
            rows.T @ rows @ np.linalg.inv(rows.T @ rows + damping * np.eye(rows.shape[1]))
        ),
        "residual": np.linalg.norm(moved - targets) / np.linalg.norm(targets),
        "reachable_residual": np.linalg.norm(moved - reached) / np.linalg.norm(reached),
    }


CHANGES = {
    "as it is": lambda u: u,
    "with momentum": lambda u: 1.7 * u,
    "anything": lambda u: jnp.cos(jnp.arange(u.size) + 1.0).reshape(u.shape),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("solver", ["dual", "primal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(shape, solver, change):
    args = problem(*shape, bias=True)
    captures, updates, _ = step(args, change=CHANGES[change], solver=solver)
    (layer,) = quick_report(captures, updates, MU, damping=DAMPING).layers.values()
    for name, want in references(args, updates, solver).items():
        if (name, solver) == ("residual", "primal"):
            want = np.nan
        np.testing.assert_allclose(getattr(layer, name), [want], rtol=1e-6, err_msg=name)
    assert layer.fallbacks is None


@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_rows_that_depend_on_one_another(solver):
    params, x, y = problem(6, 4, 2, bias=True)
    args = params, jnp.concatenate([x[:2], x[:2], x[:2] / 2 + x[1::-1] / 2]), y
    captures, updates, _ = step(args, solver=solver)
    (layer,) = quick_report(captures, updates, MU, damping=DAMPING).layers.values()
    want = references(args, updates, solver)
    assert want["rank"] == 2 and want["residual"] > 1.5 * want["reachable_residual"]
    for name in ("rank", "effective_rank", "restricted_condition", "reachable_residual"):
        np.testing.assert_allclose(getattr(layer, name), [want[name]], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("solver", "shape"), [("dual", SHAPES[0]), ("primal", SHAPES[1])])
def test_csgd_reaches_all_that_can_be_reached(solver, shape):
    """Without damping. And what does not move is as far off as it was meant to move."""
    args = problem(*shape, bias=True)
    captures, updates, _ = step(args, damping=0.0, solver=solver)
    (layer,) = quick_report(captures, updates, MU).layers.values()
    np.testing.assert_allclose(layer.reachable_residual, [0], atol=1e-9)
    if solver == "dual":
        np.testing.assert_allclose(layer.residual, [0], atol=1e-9)
    still = jax.tree.map(jnp.zeros_like, updates)
    (layer,) = quick_report(captures, still, MU).layers.values()
    np.testing.assert_allclose(layer.reachable_residual, [1], rtol=1e-12)
    if solver == "dual":
        np.testing.assert_allclose(layer.residual, [1], rtol=1e-12)


def test_relative_damping():
    params, x, y = problem(9, 3, 2, bias=True)
    captures, updates, _ = step((params, x, y))
    (layer,) = quick_report(captures, damping=0.1, relative_damping=0.5).layers.values()
    damping = 0.1 + 0.5 * np.sum(rows_of(x) ** 2) / 4
    want = references((params, x, y), updates, "primal", damping)
    np.testing.assert_allclose(layer.condition, [want["condition"]], rtol=1e-6)
    np.testing.assert_allclose(layer.effective_dimension, [want["effective_dimension"]], rtol=1e-6)
    assert layer.residual is None and layer.reachable_residual is None


def test_stacks_convolutions_and_lookups():
    """From rows and from XᵀX alike; each of a stack's weights on its own."""
    rng = np.random.default_rng(0)
    params = {
        "conv": jnp.asarray(rng.normal(size=(2, 2, 1, 2))),
        "stack": jnp.asarray(rng.normal(size=(3, 4, 2))),
        "table": jnp.asarray(rng.normal(size=(5, 2))),
    }
    images = jnp.asarray(rng.normal(size=(4, 3, 3, 1)))
    inputs, read = jnp.asarray(rng.normal(size=(4, 3, 4))), jnp.asarray([1, 1, 3, 1])

    def loss(params, images, inputs, read):
        dims = ("NHWC", "HWIO", "NHWC")
        maps = jax.lax.conv_general_dilated(
            images, params["conv"], (1, 1), "VALID", dimension_numbers=dims
        )
        z = jnp.einsum("nld,ldo->nlo", inputs, params["stack"])
        looked_up = params["table"][read]
        return jnp.mean(
            jnp.sum(maps**2, (1, 2, 3)) + jnp.sum(z**2, (1, 2)) + jnp.sum(looked_up**2, 1)
        )

    args = params, images, inputs, read
    found = {}
    for solver in ("dual", "primal"):
        captures, updates, _ = step(args, change=CHANGES["anything"], loss=loss, solver=solver)
        found[solver] = quick_report(captures, updates, MU, damping=DAMPING).layers
    for label, layer in found["dual"].items():
        other = found["primal"][label]
        for name in ("rank", "effective_rank", "effective_dimension", "reachable_residual"):
            got = getattr(layer, name)
            assert got.shape == ((3,) if label == "stack" else (1,))
            np.testing.assert_allclose(got, getattr(other, name), rtol=1e-6, err_msg=label)
    for i, condition in enumerate(found["primal"]["stack"].condition):
        xx = np.asarray(inputs[:, i]).T @ np.asarray(inputs[:, i])
        want = np.linalg.cond(xx + DAMPING * np.eye(4))
        np.testing.assert_allclose(condition, want, rtol=1e-6)
    table = found["dual"]["table"]  # counts 0, 3, 0, 1, 0
    np.testing.assert_allclose(table.condition, [(3 + DAMPING) / DAMPING])
    np.testing.assert_allclose(table.restricted_condition, [3])
    assert table.rank.tolist() == [2]
    meant = -MU * 2 * np.asarray(params["table"])[np.asarray(read)]
    moved = np.asarray(updates["table"])[np.asarray(read)]
    means = {i: meant[np.asarray(read) == i].mean(0) for i in (1, 3)}
    reached = np.stack([means[int(i)] for i in read])
    want = np.linalg.norm(moved - reached) / np.linalg.norm(reached)
    np.testing.assert_allclose(table.reachable_residual, [want], rtol=1e-9)


def test_what_is_not_known():
    """Of diagonal blocks, and of a gradient that is not XᵀZ̄ alone."""
    args = problem(20, 6, 2)
    captures, updates, _ = step(args, solver="primal", max_dim=4, block_size=3)
    (layer,) = quick_report(captures, updates, MU).layers.values()
    assert layer.rank.tolist() == [3, 3]
    assert np.isnan(layer.residual).all() and np.isnan(layer.reachable_residual).all()

    def decayed(params, x, y):
        return squared_error(params, x, y) + jnp.sum(params["w"] ** 2)

    for solver in ("dual", "primal"):
        captures, updates, _ = step(args, loss=decayed, solver=solver)
        (layer,) = quick_report(captures, updates, MU).layers.values()
        assert np.isnan(layer.reachable_residual).all() == (solver == "primal")


def test_nothing_in_nothing_out():
    """An all-zero batch: no direction, nothing meant that can be reached, nothing moved."""
    params, x, y = problem(4, 3, 2)
    for solver in ("dual", "primal"):
        captures, updates, _ = step((params, 0 * x, y), solver=solver)
        (layer,) = quick_report(captures, updates, MU, damping=DAMPING).layers.values()
        assert (layer.rank, layer.effective_rank, layer.effective_dimension) == (0, 0, 0)
        assert layer.condition == 1 and layer.reachable_residual == 0
        if solver == "dual":
            assert layer.residual == 1


def two_layers(params, x, y):
    z = jax.nn.relu(x @ params["a"]) @ params["b"] + params["c"]
    return jnp.mean((z - y) ** 2)


def network():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2)), "c": np.zeros(2)}
    return jax.tree.map(jnp.asarray, (params, rng.normal(size=(9, 3)), rng.normal(size=(9, 2))))


def test_counts_and_table_under_jit():
    params, x, y = network()
    tx = optax.chain(
        cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0), optax.sgd(MU)
    )

    @jax.jit
    def run(params, state, x, y):
        _, grads, captures = cqjax.value_and_grad(two_layers)(params, x, y)
        updates, state = tx.update(grads, state, params, captures=captures)
        given = {"damping": DAMPING, "relative_damping": 0.0}
        return report(captures, updates, MU, **given, opt_state=state), state

    _, state = run(params, tx.init(params), x, y.at[0, 0].set(jnp.nan))
    found, _ = run(params, state, x, y)
    assert {label: int(layer.fallbacks) for label, layer in found.layers.items()} == {
        "a": 1,
        "b": 1,
    }
    assert [layer.clipped for layer in found.layers.values()] == [None, None]
    header, rule, *lines = str(found).splitlines()
    assert header.split()[:4] == ["weight", "solver", "n", "d"] and set(rule) == {"-", " "}
    assert [line.split()[:4] for line in lines] == [
        ["a", "primal", "9", "3"],
        ["b", "primal", "9", "4"],
    ]
    assert [line.split()[-5:-3] for line in lines] == [["1", "0"]] * 2
    assert lines[0].split()[4] == f"{float(found.layers['a'].condition[0]):.3g}"
    assert jax.tree.map(lambda a: a, found).layers["a"].block == found.layers["a"].block


def test_counts_of_a_partition():
    params, x, y = network()
    labels = {"a": "plain", "b": "solved", "c": "solved"}
    tx = optax.partition({"plain": optax.sgd(MU), "solved": cqjax.csgd(MU)}, labels)
    _, grads, captures = cqjax.value_and_grad(two_layers)(params, x, y.at[0, 0].set(jnp.inf))
    updates, state = tx.update(grads, tx.init(params), params, captures=captures)
    found = quick_report(captures, updates, MU, opt_state=state)
    assert (found.layers["a"].fallbacks, found.layers["b"].fallbacks) == (0, 1)


def test_bad_input():
    args = problem(4, 3, 2, bias=True)
    captures, updates, state = step(args)
    for given in ({"learning_rate": MU}, {"opt_state": state}):
        with pytest.raises(ValueError, match="without updates.*expected updates=, as they are"):
            report(captures, **given)
    with pytest.raises(ValueError, match="opt_state counts no failed solves; expected.*cqjax.sc"):
        report(captures, updates, opt_state=optax.sgd(0.1).init(args[0]))
    other = cqjax.csgd(MU).init({"w": args[0]["w"]})
    with pytest.raises(ValueError, match=r"report: the state has counts of shape \(1,\); expected"):
        report(captures, updates, opt_state=other)
    with pytest.raises(TypeError, match="report: captures is a dict; expected the last result"):
        report({}, updates)
    with pytest.raises(ValueError, match="report: the captures have a parameter w, which is not"):
        report(captures, {"kernel": updates["w"]}, MU)


def test_shortened_updates_are_counted():
    params, x, y = network()
    tx = cqjax.csgd(1e3)
    _, grads, captures = cqjax.value_and_grad(two_layers)(params, x, y)
    updates, state = tx.update(grads, tx.init(params), params, captures=captures)
    found = report(captures, updates, opt_state=state)
    assert [int(layer.clipped) for layer in found.layers.values()] == [1, 1]
    assert [line.split()[-3] for line in str(found).splitlines()[2:]] == ["1", "1"]
