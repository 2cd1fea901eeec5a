"""`argnums` and parameters by name: gradients in JAX's structure, updates as of one tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cqjax

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype(np.float32)
FIRST = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "b": jnp.ones(2)}
SECOND = {"w": jnp.asarray(RNG.normal(size=(2, 2)), jnp.float32)}


def loss_fn(first, x, second):
    return jnp.mean((jnp.tanh(x @ first["w"] + first["b"]) @ second["w"]) ** 2)


def ridge(x, z, damping):
    """N (XᵀX + λI)⁻¹ XᵀZ̄ of 8 rows, in float64."""
    gram = x.T @ x
    return np.linalg.solve(gram + damping * np.eye(len(gram)), x.T @ (8 * z))


def expected():
    """The updates of the first layer (bias last) and of the second, for λ = 0.5."""
    x = np.concatenate([X.astype(np.float64), np.ones((8, 1))], 1)
    h = np.tanh(x @ np.concatenate([FIRST["w"], FIRST["b"][None]]).astype(np.float64))
    w = np.asarray(SECOND["w"], np.float64)
    dz = 2 * (h @ w) / 16
    return ridge(x, dz @ w.T * (1 - h**2), 0.5), ridge(h, dz, 0.5)


def updated(grads, captures):
    tx = cqjax.scale_by_consequentialism(damping=0.5, relative_damping=0.0)
    return tx.update(grads, tx.init(grads), captures=captures)[0]


@pytest.mark.parametrize("argnums", [0, 2, -1, (0, 2), (2, 0), (-1,), [0, -1], np.int64(2)])
def test_as_jax_has_it(argnums):
    differentiate = cqjax.value_and_grad(loss_fn, argnums=argnums, batch_size=8)
    value, grads, captures = jax.jit(differentiate)(FIRST, X, SECOND)
    own = argnums if isinstance(argnums, tuple | list) else int(argnums)
    want = jax.value_and_grad(loss_fn, own)(FIRST, X, SECOND)
    assert jax.tree.structure((value, grads)) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (value, grads), want)
    updates, (first, second) = updated(grads, captures), expected()
    several = isinstance(argnums, tuple | list)
    for number, update in zip(argnums, updates, strict=True) if several else [(argnums, updates)]:
        if number == 0:
            np.testing.assert_allclose(update["w"], first[:3], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(update["b"], first[3], rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(update["w"], second, rtol=1e-4, atol=1e-5)


def test_paths_begin_with_the_place_in_the_tuple():
    differentiate = cqjax.value_and_grad(loss_fn, argnums=(2, 0), skip="1/b")
    plan = differentiate.plan(FIRST, jax.ShapeDtypeStruct(X.shape, X.dtype), SECOND)
    got = [(p.path, p.status) for p in plan.parameters]
    assert got == [("0/w", "covered"), ("1/b", "skipped"), ("1/w", "covered")]


def test_parameters_by_name():
    calls = [((), {"first": FIRST, "x": X, "second": SECOND}), ((FIRST, X), {"second": SECOND})]
    for args, kwargs in calls:
        _, grads, captures = cqjax.value_and_grad(loss_fn, argnums=(0, 2))(*args, **kwargs)
        assert set(captures) == {"0/w", "0/b", "1/w"} and len(grads) == 2
        assert captures.batch_size == 8 * SECOND["w"].shape[1]


@pytest.mark.parametrize("name", ["params", "self", "args"])
def test_other_arguments_have_any_name(name):
    def loss(weights, **others):
        return jnp.mean(jnp.sum((others[name] @ weights["w"]) ** 2, -1))

    assert cqjax.value_and_grad(loss)({"w": jnp.ones((3, 2))}, **{name: X})[2].batch_size == 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cqjax.value_and_grad(loss_fn, argnums="x"), TypeError, "argnums='x': expected an"),
        (lambda: cqjax.value_and_grad(loss_fn, argnums=0.0), TypeError, "argnums=0.0: expected an"),
        (lambda: cqjax.value_and_grad(loss_fn, argnums=()), ValueError, "at least one argument"),
        (
            lambda: cqjax.value_and_grad(loss_fn, argnums=(0, -3))(FIRST, X, SECOND),
            ValueError,
            r"argnums=\(0, -3\) means an argument twice",
        ),
        (
            lambda: cqjax.value_and_grad(loss_fn, argnums=3)(FIRST, X, SECOND),
            TypeError,
            "argnums=3: the loss was called with 3 arguments by position; expected at least 4",
        ),
        (
            lambda: cqjax.value_and_grad(lambda *, p: 0.0)(p=FIRST),
            TypeError,
            "argnums=0: the loss was called with 0 arguments by position; expected at least 1",
        ),
        (lambda: cqjax.value_and_grad(loss_fn, 2), TypeError, "has_aux=2: .*argnums= is passed by"),
    ],
)
def test_what_cannot_be_meant(call, error, message):
    with pytest.raises(error, match=message):
        call()
