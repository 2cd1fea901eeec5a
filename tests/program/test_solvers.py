"""ODE and fixed-point solvers, and Taylor mode: what is covered, and what a plan says otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.jet import jet
from jax.experimental.ode import odeint

import cqjax

RNG = np.random.default_rng(0)
N, D, H = 6, 2, 5
X = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
PARAMS = {
    "w1": jnp.asarray(RNG.normal(size=(D, H)), jnp.float32),
    "b1": jnp.asarray(RNG.normal(size=H), jnp.float32),
    "w2": jnp.asarray(RNG.normal(size=(H, D)), jnp.float32),
}
STEPS, LENGTH = 4, 0.1


def field(h, params):
    return jnp.tanh(h @ params["w1"] + params["b1"]) @ params["w2"]


def loss_of(solve):
    return lambda params, x: jnp.mean(jnp.sum(solve(params, x) ** 2, -1))


def euler(params, x):
    return lax.scan(lambda h, _: (h + LENGTH * field(h, params), None), x, length=STEPS)[0]


def runge_kutta(params, x):
    def step(h, _):
        k1 = field(h, params)
        k2 = field(h + LENGTH / 2 * k1, params)
        k3 = field(h + LENGTH / 2 * k2, params)
        k4 = field(h + LENGTH * k3, params)
        return h + LENGTH / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    return lax.scan(step, x, length=STEPS)[0]


def by_odeint(params, x):
    return odeint(lambda h, t, params: field(h, params), x, jnp.array([0.0, 1.0]), params)[-1]


def fixed_point(params, x):
    @jax.custom_vjp
    def solve(params, x):
        def trip(state):
            return 0.1 * field(state[0], params) + x, state[1] + 1

        return lax.while_loop(lambda state: state[1] < 20, trip, (x, 0))[0]

    def backward(kept, g):
        params, x, z = kept
        _, pull = jax.vjp(lambda params, x, z: 0.1 * field(z, params) + x, params, x, z)
        total = g
        for _ in range(10):
            total = g + pull(total)[2]
        return pull(total)[:2]

    def forward(params, x):
        z = solve(params, x)
        return z, (params, x, z)

    solve.defvjp(forward, backward)
    return solve(params, x)


def by_custom_root(params, x):
    def residual(z):
        return z - 0.1 * field(z, params) - x

    def solve(f, z):
        return lax.fori_loop(0, 20, lambda _, z: z - f(z), z)

    def linear(g, y):
        return jnp.linalg.solve(
            jax.jacobian(g)(jnp.zeros_like(y)).reshape(y.size, y.size), y.ravel()
        ).reshape(y.shape)

    return lax.custom_root(residual, x, solve, linear)


def moment_of_steps(params):
    """XᵀX of the first layer along Euler's steps, with the bias's feature, in NumPy."""
    weights = {path: np.asarray(array, np.float64) for path, array in params.items()}
    h, total = np.asarray(X, np.float64), np.zeros((D + 1, D + 1))
    for _ in range(STEPS):
        rows = np.concatenate([h, np.ones((N, 1))], 1)
        total += rows.T @ rows
        inner = np.tanh(h @ weights["w1"] + weights["b1"])
        h = h + LENGTH * inner @ weights["w2"]
    return total


@pytest.mark.parametrize("solve", [euler, runge_kutta])
def test_steps_in_a_scan_are_covered(solve):
    plan = cqjax.plan(loss_of(solve))(PARAMS, X)
    assert {p.status for p in plan.parameters} == {"covered"}
    if solve is euler:
        _, _, captures = cqjax.value_and_grad(loss_of(solve), solver="primal")(PARAMS, X)
        got = captures["w1"][0].second_moment()[0]
        np.testing.assert_allclose(got, moment_of_steps(PARAMS), rtol=1e-4)


@pytest.mark.parametrize(
    ("solve", "name"),
    [
        (by_odeint, "custom_vjp_call"),
        (fixed_point, "custom_vjp_call"),
        (by_custom_root, "custom_jvp_call"),
    ],
)
def test_other_solvers_are_not_and_the_plan_says_what_is(solve, name):
    loss_fn = loss_of(solve)
    (reason,) = cqjax.plan(loss_fn)(PARAMS, X).uncovered()["w1"]
    assert reason.startswith(f"enters `{name}`, a function with a ")
    for covered in ("jax.lax.scan", "DirectAdjoint", "unroll=True"):
        assert covered in reason
    with pytest.warns(UserWarning, match="no parameter is covered"):
        loss, grads, _ = cqjax.value_and_grad(loss_fn)(PARAMS, X)
    expected, gradient = jax.value_and_grad(loss_fn)(PARAMS, X)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, gradient)


@pytest.mark.parametrize("name", ["DirectAdjoint", "RecursiveCheckpointAdjoint"])
@pytest.mark.parametrize("mapped", [False, True])
def test_diffrax(name, mapped):
    diffrax = pytest.importorskip("diffrax")

    def one(params, x):
        term = diffrax.ODETerm(lambda t, h, params: field(h, params))
        solution = diffrax.diffeqsolve(
            term, diffrax.Euler(), 0.0, STEPS * LENGTH, LENGTH, x, args=params,
            adjoint=getattr(diffrax, name)(), max_steps=16,
        )  # fmt: skip
        return solution.ys[-1]

    solve = jax.vmap(one, (None, 0)) if mapped else one
    if name == "RecursiveCheckpointAdjoint":
        reasons = cqjax.plan(loss_of(solve))(PARAMS, X).uncovered()["w1"]
        assert any("diffrax's DirectAdjoint" in reason for reason in reasons)
        return
    plan = cqjax.plan(loss_of(solve))(PARAMS, X)
    assert {p.status for p in plan.parameters} == {"covered"}
    # Steps that are not taken have no part in XᵀX.
    _, _, captures = cqjax.value_and_grad(loss_of(solve), solver="primal")(PARAMS, X)
    got = captures["w1"][0].second_moment()[0]
    np.testing.assert_allclose(got, moment_of_steps(PARAMS), rtol=1e-4)


def test_taylor_mode_is_covered_with_its_bias():
    def loss_fn(params, x):
        series = (jnp.ones_like(x), jnp.zeros_like(x))
        value, (first, second) = jet(lambda h: field(h, params), (x,), (series,))
        return jnp.mean(jnp.sum((value + first + second) ** 2, -1))

    plan = cqjax.plan(loss_fn)(PARAMS, X)
    assert {p.status for p in plan.parameters} == {"covered"}
    (_, grads, captures), expected = (
        cqjax.value_and_grad(loss_fn, capture=cqjax.Rows)(PARAMS, X),
        jax.grad(loss_fn)(PARAMS, X),
    )
    rows = captures["w1"][0].rows()
    for part, path in ((rows.x[0].T @ rows.dz[0], "w1"), (rows.h[0] @ rows.dz[0], "b1")):
        np.testing.assert_allclose(part, expected[path], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(grads[path], expected[path], rtol=1e-3, atol=1e-3)
