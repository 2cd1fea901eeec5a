"""Weights that a loss uses both ways, with everything else that a training program does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from both_sides import MODELS, tied_autoencoder, tied_embedding
from flax import nnx

import cqjax

X = np.random.default_rng(1).normal(size=(12, 2)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 11, (3, 8))


def arrays(model):
    return jax.tree.map(jnp.asarray, model.params), *map(jnp.asarray, model.args)


def updated(model, tx, params=None, **options):
    """(updates, state, gradients, captures) of a model's first step."""
    start, *args = arrays(model)
    params = start if params is None else params
    _, grads, captures = cqjax.value_and_grad(model.loss, **options)(params, *args)
    return *tx.update(grads, tx.init(params), params, captures=captures), grads, captures


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.fixture
def small():
    return {name: make(np.random.default_rng(0)) for name, make in MODELS.items()}


@pytest.mark.parametrize("name", ["pinn", "tied_embedding"])
def test_vmap_over_seeds_and_scan_over_steps(float64, small, name):
    model = small[name]
    params, *args = arrays(model)
    tx = cqjax.cadam(0.02)

    def step(carry, _):
        params, state = carry
        loss, grads, captures = cqjax.value_and_grad(model.loss)(params, *args)
        updates, state = tx.update(grads, state, params, captures=captures)
        return (optax.apply_updates(params, updates), state), loss

    def trained(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=3)

    seeds = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
    (together, _), losses = jax.jit(jax.vmap(trained))(seeds)
    for i in range(2):
        carry = jax.tree.map(lambda p, i=i: p[i], seeds)
        carry = carry, tx.init(carry)
        for at in range(3):
            carry, loss = jax.jit(step)(carry, None)
            np.testing.assert_allclose(losses[i, at], loss, rtol=1e-9)
        close(jax.tree.map(lambda p, i=i: p[i], together), carry[0], 1e-9)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width, name in ((5, "1"), (4, "2")):
            x = jnp.tanh(nn.Dense(width, name=name)(x))
        return nn.Dense(1, name="3")(x)[..., 0]


class Modules(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(2, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
        self.c = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.c(jnp.tanh(self.b(jnp.tanh(self.a(x)))))[..., 0]


def penalty(network, x):
    """The loss of `gradient_penalty`, of a network of one point."""
    values, slopes = jax.vmap(jax.value_and_grad(network))(x)
    return jnp.mean(values + 3 * (jnp.sqrt(jnp.sum(slopes**2, -1)) - 1) ** 2)


def test_linen_and_nnx_are_plain_functions(small):
    plain = small["gradient_penalty"]
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), plain.params)
    tx = cqjax.scale_by_consequentialism()
    _, grads, captures = cqjax.value_and_grad(plain.loss)(params, X)
    expected, _ = tx.update(grads, tx.init(params), params, captures=captures)

    def named(weight, bias):
        return {"kernel": weight, "bias": bias}

    linen = {str(i): named(params[f"w{i}"], params[f"b{i}"]) for i in (1, 2, 3)}
    evaluate = cqjax.value_and_grad(
        lambda p, x: penalty(lambda x: Linen().apply({"params": p}, x), x), on_uncovered="error"
    )
    _, grads, captures = evaluate(linen, X)
    got, _ = tx.update(grads, tx.init(linen), linen, captures=captures)
    close(got, {str(i): named(expected[f"w{i}"], expected[f"b{i}"]) for i in (1, 2, 3)})

    model = Modules()
    for i, layer in enumerate((model.a, model.b, model.c), 1):
        layer.kernel[...], layer.bias[...] = params[f"w{i}"], params[f"b{i}"]
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(1.0)), wrt=nnx.Param)
    _, grads, captures = cqjax.nnx.value_and_grad(penalty, on_uncovered="error")(model, X)
    optimizer.update(model, grads, captures=captures)
    for i, layer in enumerate((model.a, model.b, model.c), 1):
        close(params[f"w{i}"] - layer.kernel[...], expected[f"w{i}"])
        close(params[f"b{i}"] - layer.bias[...], expected[f"b{i}"])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(2)(x)), None


class Deep(nn.Module):
    """Layers scanned over, whose weights the gradient scans over from last to first."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Layer, length=3, **axes)(name="layers")(x, None)
        return nn.Dense(1, name="last")(x)[..., 0]


def test_layers_scanned_over_equal_layers_in_a_row(float64):
    x = jnp.asarray(X, jnp.float64)
    model = Deep()
    scanned = jax.tree.map(
        lambda p: p.astype(jnp.float64), model.init(jax.random.key(0), x)["params"]
    )
    unrolled = [jax.tree.map(lambda p, i=i: p[i], scanned["layers"]["Dense_0"]) for i in range(3)]

    def in_a_row(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return (x @ params["last"]["kernel"] + params["last"]["bias"])[..., 0]

    tx = cqjax.scale_by_consequentialism()

    def updates(network, params):
        evaluate = cqjax.value_and_grad(
            lambda p, x: penalty(lambda x: network(p, x), x), on_uncovered="error"
        )
        _, grads, captures = evaluate(params, x)
        return tx.update(grads, tx.init(params), params, captures=captures)[0]

    got = updates(lambda p, x: model.apply({"params": p}, x), scanned)
    want = updates(in_a_row, {"layers": unrolled, "last": scanned["last"]})
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *want["layers"])
    close(got["layers"]["Dense_0"], stacked, 1e-9)
    close(got["last"], want["last"], 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_finite_makes_no_update_and_is_counted(small, name):
    model = small[name]
    params, *args = arrays(model)
    key = next(key for key, value in params.items() if value.ndim == 2)
    broken = params | {key: params[key].at[0, 0].set(jnp.nan)}
    new, state, *_ = updated(model, cqjax.scale_by_consequentialism(), broken)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert state.fallbacks.sum() > 0


def test_a_clipped_gradient_makes_a_clipped_update(float64, small):
    solve = cqjax.scale_by_consequentialism()
    for model in small.values():
        plain, _, grads, _ = updated(model, solve)
        clipped, *_ = updated(model, optax.chain(optax.clip_by_global_norm(1e-2), solve))
        factor = min(1, 1e-2 / float(optax.tree.norm(grads)))
        close(clipped, jax.tree.map(lambda u, f=factor: f * u, plain), 1e-9)


@pytest.mark.parametrize("bias", ["b", "c"])
def test_a_masked_bias_is_as_if_it_were_no_parameter(float64, bias):
    model = tied_autoencoder(np.random.default_rng(0))
    params, x = arrays(model)
    solve = cqjax.scale_by_consequentialism()
    mask = {name: name != bias for name in params}
    masked, *_ = updated(model, optax.masked(solve, mask))
    others = {name: value for name, value in params.items() if name != bias}
    _, grads, captures = cqjax.value_and_grad(
        lambda p, x: model.loss({**p, bias: params[bias]}, x)
    )(others, x)
    expected, _ = solve.update(grads, solve.init(others), others, captures=captures)
    close({name: masked[name] for name in others}, expected, 1e-9)


@pytest.mark.parametrize("make", [tied_autoencoder, tied_embedding])
def test_microbatches_add_up(float64, make):
    model = make(np.random.default_rng(0))
    params, *args = arrays(model)
    solve = cqjax.scale_by_consequentialism()
    half = len(args[0]) // 2
    args = [a[: 2 * half] for a in args]
    whole = model._replace(args=args)
    tx = cqjax.multi_steps(solve, 2, plan=cqjax.plan(model.loss)(params, *args))
    state = tx.init(params)
    for start in (0, half):
        part = [a[start : start + half] for a in args]
        _, grads, captures = cqjax.value_and_grad(model.loss, solver="primal")(params, *part)
        new, state = tx.update(grads, state, params, captures=captures)
    expected, *_ = updated(whole, solve, solver="primal")
    close(new, expected, 1e-9)


def test_what_is_kept_between_steps_leaves_them_out(float64, small):
    """They are solved for with each batch's own rows, as without these options."""
    model = small["tied_autoencoder"]
    params, x = arrays(model)
    plan = cqjax.plan(model.loss)(params, x)
    options = {"update_every": 3, "ema_decay": 0.9}
    kept = cqjax.scale_by_consequentialism(plan=plan, **options)
    plain = cqjax.scale_by_consequentialism()
    state, start = kept.init(params), plain.init(params)
    for scale in (1, 2, 3):
        _, grads, captures = cqjax.value_and_grad(model.loss)(params, scale * x)
        got, state = kept.update(grads, state, params, captures=captures)
        want, _ = plain.update(grads, start, params, captures=captures)
        close(got, want, 1e-9)
    assert not state.moments and not state.inverses


@pytest.mark.parametrize("binding", ["x", "d"])
def test_a_bound_on_the_outputs_holds_on_both_sides(float64, binding):
    """The change of the weight moves the outputs of one side alone: XΔW = 0, or DΔWᵀ = 0."""
    rng = np.random.default_rng(0)
    w, x, d = rng.normal(size=(4, 3)), rng.normal(size=(9, 4)), rng.normal(size=(7, 3))
    change = np.zeros_like(w)
    if binding == "x":
        d[:, 0], change[:, 0] = 0, 50 * rng.normal(size=4)
        ratio = np.linalg.norm(x @ w) / np.linalg.norm(x @ change)
    else:
        x[:, 0], change[0] = 0, 50 * rng.normal(size=3)
        ratio = np.linalg.norm(d @ w.T) / np.linalg.norm(d @ change.T)

    def loss(w, x, d):
        return jnp.mean(jnp.tanh(x @ w)) + jnp.mean(jnp.tanh(d @ w.T))

    w, x, d, change = map(jnp.asarray, (10 * w, x, d, change))
    _, _, captures = cqjax.value_and_grad(loss, batch_size=9)(w, x, d)
    tx = cqjax.clip_by_output_change(0.02)
    new, state = tx.update(change, tx.init(w), w, captures=captures)
    assert 0.02 * 10 * ratio < 1 and state.clipped.sum() == 1
    np.testing.assert_allclose(new, 0.02 * 10 * ratio * change, rtol=1e-9)


def test_the_report_has_the_eigenvalues_of_both_sides(float64):
    model = tied_embedding(np.random.default_rng(0))
    params, tokens, targets = arrays(model)
    tx = cqjax.csgd(0.1, max_change=None)
    new, state, _, captures = updated(model, tx)
    report = cqjax.diagnostics.report(captures, new, 0.1, opt_state=state).layers["table"]
    h = np.asarray(jnp.tanh(params["table"][tokens] @ params["w"] + params["b"]))
    values = np.add.outer(np.bincount(tokens, minlength=11), np.linalg.eigvalsh(h.T @ h)).ravel()
    damping = 0.1 * values[values > 1e-9].mean()
    condition = (values.max() + damping) / (values.min() + damping)
    np.testing.assert_allclose(report.condition, [condition], rtol=1e-9)
    np.testing.assert_allclose(
        report.effective_dimension, [np.sum(values / (values + damping))], rtol=1e-9
    )
    assert report.rank[0] == np.sum(values > 1e-9) and np.isnan(report.residual)
    assert "15 + 15" in str(cqjax.diagnostics.report(captures))


def test_bfloat16(small):
    for name, model in small.items():
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), model.params)
        args = [jnp.asarray(a, jnp.bfloat16) if a.dtype == float else a for a in model.args]
        coarse, state, *_ = updated(model._replace(args=args), TX, params)
        wanted = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        args = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in args]
        exact, *_ = updated(model._replace(args=args), TX, wanted)
        assert {leaf.dtype for leaf in jax.tree.leaves(coarse)} == {jnp.dtype(jnp.bfloat16)}
        assert not state.fallbacks.any(), name
        close(jax.tree.map(lambda u: u.astype(jnp.float32), coarse), exact, 0.2)


TX = cqjax.scale_by_consequentialism(relative_damping=1.0)


def test_what_cannot_be_says_why(small):
    model = small["tied_embedding"]
    params, *args = arrays(model)
    plan = cqjax.plan(model.loss, max_dim=3)(params, *args)
    assert "4 rows, more than max_dim" in plan.uncovered()["table"][0]

    def wide(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["w"].T - x) ** 2)

    shapes = {"w": jax.ShapeDtypeStruct((1100, 8), jnp.float32)}, jnp.ones((4, 1100))
    (reason,) = cqjax.plan(wide)(*shapes).uncovered()["w"]
    assert "a matrix of 1100 rows, more than max_dim=1024" in reason
    assert not cqjax.plan(wide, max_dim=2048)(*shapes).uncovered()
    _, grads, captures = cqjax.value_and_grad(model.loss)(params, *args)
    tx = cqjax.for_each_layer(lambda layer: layer.second_moment() and None, "mine")
    with pytest.raises(ValueError, match="table is used both ways, as XW and as DWᵀ"):
        tx.update(grads, tx.init(params), captures=captures)


def test_nlms_keeps_their_gradient(small):
    model = small["tied_embedding"]
    new, _, grads, _ = updated(model, cqjax.scale_by_nlms(), capture=cqjax.Rows)
    np.testing.assert_array_equal(new["table"], grads["table"])
    assert not np.allclose(new["w"], grads["w"])


def test_rows_make_the_same_update(float64, small):
    for model in small.values():
        rows, *_ = updated(model, cqjax.scale_by_consequentialism(), capture=cqjax.Rows)
        moments, *_ = updated(model, cqjax.scale_by_consequentialism(), capture=cqjax.Gram)
        close(rows, moments, 1e-9)
