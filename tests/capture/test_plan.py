"""What a plan says, how parameters are selected, and the choice of the solver."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import cqjax


class Net(nn.Module):
    """Layers of several classes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x)).reshape(len(x), -1)
        x = nn.LayerNorm()(nn.Dense(6)(x))
        return nn.Dense(2, name="head")(x)


def loss_fn(params, x, y):
    return jnp.mean((Net().apply(params, x) - y) ** 2)


@pytest.fixture(scope="module")
def args():
    x, y = jnp.ones((8, 5, 5, 3)), jnp.ones((8, 2))
    return Net().init(jax.random.key(0), x), x, y


def status(plan):
    return {p.path.removeprefix("params/"): p.status for p in plan.parameters}


def test_nothing_is_run():
    """Shapes are enough, and a loss that calls back to Python is not executed."""
    calls = []

    def loss(params, x):
        jax.debug.callback(lambda: calls.append(None))
        return jnp.mean(x @ params)

    shapes = (jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32),) * 2
    plan = cqjax.plan(loss)(*shapes)
    assert plan.blocks[0].rows == 10**6 and plan.batch_size == 10**12
    assert not calls


def test_table(args):
    text = str(cqjax.plan(loss_fn)(*args))
    lines = {line.split()[0]: line for line in text.splitlines()}
    conv = lines["params/Conv_0/kernel"].split()
    assert conv[1:7] == ["Conv", "1", "1", "200", "27", "4"]
    assert conv[7] == "primal"
    # primal: XᵀX, 2 (d+1)³ + 2 (d+1)² o operations, to 6 n d o of the layer's own; of XᵀX's
    # 2 n d² by way of the patches, the autocorrelation needs a fraction
    solve, own = 2 * 28**3 + 2 * 28**2 * 4, 6 * 200 * 27 * 4
    added = float(conv[8].removesuffix("%")) / 100
    assert solve / own < added < (solve + 0.5 * 2 * 200 * 27**2) / own
    head = lines["params/head/kernel"].split()
    assert head[1:8] == ["Dense", "1", "1", "8", "6", "2", "primal"]
    assert "bias of params/head/kernel" in lines["params/head/bias"]
    assert "uncovered" in lines["params/LayerNorm_0/scale"]
    assert "LayerNorm" in lines["params/LayerNorm_0/scale"]
    assert text.splitlines()[-1] == "6 of 8 parameters covered; N = 16, mean over 8 × 2 terms"


def test_every_parameter_has_a_line_and_a_reason(args):
    plan = cqjax.plan(loss_fn)(*args)
    assert len(plan.parameters) == len(jax.tree.leaves(args[0]))
    assert plan.uncovered() == {
        "params/LayerNorm_0/bias": ("enters `add`, which is no matrix product",),
        "params/LayerNorm_0/scale": ("enters `mul`, which is no matrix product",),
    }


@pytest.mark.parametrize(
    ("selection", "covered"),
    [
        ({"only": "*/kernel"}, {"Conv_0/kernel", "Dense_0/kernel", "head/kernel"}),
        ({"only": nn.Conv}, {"Conv_0/kernel", "Conv_0/bias"}),
        ({"only": [nn.Conv, "*head/*"], "skip": "*/bias"}, {"Conv_0/kernel", "head/kernel"}),
        ({"skip": (nn.Dense,)}, {"Conv_0/kernel", "Conv_0/bias"}),
    ],
)
def test_selection(args, selection, covered):
    plan = cqjax.plan(loss_fn, **selection)(*args)
    assert {p for p, s in status(plan).items() if s == "covered"} == covered
    _, _, captures = cqjax.value_and_grad(loss_fn, **selection)(*args)
    assert {p.removeprefix("params/") for p in captures} == covered


def test_a_skipped_bias_is_not_solved_for(args):
    (block,) = cqjax.plan(loss_fn, only="*head/kernel")(*args).blocks
    assert block.bias is None and block.paths == ("params/head/kernel",)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"only": "params/heads/*"}, "only='params/heads/.*selects no parameter.*params/head/"),
        ({"skip": nn.LSTMCell}, "skip='LSTMCell' selects no parameter; the layers are .*Conv"),
    ],
)
def test_a_selector_that_selects_nothing(args, selection, message):
    with pytest.raises(ValueError, match=message):
        cqjax.plan(loss_fn, **selection)(*args)


def test_an_ambiguous_layer_class():
    """Two modules were called under one name: a class cannot select its parameters."""
    x = jnp.ones((2, 4, 4, 3))
    first, second = nn.Conv(3, (2, 2)), nn.Dense(3)
    params = {"a": first.init(jax.random.key(0), x), "b": second.init(jax.random.key(0), x)}

    def loss(params, x):
        return jnp.mean(second.apply(params["b"], first.apply(params["a"], x)))

    assert cqjax.plan(loss, only="a/*")(params, x).parameters[0].layer == "Conv or Dense"
    with pytest.raises(ValueError, match="may be Conv or Dense.*select it by its path"):
        cqjax.plan(loss, only=nn.Conv)(params, x)


def test_on_uncovered(args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cqjax.value_and_grad(loss_fn)(*args)
    with pytest.warns(UserWarning, match=r"2 parameters are not covered.*\n.*LayerNorm_0/bias"):
        cqjax.value_and_grad(loss_fn, on_uncovered="warn")(*args)
    with pytest.raises(ValueError, match=r"LayerNorm_0/scale: enters `mul`"):
        cqjax.value_and_grad(loss_fn, on_uncovered="error")(*args)
    cqjax.value_and_grad(loss_fn, on_uncovered="error", skip=nn.LayerNorm)(*args)


@pytest.mark.parametrize(("rows", "solver"), [(4, "dual"), (400, "primal")])
def test_the_cheaper_solver_is_chosen(rows, solver):
    plan = cqjax.plan(lambda w, x: jnp.mean(x @ w))(jnp.ones((32, 8)), jnp.ones((rows, 32)))
    (block,) = plan.blocks
    assert block.solver == solver
    assert block.flops(solver) == min(block.flops("dual"), block.flops("primal"))


def test_a_solver_can_be_demanded(args):
    for solver in ("dual", "primal"):
        blocks = cqjax.plan(loss_fn, solver=solver)(*args).blocks
        assert {block.solver for block in blocks} == {solver}
        _, _, captures = cqjax.value_and_grad(loss_fn, solver=solver)(*args)
        kind = {"dual": cqjax.Rows, "primal": cqjax.Inputs}[solver]
        assert all(isinstance(site, kind) for c in captures.blocks for site in c.sites)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((jnp.ones((4, 3)),), 4),
        (({"x": jnp.ones((4, 3)), "step": jnp.ones(())},), 4),
        ((np.ones((4, 3)), jax.random.key(0)), 4),
        ((jnp.ones((4, 3)), jnp.zeros(2, jnp.uint32)), 4),
        ((jnp.ones((4, 3)), jnp.ones(5)), None),
        ((), None),
    ],
)
def test_batch_size_of_a_loss_that_is_no_mean(arguments, size):
    def loss(w, *args):
        return jnp.sqrt(jnp.sum(jnp.ones((4, 3)) @ w))

    w = jnp.ones((3, 2))
    assert cqjax.plan(loss)(w, *arguments).batch_size == size
    assert cqjax.plan(loss, batch_size=9)(w, *arguments).batch_size == 9
    assert cqjax.plan(loss, loss_reduction="sum")(w, *arguments).batch_size == 1


def test_captures_is_a_mapping(args):
    _, _, captures = cqjax.value_and_grad(loss_fn)(*args)
    assert len(captures) == 6 and "params/head/bias" in captures
    (capture,) = captures["params/head/bias"]
    assert capture.block.name == "params/head/kernel"
    with pytest.raises(KeyError):
        captures["params/LayerNorm_0/scale"]


# Uses that are no site, or no bias.

x8, w84, b4 = jnp.ones((8, 8)), jnp.ones((8, 4)), jnp.ones(4)
NOT_COVERED = {
    "inside a custom derivative": (
        lambda p, x: jnp.mean(_custom(x, p["w"])),
        {"w": w84},
        {"w": "enters `custom_jvp_call`"},
    ),
    "product of parameters": (
        lambda p, x: jnp.mean(x @ (p["a"] @ p["b"])),
        {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 4))},
        {"a": "combined with another parameter", "b": "combined with another parameter"},
    ),
    "kernel as input of a convolution": (
        lambda p, x: jax.lax.conv(p["w"][None, None], x[None, None], (1, 1), "SAME").mean(),
        {"w": jnp.ones((8, 8))},
        {"w": "input of a convolution"},
    ),
    "a carry that changes": (
        lambda p, x: jax.lax.scan(lambda w, r: (0.9 * w, r @ w), p["w"], x)[1].mean(),
        {"w": w84},
        {"w": "changed from trip to trip"},
    ),
    "added row by row": (
        lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2),
        {"w": w84, "b": jnp.ones((8, 1))},
        {"b": "enters `add`"},
    ),
    "bias of two weights": (
        lambda p, x: jnp.mean((x @ p["w"] + p["b"]) * (x @ p["v"] + p["b"])),
        {"w": w84, "v": w84, "b": b4},
        {"b": "is the bias of several weights"},
    ),
    "two biases of one weight": (
        lambda p, x: jnp.mean((x @ p["w"] + p["b"]) * (2 * x @ p["w"] + p["c"])),
        {"w": w84, "b": b4, "c": b4},
        {"b": "one of several biases", "c": "one of several biases"},
    ),
    "bias added twice": (
        lambda p, x: jnp.mean((x @ p["w"] + p["b"] + p["b"]) ** 2),
        {"w": w84, "b": b4},
        {},
    ),
    "bias of a lookup": (
        lambda p, x: jnp.mean((p["w"][jnp.arange(8)] + p["b"]) ** 2),
        {"w": w84, "b": b4},
        {"b": "enters `add`"},
    ),
    "without entries": (
        lambda p, x: jnp.mean(x @ p["w"]) + jnp.sum(x[:, :0] @ p["z"]),
        {"w": w84, "z": jnp.ones((0, 4))},
        {"z": "without entries"},
    ),
    "one bias in two layouts": (
        lambda p, x: (
            jnp.mean(jnp.tensordot(x, p["w"], 1) + p["b"])
            + jnp.mean(jnp.tensordot(x, p["w"], 1).transpose(0, 2, 1) + p["b"])
        ),
        {"w": jnp.ones((8, 2, 2)), "b": jnp.ones((2, 2))},
        {"b": "one of several biases"},
    ),
    "only in the auxiliary output": (
        lambda p, x: jnp.mean(x @ p["w"]) + 0 * jax.lax.stop_gradient(p["b"]).sum(),
        {"w": w84, "b": b4},
        {"b": "is not reached by the loss"},
    ),
    "contracted in two shapes": (
        lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) @ p["w"].reshape(4, 8)),
        {"w": w84},
        {"w": "contract it in different ways"},
    ),
}


@jax.custom_jvp
def _custom(x, w):
    return x @ w


_custom.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


@pytest.mark.filterwarnings("ignore:no parameter is covered")
@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_says_why(name):
    loss, params, reasons = NOT_COVERED[name]
    uncovered = cqjax.plan(loss)(params, x8).uncovered()
    assert set(uncovered) == set(reasons)
    for path, reason in reasons.items():
        assert reason in "; ".join(uncovered[path])
    assert jax.tree.all(
        jax.tree.map(
            jnp.allclose, cqjax.value_and_grad(loss)(params, x8)[1], jax.grad(loss)(params, x8)
        )
    )


def test_a_bias_added_twice_is_used_elsewhere_too():
    loss, params, _ = NOT_COVERED["bias added twice"]
    (block,) = cqjax.plan(loss)(params, x8).blocks
    assert not block.exact


# The layers' classes.


def test_layers_of_the_zoo_do_not_depend_on_what_was_traced_before():
    for name in ("mlp", "setup_module", "scan_layers", "remat", "shared_module"):
        loss, params, args = zoo.by_name(name).make()
        first, second = (cqjax.plan(loss)(params, *args).parameters for _ in range(2))
        assert [p.layer for p in first] == [p.layer for p in second]
        assert all(p.layer == "Dense" for p in first)


def test_a_parameter_that_flax_does_not_own_has_no_layer():
    model, x = nn.Dense(3), jnp.ones((4, 5))
    params = {"dense": model.init(jax.random.key(0), x), "w": jnp.ones((3, 2))}

    def loss(params, x):
        return jnp.mean((model.apply(params["dense"], x) @ params["w"]) ** 2)

    layers = {p.path: p.layer for p in cqjax.plan(loss, skip=nn.Dense)(params, x).parameters}
    assert layers == {"dense/params/bias": "Dense", "dense/params/kernel": "Dense", "w": ""}


def test_a_class_cannot_select_layers_behind_a_cached_trace():
    """The interceptor sees a jitted function once: a second selection by class is refused."""
    model, x = nn.Dense(3), jnp.ones((4, 5))
    params, apply = model.init(jax.random.key(0), x), jax.jit(model.apply)

    def loss(params, x):
        return jnp.mean(apply(params, x) ** 2)

    cqjax.plan(loss)(params, x)
    with pytest.raises(ValueError, match="layer of params/kernel is unknown.*by their paths"):
        cqjax.plan(loss, skip=nn.Dense)(params, x)


def test_positions_that_come_as_an_argument_are_shared():
    def loss(params, x, positions):
        return jnp.mean((x @ params["w"] + params["t"][positions]) ** 2)

    params, x = {"w": jnp.ones((4, 3)), "t": jnp.ones((6, 3))}, jnp.ones((8, 5, 4))
    plan = cqjax.plan(loss)(params, x, jnp.arange(5))
    table, weight = plan.parameters
    assert table.notes == ("all examples share its rows",) and table.notes[0] in str(plan)
    assert weight.notes == () and {p.status for p in plan.parameters} == {"covered"}
    assert plan.batch_size == 8 * 5 * 3 and plan.examples == 8


def test_table_of_slices_and_lookups():
    def loss(params, ids, x):
        z = x @ params["w"][:, :2] + x @ params["w"][:, 2:4]
        return jnp.mean(z**2) + jnp.sum(jnp.sin(params["w"][:, 4:])) + jnp.mean(params["t"][ids])

    params = {"w": jnp.ones((4, 6)), "t": jnp.ones((9, 2))}
    text = str(cqjax.plan(loss)(params, jnp.arange(3), jnp.ones((3, 4))))
    table, weight = text.splitlines()[2:4]
    assert "diagonal" in table and table.split()[-1] == "-"
    assert "in slices; also enters `sin`" in weight


@pytest.mark.filterwarnings("ignore:no parameter is covered")
@pytest.mark.parametrize(
    ("loss", "params"),
    [
        (lambda p, x: jax.lax.scan(lambda c, r: (c + (r @ p["w"]).sum(), None), 0.0, x)[0]
         + jnp.sum(p["w"] ** 2), {"w": jnp.ones((4, 3))}),
        (lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), jnp.ones((2, 3)), p["w"])[0].sum(),
         {"w": jnp.ones((0, 3, 3))}),
        (lambda p, x: jnp.sum(jnp.ones(3) @ jnp.concatenate([p["z"], p["w"][:2], p["w"][2:]])),
         {"w": jnp.ones((3, 2)), "z": jnp.ones((0, 2))}),
    ],
)  # fmt: skip
def test_loops_and_arrays_without_entries(loss, params):
    x = jnp.ones((0, 5, 4))
    str(cqjax.plan(loss)(params, x))
    value, grads, captures = cqjax.value_and_grad(loss, batch_size=5)(params, x)
    assert value == loss(params, x)
    tx = cqjax.csgd(0.1)
    updates, _ = tx.update(grads, tx.init(params), params, captures=captures)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
