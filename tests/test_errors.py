"""Bad input: each error's type, and that it says what was got, expected, and to be done."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax


def loss_fn(params, x):
    return jnp.mean((x @ params["w"]) ** 2)


@pytest.fixture
def args():
    return {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))


def captured(args, loss=loss_fn, **kwargs):
    _, grads, captures = cqjax.value_and_grad(loss, **kwargs)(*args)
    return grads, captures


TRANSFORMATIONS = {
    "scale_by_consequentialism": cqjax.scale_by_consequentialism(),
    "scale_by_nlms": cqjax.scale_by_nlms(),
    "scale_by_learning_rates": cqjax.scale_by_learning_rates(0.1, 0.1),
    "clip_by_output_change": cqjax.clip_by_output_change(),
}


@pytest.fixture(params=TRANSFORMATIONS)
def method(request):
    return request.param, TRANSFORMATIONS[request.param]


def test_no_captures(args, method):
    name, tx = method
    grads, _ = captured(args)
    with pytest.raises(ValueError, match=f"{name}: no captures.*captures=captures"):
        tx.update(grads, tx.init(args[0]), args[0])


def test_captures_of_another_kind(args, method):
    name, tx = method
    grads, _ = captured(args)
    with pytest.raises(TypeError, match=f"{name}: captures is a dict; expected"):
        tx.update(grads, tx.init(args[0]), args[0], captures={})


def test_captures_of_other_parameters(args, method):
    name, tx = method
    _, captures = captured(args, solver="dual")
    grads = {"kernel": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=f"{name}: the captures have a parameter w, .*kernel"):
        tx.update(grads, tx.init(grads), grads, captures=captures)


def test_captures_of_other_shapes(args, method):
    name, tx = method
    _, captures = captured(args, solver="dual")
    grads = {"w": jnp.ones((5, 2))}
    with pytest.raises(ValueError, match=rf"{name}: w has shape \(5, 2\).*\(3, 2\) in the capt"):
        tx.update(grads, tx.init(grads), grads, captures=captures)


def test_captures_of_a_vmapped_call(args, method):
    name, tx = method
    fn = cqjax.value_and_grad(loss_fn, solver="dual")
    _, grads, captures = jax.vmap(fn, in_axes=(None, 0))(args[0], jnp.ones((6, 4, 3)))
    with pytest.raises(ValueError, match=rf"{name}: w has shape \(6, 3, 2\).*jax.vmap"):
        tx.update(grads, tx.init(args[0]), args[0], captures=captures)


def test_a_batch_size_that_cannot_be_inferred(method):
    name, tx = method
    args = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), jnp.ones(7)
    grads, captures = captured(args, lambda p, x, _: jnp.sqrt(loss_fn(p, x)), solver="dual")
    with pytest.raises(ValueError, match=f"{name}: the batch size could not.*batch_size="):
        tx.update(grads, tx.init(args[0]), args[0], captures=captures)


def test_half_a_joined_weight_masked(method):
    name, tx = method
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}

    def loss(params, x):
        return jnp.mean((x @ jnp.concatenate([params["a"], params["b"]], 1)) ** 2)

    grads, captures = captured((params, jnp.ones((4, 3))), loss, solver="dual")
    masked = optax.masked(tx, {"a": True, "b": False})
    with pytest.raises(ValueError, match=f"{name}: of the parameters a, b.*b are masked"):
        masked.update(grads, masked.init(params), params, captures=captures)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["damping", "relative_damping"])
def test_bad_damping(argument, damping):
    with pytest.raises(ValueError, match=rf"^{argument}=.*expected a finite number, zero or more"):
        cqjax.scale_by_consequentialism(**{argument: damping})
    for alias in (cqjax.csgd, cqjax.cmomentum, cqjax.cnesterov, cqjax.crmsprop, cqjax.cadam):
        with pytest.raises(ValueError, match=argument):
            alias(0.1, **{argument: damping})


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["max_change", "learning_rate"])
def test_bad_bounds(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}=.*expected a finite number, zero or more"):
        cqjax.clip_by_output_change(**{argument: value})


def test_bad_eps():
    with pytest.raises(ValueError, match="eps=-1.0"):
        cqjax.nlms(0.1, eps=-1.0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"solver": "fast"}, "solver='fast': expected one of 'auto', 'primal', 'dual'"),
        ({"loss_reduction": "max"}, "loss_reduction='max': expected one of 'mean', 'sum'"),
        ({"on_uncovered": "no"}, "on_uncovered='no': expected one of 'fallback', 'warn', 'error'"),
        ({"batch_size": 0}, "batch_size=0: expected a positive number"),
        ({"batch_size": np.int64(0)}, "batch_size=0: expected a positive number"),
        ({"batch_size": -2.0}, "batch_size=-2.0: expected a positive number"),
        ({"batch_size": np.ones(4)}, r"batch_size has shape \(4,\): expected a scalar"),
        ({"batch_size": 4, "loss_reduction": "sum"}, "leaves no use for batch_size="),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        cqjax.value_and_grad(loss_fn, **option)


def test_two_parameters_with_one_path():
    params = {"a/b": jnp.ones((3, 2)), "a": {"b": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match="two parameters have the path 'a/b': rename"):
        cqjax.plan(lambda p, x: jnp.mean(x @ p["a/b"] @ p["a"]["b"].T))(params, jnp.ones((4, 3)))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_parameters_that_are_not_real(dtype):
    """As `jax.value_and_grad` does, at trace time and by name."""
    params = {"layer": {"w": jnp.ones((3, 2), dtype)}}

    def loss(params, x):
        return jnp.mean(jnp.abs(x @ params["layer"]["w"]) ** 2.0)

    with pytest.raises(TypeError, match=f"layer/w has dtype {jnp.dtype(dtype)}.*floating"):
        cqjax.value_and_grad(loss)(params, jnp.ones((4, 3)))


def test_a_loss_that_is_no_scalar(args):
    with pytest.raises(TypeError, match=r"shape \(4, 2\).*expected a real scalar"):
        cqjax.value_and_grad(lambda p, x: x @ p["w"])(*args)


def test_auxiliary_results_must_be_announced(args):
    with pytest.raises(TypeError, match="has_aux=True"):
        cqjax.value_and_grad(lambda p, x: (loss_fn(p, x), x))(*args)
    with pytest.raises(TypeError, match="has_aux=True.*pair"):
        cqjax.value_and_grad(loss_fn, has_aux=True)(*args)


def test_a_pair_may_be_a_list(args):
    (loss, aux), _, _ = cqjax.value_and_grad(lambda p, x: [loss_fn(p, x), x], True)(*args)
    assert loss == loss_fn(*args) and aux.shape == (4, 3)


def test_plan_checks_the_loss_too(args):
    with pytest.raises(TypeError, match=r"shape \(4, 2\).*expected a real scalar"):
        cqjax.plan(lambda p, x: x @ p["w"])(*args)
    with pytest.raises(TypeError, match="the loss is a dict; expected a scalar"):
        cqjax.plan(lambda p, x: {"accuracy": 1.0, "loss": loss_fn(p, x)})(*args)


def test_shapes_are_for_plans(args):
    with pytest.raises(TypeError, match="ShapeDtypeStruct: use cqjax.plan"):
        cqjax.value_and_grad(loss_fn)(args[0], jax.ShapeDtypeStruct((4, 3), jnp.float32))


@pytest.mark.parametrize("selector", [3, [3], [("w",)]])
def test_selectors_of_another_kind(args, selector):
    with pytest.raises(TypeError, match="selects no parameters: expected a pattern"):
        cqjax.plan(loss_fn, skip=selector)(*args)


def test_numpy_is_as_good_as_jax(args):
    params, x = jax.tree.map(np.asarray, args)
    loss, grads, _ = cqjax.value_and_grad(loss_fn)(params, x)
    want = jax.value_and_grad(loss_fn)(*args)
    np.testing.assert_allclose(loss, want[0])
    np.testing.assert_allclose(grads["w"], want[1]["w"])


def test_within_shard_map(args):
    """Without types that say what varies, its statistics would be one device's: refused."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def gradient(params, x):
        return cqjax.value_and_grad(loss_fn)(params, x)[1]

    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    with pytest.raises(ValueError, match="over the axis data.*shard_map.*check_vma"):
        jax.jit(mapped)(*args)


def test_within_pmap(args):
    """The message says what to write in its place."""

    def gradient(params, x):
        return jax.lax.pmean(cqjax.value_and_grad(loss_fn)(params, x)[1], "data")

    params, x = (jax.tree.map(lambda a: jnp.stack([a, a]), arg) for arg in args)
    mapped = jax.pmap(gradient, axis_name="data", devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="within jax.pmap.*NamedSharding.*jax.jit"):
        mapped(params, x)


def test_gradients_averaged_by_hand_over_vmap(args):
    """They are not those of the captured rows, which each member has for itself."""
    tx = cqjax.csgd(0.1)

    def step(params, x):
        _, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
        return tx.update(jax.lax.pmean(grads, "data"), tx.init(params), params, captures=captures)

    params, x = args
    with pytest.raises(ValueError, match="same for all.*Average the losses"):
        jax.vmap(step, (None, 0), axis_name="data")(params, jnp.stack([x, 2 * x]))
