"""`scale_by_conjugate_gradient` against SciPy and plain loops, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

import cqjax

BETAS = ("fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan")
MODES = ("restart", "reverse")


pytestmark = pytest.mark.usefixtures("float64")


def printed(beta, r, r_next, p):
    """β as Eq. 36 of the NeuronLearning notes has it."""
    return {
        "fletcher_reeves": lambda: r_next @ r_next / (r @ r),
        "polak_ribiere": lambda: r_next @ (r_next - r) / (r @ r),
        "hestenes_stiefel": lambda: -(r_next @ (r_next - r)) / (p @ (r_next - r)),
        "dai_yuan": lambda: -(r_next @ r_next) / (p @ (r_next - r)),
    }[beta]()


def directions(beta, on_ascent, gradients):
    """The directions p for a sequence of gradients, and how often p was r again; NumPy."""
    r = p = -gradients[0]
    found, restarts = [p], 0
    for gradient in gradients[1:]:
        r_next = -gradient
        b = printed(beta, r, r_next, p)
        p = r_next + b * p
        if on_ascent == "reverse":
            p = np.sign(p @ r_next) * p
        elif p @ r_next <= 0 or (beta == "polak_ribiere" and b < 0):
            p, restarts = r_next, restarts + 1
        r = r_next
        found.append(p)
    return found, restarts


@functools.cache
def method(beta, on_ascent="restart"):
    return cqjax.scale_by_conjugate_gradient(beta, on_ascent=on_ascent)


@functools.partial(jax.jit, static_argnums=0)
def run(tx, gradients):
    """The updates for a sequence of gradients (trees with a leading axis), and the last state."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, updates

    state = tx.init(jax.tree.map(lambda g: g[0], gradients))
    state, updates = jax.lax.scan(step, state, gradients)
    return updates, state


@functools.partial(jax.jit, static_argnames="beta")
def exact_steps(beta, a, b):
    """The points of n exact steps from zero to the minimum of xᵀAx/2 - bᵀx, (n, n)."""
    tx = method(beta)

    def step(carry, _):
        x, state = carry
        gradient = a @ x - b
        u, state = tx.update(gradient, state)
        x = x - (u @ gradient) / (u @ a @ u) * u
        return (x, state), x

    x = jnp.zeros_like(b)
    (_, state), points = jax.lax.scan(step, (x, tx.init(x)), length=len(b))
    return points, state.restarts


@pytest.mark.parametrize("beta", BETAS)
@settings(max_examples=20, deadline=None)
@given(n=st.sampled_from([1, 8]), seed=st.integers(0, 2**32 - 1))
def test_exact_steps_on_a_quadratic_are_the_linear_method(beta, n, seed):
    """Eqs. 34 to 36: SciPy's iterates, and the minimum after n steps."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    a = q @ np.diag(rng.uniform(1, 20, n)) @ q.T
    b = rng.normal(size=n)
    points, restarts = exact_steps(beta, a, b)
    want = []
    scipy.sparse.linalg.cg(
        a, b, rtol=0, atol=0, maxiter=n, callback=lambda x: want.append(np.array(x))
    )
    scale = np.linalg.norm(want[-1])
    np.testing.assert_allclose(points, want, rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose(points[-1], np.linalg.solve(a, b), rtol=0, atol=1e-9 * scale)
    assert restarts == 0


@pytest.mark.parametrize("on_ascent", MODES)
@pytest.mark.parametrize("beta", BETAS)
def test_directions_off_a_quadratic(beta, on_ascent):
    """Eq. 36 where the four differ, with its restarts or turns."""
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(30, 10)) + 1.2 * rng.normal(size=10)
    want, restarts = directions(beta, on_ascent, gradients)
    tx = method(beta, on_ascent)
    updates, state = run(tx, gradients)
    np.testing.assert_allclose(updates, -np.array(want), rtol=1e-9)
    assert state.restarts == restarts
    assert (restarts > 0) == (on_ascent == "restart" and beta != "fletcher_reeves")


def test_a_tree_is_one_vector():
    gradients = np.random.default_rng(2).normal(size=(9, 10))
    tree = {"a": gradients[:, :6].reshape(-1, 2, 3), "b": [gradients[:, 6:7], gradients[:, 7:]]}
    updates, state = run(method("polak_ribiere"), tree)
    want, restarts = directions("polak_ribiere", "restart", gradients)
    flat = np.concatenate([u.reshape(9, -1) for u in jax.tree.leaves(updates)], 1)
    np.testing.assert_allclose(flat, -np.array(want), rtol=1e-9)
    assert state.restarts == restarts > 0


def hills(x):
    return jnp.sum(jnp.cos(x)) + 0.1 * jnp.cos(x[0] + 2 * x[1])


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_the_documents_own_rule(rate):
    """The numbered rules that end section 3.2 of the NeuronLearning notes, from near a maximum."""
    gradient = jax.jit(jax.grad(hills))
    x, p, z, turns, want = np.array([0.1, 0.3]), None, None, 0, []
    for _ in range(150):
        r = -np.asarray(gradient(x))
        p = r if p is None else r + r @ r / (z - r @ p) * p
        z = p @ r
        x = x + rate * np.sign(z) * p
        turns += z < 0
        want.append(x)
    rule = cqjax.scale_by_conjugate_gradient("dai_yuan", on_ascent="reverse")
    tx = optax.chain(rule, optax.scale(-rate))
    x, points = jnp.array([0.1, 0.3]), []
    state, update = tx.init(x), jax.jit(tx.update)
    for _ in want:
        updates, state = update(gradient(x), state)
        x = optax.apply_updates(x, updates)
        points.append(x)
    np.testing.assert_allclose(points, want, rtol=1e-6, atol=1e-9)
    assert turns > 0 and state[0].restarts == 0
    assert hills(x) < -2.0999


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@pytest.mark.parametrize(
    ("beta", "n", "search", "most"),
    [
        ("fletcher_reeves", 2, "zoom", 5),
        ("dai_yuan", 2, "zoom", 5),
        ("polak_ribiere", 10, "zoom", 1.5),
        ("hestenes_stiefel", 10, "zoom", 1.5),
        ("hestenes_stiefel", 2, "backtracking", 30),
    ],
)
def test_line_searches_on_rosenbrocks_function(beta, n, search, most):
    """SciPy's minimum, in at most so many times SciPy's steps."""
    start = np.resize([-1.2, 1.0], n)
    peer = scipy.optimize.minimize(
        scipy.optimize.rosen,
        start,
        jac=scipy.optimize.rosen_der,
        method="CG",
        options={"gtol": 1e-8},
    )
    searches = {
        "zoom": optax.scale_by_zoom_linesearch(max_linesearch_steps=20, curv_rtol=0.1),
        "backtracking": optax.scale_by_backtracking_linesearch(max_backtracking_steps=60),
    }
    tx = optax.chain(cqjax.scale_by_conjugate_gradient(beta), optax.scale(-1.0), searches[search])

    def step(carry):
        x, state, steps = carry
        value, grad = jax.value_and_grad(rosenbrock)(x)
        extra = {"value": value, "grad": grad, "value_fn": rosenbrock}
        updates, state = tx.update(grad, state, x, **extra)
        return optax.apply_updates(x, updates), state, steps + 1

    def unfinished(carry):
        return (jnp.abs(jax.grad(rosenbrock)(carry[0])).max() > 1e-8) & (carry[2] < 2000)

    x = jnp.asarray(start)
    x, _, steps = jax.jit(functools.partial(jax.lax.while_loop, unfinished, step))(
        (x, tx.init(x), 0)
    )
    np.testing.assert_allclose(x, 1, atol=1e-7)
    np.testing.assert_allclose(x, peer.x, atol=1e-7)
    assert steps <= most * peer.nit


START = [1.0, 0.0]
CASES = [  # β, what follows START, the update, restarts
    ("fletcher_reeves", [-2.0, 1.0], {"restart": [-2.0, 1.0], "reverse": [-3.0, -1.0]}, (1, 0)),
    ("polak_ribiere", [0.5, 0.0], {"restart": [0.5, 0.0], "reverse": [0.25, 0.0]}, (1, 0)),
    ("hestenes_stiefel", [2.0, 1.0], {"restart": [2.0, 1.0], "reverse": [1.0, -1.0]}, (1, 0)),
    ("dai_yuan", [2.0, 0.0], {"restart": [2.0, 0.0], "reverse": [2.0, 0.0]}, (1, 0)),
    ("fletcher_reeves", [-1.0, 0.0], dict.fromkeys(MODES, [-1.0, 0.0]), (1, 1)),
    ("hestenes_stiefel", [1.0, 5.0], dict.fromkeys(MODES, [1.0, 5.0]), (1, 1)),
    ("dai_yuan", [1.0, 5.0], dict.fromkeys(MODES, [1.0, 5.0]), (1, 1)),
    ("hestenes_stiefel", [0.5, 0.25], dict.fromkeys(MODES, [0.125, 0.25]), (0, 0)),
    ("dai_yuan", [-1.0, 1.0], dict.fromkeys(MODES, [0.0, 1.0]), (0, 0)),
]


@pytest.mark.parametrize("on_ascent", MODES)
@pytest.mark.parametrize(("beta", "then", "want", "restarts"), CASES)
def test_restarts(beta, then, want, restarts, on_ascent):
    """By hand: an ascent, β < 0, pᵀr = 0, a denominator of zero; and none of these."""
    tx = method(beta, on_ascent)
    updates, state = run(tx, jnp.array([START, then]))
    np.testing.assert_allclose(updates, [START, want[on_ascent]])
    assert state.restarts == restarts[MODES.index(on_ascent)]


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_of_zero_or_nan_are_forgotten(beta):
    tx = method(beta)
    gradients = jnp.array([[0.0, 0.0], START, [0.0, 0.0], [0.0, 2.0], [jnp.nan, 1.0], [3.0, 1.0]])
    updates, state = run(tx, gradients)
    np.testing.assert_array_equal(updates, np.nan_to_num(gradients))
    assert state.restarts == 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    """Updates in the gradient's dtype; inner products in at least float32."""
    gradients = {"w": jnp.ones((2, 1000), dtype), "b": jnp.full((2, 1), 0.5, dtype)}
    tx = method("fletcher_reeves")
    updates, state = run(tx, gradients)
    np.testing.assert_array_equal(updates["w"], [[1] * 1000, [2] * 1000])
    wide = "float64" if dtype == "float64" else "float32"
    assert state.squared_norm == 1000.25 and state.slope == 2000.5
    got = [str(leaf.dtype) for leaf in jax.tree.leaves((updates, state))]
    assert got == [dtype] * 4 + [wide, wide, "int32"]


def test_a_direction_that_overflows_is_given_up():
    gradients = jnp.array([[0.01, 0.0], [0.001, 1000.0]], "float16")
    updates, state = run(method("fletcher_reeves"), gradients)
    np.testing.assert_array_equal(updates, gradients)
    assert state.restarts == 1


def test_the_state_keeps_its_dtype():
    tx = cqjax.scale_by_conjugate_gradient()
    state = tx.init(jnp.zeros(3, jnp.bfloat16))
    updates, new = tx.update(jnp.ones(3, jnp.float32), state)
    assert updates.dtype == jnp.float32
    assert [leaf.dtype for leaf in new] == [leaf.dtype for leaf in state]


def test_complex_parameters_are_pairs_of_real_ones():
    pairs = np.random.default_rng(3).normal(size=(8, 5, 2))
    tx = method("hestenes_stiefel")
    updates, _ = run(tx, pairs[..., 0] + 1j * pairs[..., 1])
    want, _ = run(tx, pairs)
    np.testing.assert_allclose(updates, want[..., 0] + 1j * want[..., 1], rtol=1e-12)


def test_vmap_is_one_at_a_time():
    gradients = np.random.default_rng(13).normal(size=(3, 6, 4))
    one = functools.partial(run, method("polak_ribiere"))
    updates, state = jax.vmap(one)(gradients)
    assert len(set(state.restarts.tolist())) > 1
    for i, sequence in enumerate(gradients):
        want, last = one(sequence)
        np.testing.assert_allclose(updates[i], want, rtol=1e-12)
        assert state.restarts[i] == last.restarts


@pytest.mark.parametrize("beta", ["fletcher_reeves", "hestenes_stiefel"])
def test_masked_leaves_are_left_alone(beta):
    gradients = {"a": np.random.default_rng(4).normal(size=(5, 3)), "b": np.ones((5, 2))}
    tx = method(beta)
    updates, _ = run(optax.masked(tx, {"a": True, "b": False}), gradients)
    want, _ = run(tx, gradients["a"])
    np.testing.assert_allclose(updates["a"], want, rtol=1e-12)
    np.testing.assert_array_equal(updates["b"], gradients["b"])
    updates, _ = run(optax.masked(tx, False), gradients)
    jax.tree.map(np.testing.assert_array_equal, updates, gradients)


def test_optax_contract():
    """Hyperparameters, unknown arguments, donated states, placeholders; one trace."""
    gradients = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)))
    tx = method("hestenes_stiefel")
    want, _ = run(tx, gradients)
    injected = optax.inject_hyperparams(cqjax.scale_by_conjugate_gradient)("hestenes_stiefel")
    np.testing.assert_allclose(run(injected, gradients)[0], want, rtol=1e-12)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(gradient, state):
        traces.append(None)
        return tx.update(gradient, state, None, unknown=1)

    state = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(gradients[0]))
    for gradient, wanted in zip(gradients, want, strict=True):
        updates, state = update(gradient, state)
        np.testing.assert_allclose(updates, wanted, rtol=1e-12)
    assert len(traces) == 1


@pytest.mark.parametrize("beta", ["fletcher_reeves", "dai_yuan"])
def test_derivatives_pass_through(beta):
    """Of what three steps reach, by where they start; the first has no β to differentiate."""

    @jax.jit
    def reached(x):
        tx = optax.chain(method(beta), optax.scale(-2e-3))
        state = tx.init(x)
        for _ in range(3):
            updates, state = tx.update(jax.grad(rosenbrock)(x), state)
            x = x + updates
        return rosenbrock(x)

    start, shift = np.array([-0.5, 1.0]), np.array([1e-7, 0.0])
    want = (reached(start + shift) - reached(start - shift)) / 2e-7
    np.testing.assert_allclose(jax.jit(jax.grad(reached))(start)[0], want, rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="beta='newton': expected one of 'fletcher_reeves', 'pol"):
        cqjax.scale_by_conjugate_gradient("newton")
    with pytest.raises(ValueError, match="on_ascent='stop': expected one of 'restart', 'reverse'"):
        cqjax.scale_by_conjugate_gradient(on_ascent="stop")
