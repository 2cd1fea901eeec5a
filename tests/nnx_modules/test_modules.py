"""NNX modules in use: state in place, optimizers, `jax.jit`, other modules, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from zoo_nnx import IMAGES, MLP, ConvNet, X, Y

import cqjax


def loss_fn(model, x, y):
    return jnp.mean(jnp.sum((model(x) - y) ** 2, -1))


def arrays(module):
    """{path: array} of all state, keys of random streams as numbers."""

    def numbers(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    leaves = jax.tree.leaves_with_path(nnx.as_pure(nnx.state(module)))
    return {jax.tree_util.keystr(k, simple=True, separator="/"): numbers(v) for k, v in leaves}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for path, value in got.items():
        np.testing.assert_allclose(value, expected[path], 1e-5, 1e-6, err_msg=path)


class Stateful(nnx.Module):
    """Batch statistics, dropout, a count, and an attribute that only the call makes."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        hidden = self.dropout(nnx.relu(self.norm(self.first(x))))
        self.hidden = nnx.Intermediate(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("jit", [nnx.jit, lambda f: f], ids=["jit", "eager"])
def test_state_changes_once_and_in_place(jit):
    ours, theirs = Stateful(nnx.Rngs(0)), Stateful(nnx.Rngs(0))
    kernel, statistic = ours.first.kernel, ours.norm.mean
    for _ in range(2):
        differentiate = cqjax.nnx.value_and_grad(loss_fn, solver="dual")
        loss, grads, captures = jit(differentiate)(ours, X, Y)
        expected = jit(nnx.value_and_grad(loss_fn))(theirs, X, Y)
        np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
        assert_same(arrays(grads), arrays(expected[1]))
    assert ours.calls[...] == 2 and ours.dropout.rngs.count[...] == 2
    assert_same(arrays(ours), arrays(theirs))
    assert ours.first.kernel is kernel and ours.norm.mean is statistic
    assert type(ours.norm) is nnx.BatchNorm
    assert not isinstance(ours.hidden[...], jax.core.Tracer)
    (capture,) = captures["first/kernel"]
    rows = capture.rows()
    np.testing.assert_allclose(rows.x[0], X, rtol=1e-6)
    np.testing.assert_allclose(
        rows.x[0].T @ rows.dz[0], grads["first"]["kernel"][...], rtol=1e-4, atol=1e-6
    )


def test_auxiliary_results_and_keyword_arguments():
    def with_aux(model, x, *, y):
        z = model(x)
        return jnp.mean((z - y) ** 2), {"z": z}

    model = MLP(nnx.Rngs(0))
    evaluate = cqjax.nnx.value_and_grad(with_aux, has_aux=True)
    (loss, aux), grads, captures = evaluate(model, X, y=Y)
    np.testing.assert_allclose(aux["z"], model(X), rtol=1e-5)
    assert captures.batch_size == 2 * len(X) and set(captures) > {"first/kernel"}
    assert cqjax.nnx.plan(with_aux)(model, X, y=Y).batch_size == 2 * len(X)
    with pytest.raises(TypeError, match=r"expected a scalar, or a pair \(loss, aux\)"):
        cqjax.nnx.value_and_grad(with_aux)(model, X, y=Y)
    with pytest.raises(TypeError, match=r"has_aux=True: expected the loss to return a pair"):
        cqjax.nnx.value_and_grad(loss_fn, has_aux=True)(model, X, Y)


def test_under_jax_jit_with_split_and_merge():
    tx = cqjax.csgd(0.1)
    model = ConvNet(nnx.Rngs(0))
    graph, state = nnx.split(model)
    optimizer = nnx.split(nnx.Optimizer(model, tx, wrt=nnx.Param))

    @jax.jit
    def step(state, optimizer_state, x, y):
        model, optimizer_ = nnx.merge(graph, state), nnx.merge(optimizer[0], optimizer_state)
        loss, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model, x, y)
        optimizer_.update(model, grads, captures=captures)
        return loss, nnx.state(model), nnx.state(optimizer_)

    @nnx.jit
    def reference(model, optimizer, x, y):
        loss, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model, x, y)
        optimizer.update(model, grads, captures=captures)
        return loss

    optimizer_state, in_place = optimizer[1], nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        loss, state, optimizer_state = step(state, optimizer_state, IMAGES, Y)
        np.testing.assert_allclose(loss, reference(model, in_place, IMAGES, Y), rtol=1e-4)
    nnx.update(merged := ConvNet(nnx.Rngs(1)), state)
    assert_same(arrays(merged), arrays(model))
    assert in_place.step[...] == 3


def test_a_linear_layer_in_one_step_with_weights_that_keep_statistics():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    plan = cqjax.nnx.plan(loss_fn, loss_reduction="sum", solver="primal")(model, X, Y)
    tx = optax.chain(
        cqjax.scale_by_consequentialism(
            damping=1e-6, plan=plan, ema_decay=0.0, update_every=1, relative_damping=0.0
        ),
        optax.scale(-1.0),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def half_sum(model, x, y):
        return 0.5 * jnp.sum((model(x) - y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        differentiate = cqjax.nnx.value_and_grad(half_sum, loss_reduction="sum", solver="primal")
        loss, grads, captures = differentiate(model, X, Y)
        optimizer.update(model, grads, captures=captures)

    step(model, optimizer)
    design = np.c_[np.asarray(X, np.float64), np.ones(len(X))]
    solution = np.linalg.lstsq(design, np.asarray(Y, np.float64), rcond=None)[0]
    np.testing.assert_allclose(model.kernel[...], solution[:-1], atol=1e-3)
    np.testing.assert_allclose(model.bias[...], solution[-1], atol=1e-3)


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs)
        self.base.lora.lora_b[...] = rngs.normal((2, 6))

    def __call__(self, x):
        return self.base(x).reshape(-1, 2, 3).sum(-1)


def test_lora_parameters_alone():
    model = Adapted(nnx.Rngs(0))
    before = arrays(model)
    differentiate = cqjax.nnx.value_and_grad(loss_fn, wrt=nnx.LoRAParam, solver="dual")
    _, grads, captures = differentiate(model, X, Y)
    assert set(captures) == {"base/lora/lora_a", "base/lora/lora_b"}
    expected = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, X, Y)
    assert_same(arrays(grads), arrays(expected))
    (capture,) = captures["base/lora/lora_b"]
    np.testing.assert_allclose(capture.rows().x[0], X @ before["base/lora/lora_a"], rtol=1e-5)
    optimizer = nnx.Optimizer(model, cqjax.csgd(0.1), wrt=nnx.LoRAParam)
    optimizer.update(model, grads, captures=captures)
    changed = {path for path, value in arrays(model).items() if (value != before[path]).any()}
    assert changed == {"base/lora/lora_a", "base/lora/lora_b"}


def test_other_modules_are_updated_and_not_differentiated():
    class Teacher(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.calls = nnx.Linear(4, 2, rngs=rngs), nnx.Variable(jnp.array(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.linear(x)

    def distil(model, batch, rngs):
        noise = rngs.normal(batch["x"].shape)
        return jnp.mean((model(batch["x"]) - batch["teacher"](batch["x"] + noise)) ** 2)

    model, teacher, rngs = MLP(nnx.Rngs(0)), Teacher(nnx.Rngs(1)), nnx.Rngs(2)
    batch = {"x": X, "teacher": teacher}
    expected, gradient = nnx.value_and_grad(distil)(model, batch, nnx.Rngs(2))
    loss, grads, captures = cqjax.nnx.value_and_grad(distil)(model, batch, rngs=rngs)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_same(arrays(grads), arrays(gradient))
    assert teacher.calls[...] == 2 and rngs.default.count[...] == 1
    assert captures.batch_size == 2 * len(X)  # two outputs


def test_two_modules_that_share_one():
    first = MLP(nnx.Rngs(0))
    both = {"one": first, "two": nnx.Linear(2, 2, rngs=nnx.Rngs(1))}

    def loss(modules, x, y):
        return loss_fn(lambda x: modules["two"](modules["one"](x)), x, y)

    _, grads, captures = cqjax.nnx.value_and_grad(loss)(both, X, Y)
    assert_same(arrays(grads), arrays(nnx.grad(loss)(both, X, Y)))
    assert "one/first/kernel" in captures and "two/bias" in captures


def test_replicas_by_vmap():
    models = nnx.split_rngs(splits=3)(nnx.vmap(MLP, in_axes=0, out_axes=0))(nnx.Rngs(0))

    @nnx.jit
    @nnx.vmap(in_axes=(0, None, None), out_axes=0)
    def update(model, x, y):
        _, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model, x, y)
        tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
        return tx.update(nnx.as_pure(grads), tx.init(grads), captures=captures)[0]

    together = arrays_of(update(models, X, Y))
    graph, state = nnx.split(models)
    for i in range(3):
        one = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
        _, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(one, X, Y)
        tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=0.0)
        alone, _ = tx.update(nnx.as_pure(grads), tx.init(grads), captures=captures)
        for path, value in arrays_of(alone).items():
            np.testing.assert_allclose(together[path][i], value, 1e-3, 1e-4, err_msg=path)


def arrays_of(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def test_plans_change_nothing_and_take_abstract_models():
    model = Stateful(nnx.Rngs(0))
    before = arrays(model)
    plan = cqjax.nnx.plan(loss_fn)(model, X, Y)
    assert_same(arrays(model), before)
    assert not hasattr(model, "hidden")
    abstract = nnx.eval_shape(lambda: Stateful(nnx.Rngs(0)))
    shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, Y))
    assert str(cqjax.nnx.plan(loss_fn)(abstract, *shapes)) == str(plan)


def test_errors_name_paths():
    model = MLP(nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"a dict, has no variables that wrt=.*cqjax.value_and_grad"
    ):
        cqjax.nnx.value_and_grad(loss_fn)({"kernel": jnp.ones((4, 2))}, X, Y)
    with pytest.raises(ValueError, match="selects no parameter; the paths are first/bias"):
        cqjax.nnx.value_and_grad(loss_fn, only="first/kernels")(model, X, Y)
    with pytest.raises(ValueError, match="layers are Linear"):
        cqjax.nnx.value_and_grad(loss_fn, skip=nnx.Conv)(model, X, Y)
    with pytest.raises(ValueError, match="gain: enters `mul`"):
        scaled = MLP(nnx.Rngs(0))
        scaled.gain = nnx.Param(jnp.ones(()))

        def loss(model, x, y):
            return loss_fn(lambda x: model.gain * model(x), x, y)

        cqjax.nnx.value_and_grad(loss, on_uncovered="error")(scaled, X, Y)
    with pytest.raises(ValueError, match=r"solver='qr': expected one of"):
        cqjax.nnx.value_and_grad(loss_fn, solver="qr")


def test_a_loss_that_fails_leaves_the_model_alone():
    model = Stateful(nnx.Rngs(0))
    before = arrays(model)

    def failing(model, x, y):
        loss_fn(model, x, y)
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        cqjax.nnx.value_and_grad(failing)(model, X, Y)
    assert_same(arrays(model), before)
    assert type(model.norm) is nnx.BatchNorm
    cqjax.nnx.value_and_grad(loss_fn)(model, X, Y)
    assert model.calls[...] == 1


def test_modules_as_plain_trees():
    with nnx.set_graph_mode(False):
        model = MLP(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, cqjax.csgd(0.2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model, X, Y)
            optimizer.update(model, grads, captures=captures)
            return loss

        losses = [step(model, optimizer) for _ in range(4)]
    other = MLP(nnx.Rngs(0))
    tx = nnx.Optimizer(other, cqjax.csgd(0.2), wrt=nnx.Param)
    for loss in losses:
        expected, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(other, X, Y)
        tx.update(other, grads, captures=captures)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
