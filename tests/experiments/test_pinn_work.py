"""Losses that use weights both ways: two ways of writing each, solutions, errors, steps."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax
from experiments.everyday import sources
from experiments.pinn import equations, gan
from experiments.pinn.entrants import searching_step
from experiments.pinn.equations import BURGERS, POISSON, VISCOSITY, Network
from experiments.pinn.experiment import KINDS
from experiments.pinn.work import ALL, PACES, POSED, Size, relative_error
from experiments.training import State

SIZE = Size("forward", 0.01, 8, 20_000, 11, 64)
EQUATIONS = {"poisson": POISSON, "burgers": BURGERS}
NAMES = ["Adam", "L-BFGS", "C-SGD", "C-Adam", "C-Adam, untuned", "C-Adam, defaults"]


@pytest.fixture(params=EQUATIONS)
def equation(request):
    return EQUATIONS[request.param]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def both_ways(make, *args):
    """Value and gradient of a loss in both modes."""
    found = [jax.value_and_grad(make(mode), has_aux=True)(*args) for mode in ("reverse", "forward")]
    return [(value[0], jax.tree.leaves(grads)) for value, grads in found]


def check_equal(found):
    (value, grads), (other, others) = found
    np.testing.assert_allclose(value, other, rtol=1e-12)
    for one, two in zip(grads, others, strict=True):
        assert one.dtype == jnp.float64
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-10 * float(jnp.abs(two).max()))


def test_both_ways_of_writing_an_equations_loss_are_equal(equation, float64):
    rng, model = np.random.default_rng(0), Network(7)
    inside, border = equation.inside(rng, 9), equation.border(rng, 5)
    params = model.init(jax.random.key(1), jnp.asarray(inside))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
    targets = rng.normal(size=9)

    def make(mode):
        return equations.loss(model, equation, mode, border, 3.0)

    check_equal(both_ways(make, params, {}, inside, targets))


def test_both_ways_of_writing_the_critics_loss_are_equal(float64):
    model, (real, noise) = gan.Gan.of(6), gan.ring(np.random.default_rng(0), 10)
    params, _ = model.start(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) + 0.05, params)
    check_equal(both_ways(model.loss, params, {}, np.float64(real), np.float64(noise)))


def numbers_of(params):
    layers = (params[name] for name in sorted(params))
    return [(np.float64(layer["kernel"]), np.float64(layer["bias"])) for layer in layers]


def values_of(params, x, activation):
    """A network of dense layers in NumPy."""
    *hidden, (kernel, bias) = numbers_of(params)
    for its_kernel, its_bias in hidden:
        x = activation(x @ its_kernel + its_bias)
    return x @ kernel + bias


def test_the_loss_is_that_of_finite_differences(equation, float64):
    rng, model, h = np.random.default_rng(3), Network(6), 1e-4
    inside, border = equation.inside(rng, 8), equation.border(rng, 4)
    params = model.init(jax.random.key(0), jnp.asarray(inside))["params"]

    def u(dx=0.0, dy=0.0):
        return values_of(params, inside + np.array([dx, dy]), np.tanh)[:, 0]

    xx, yy = ((u(*way) - 2 * u() + u(*-way)) / h**2 for way in h * np.eye(2))
    if equation is POISSON:
        x, y = inside.T
        residual = xx + yy + 2 * np.pi**2 * np.sin(np.pi * x) * np.sin(np.pi * y)
    else:
        by_x, by_t = ((u(*way) - u(*-way)) / (2 * h) for way in h * np.eye(2))
        residual = by_t + u() * by_x - 0.03 * xx
    given = values_of(params, border, np.tanh)[:, 0]
    x, second = border.T
    known = 0 if equation is POISSON else np.where(second == 0, -np.sin(np.pi * x), 0)
    expected = np.mean(residual**2) + 5 * np.mean((given - known) ** 2)
    value, _ = equations.loss(model, equation, "reverse", border, 5.0)(
        params, {}, jnp.asarray(inside), jnp.zeros(8)
    )
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_the_laplacian_is_the_trace_of_the_hessian(float64):
    def u(place):
        return jnp.sin(2 * place[0]) * jnp.exp(place[0] * place[1])

    place = jnp.array([0.3, 0.7])
    source = 2 * np.pi**2 * np.sin(np.pi * 0.3) * np.sin(np.pi * 0.7)
    expected = jnp.trace(jax.hessian(u)(place)) + source
    for mode in ("reverse", "forward"):
        np.testing.assert_allclose(POISSON.residuals[mode](u, place), expected, rtol=1e-12)


def test_poissons_solution_solves_it():
    x, y = np.random.default_rng(0).uniform(size=(2, 50))
    h = 1e-3

    def u(x, y):
        return POISSON.solution(np.stack([x, y], -1))

    laplacian = (u(x + h, y) + u(x - h, y) + u(x, y + h) + u(x, y - h) - 4 * u(x, y)) / h**2
    np.testing.assert_allclose(
        -laplacian, 2 * np.pi**2 * np.sin(np.pi * x) * np.sin(np.pi * y), atol=1e-4
    )
    assert abs(POISSON.solution(POISSON.border(np.random.default_rng(1), 40))).max() < 1e-12


@pytest.mark.parametrize("time", [0.25, 0.5, 1.0])
def test_burgers_solution_is_that_of_a_spectral_method(time):
    """Fourier in space, since the odd start stays odd; Runge and Kutta in time."""
    size, steps = 192, 2000
    x = -1 + 2 * np.arange(size) / size
    wave = np.pi * np.fft.rfftfreq(size, 1 / size)
    kept = np.arange(len(wave)) < 2 / 3 * len(wave)

    def slope(modes):
        square = np.fft.rfft(np.fft.irfft(modes) ** 2)
        return -0.5j * wave * square * kept - VISCOSITY * wave**2 * modes

    modes, h = np.fft.rfft(-np.sin(np.pi * x)), time / steps
    for _ in range(steps):
        a = slope(modes)
        b = slope(modes + h / 2 * a)
        c = slope(modes + h / 2 * b)
        modes = modes + h / 6 * (a + 2 * b + 2 * c + slope(modes + h * c))
    found = BURGERS.solution(np.stack([x, np.full(size, time)], -1))
    np.testing.assert_allclose(found, np.fft.irfft(modes), atol=1e-9)


def test_places(equation):
    rng = np.random.default_rng(0)
    inside, border, grid = equation.inside(rng, 400), equation.border(rng, 400), equation.grid(5)
    low, high = np.array(equation.low), np.array(equation.high)
    for places in (inside, border, grid):
        assert (places >= low).all() and (places <= high).all()
        np.testing.assert_allclose(np.ptp(places, axis=0), high - low, rtol=0.05)
    sides = [border[:, axis] == at[axis] for axis in (0, 1) for at in (low, high)]
    assert np.any(sides, axis=0).all()
    parts = np.mean(sides, axis=1)
    np.testing.assert_allclose(
        parts, [0.25] * 4 if equation is POISSON else [0.25, 0.25, 0.5, 0], atol=0.06
    )
    np.testing.assert_array_equal(grid[1], [low[0], low[1] + (high - low)[1] / 4])


def test_the_relative_error():
    model = Network(5)
    places = POISSON.grid(4).astype(np.float32)
    params = model.init(jax.random.key(0), places)["params"]
    values = 1 + POISSON.solution(places)
    outputs = values_of(params, np.float64(places), np.tanh)[:, 0]
    expected = np.sqrt(np.sum((outputs - values) ** 2) / np.sum(values**2))
    metric = relative_error(model, places, values)
    assert metric(params, {}) == pytest.approx(expected, rel=1e-5)


def test_the_wasserstein_distance_is_that_of_the_best_of_all_pairings():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 2))
    ways = [np.linalg.norm(a - b[list(order)], axis=1).mean() for order in permutations(range(6))]
    assert gan.wasserstein(a, b) == pytest.approx(min(ways))
    assert gan.wasserstein(a, a[::-1] + np.array([3, 4])) == pytest.approx(5)
    assert gan.wasserstein(a * np.nan, b) == np.inf


def test_each_network_of_the_gan_has_the_gradient_of_its_own_loss():
    model, (real, noise) = gan.Gan.of(6), gan.ring(np.random.default_rng(1), 12)
    params, state = model.start(3)

    def logits(critic, points):
        return model.critic.apply({"params": critic}, points)[:, 0]

    fake = model.generated(params, noise)

    def critics(critic):
        def slope(point):
            return jax.grad(lambda point: logits(critic, point[None])[0])(point)

        squares = [jnp.sum(jax.vmap(slope)(some) ** 2, -1).mean() for some in (real, fake)]
        chances = jax.nn.sigmoid(logits(critic, real)), jax.nn.sigmoid(-logits(critic, fake))
        return -sum(jnp.log(chance).mean() for chance in chances) + 0.05 * sum(squares)

    def generators(generator):
        points = model.generator.apply({"params": generator}, noise)
        return -jnp.log(jax.nn.sigmoid(logits(params["critic"], points))).mean()

    expected = {
        "critic": jax.grad(critics)(params["critic"]),
        "generator": jax.grad(generators)(params["generator"]),
    }
    grads, _ = jax.grad(model.loss("reverse"), has_aux=True)(params, state, real, noise)
    for name, its in expected.items():
        for one, two in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(its), strict=True):
            np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-6)


def test_the_ring():
    points, noise = gan.ring(np.random.default_rng(0), 4000)
    angles = np.arctan2(*points.T[::-1]) * 8 / (2 * np.pi)
    counts = np.bincount(np.round(angles).astype(int) % 8, minlength=8)
    np.testing.assert_allclose(counts / 4000, 1 / 8, atol=0.02)
    assert np.linalg.norm(points, axis=1).mean() == pytest.approx(1.5, abs=0.01)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(4), atol=0.1)


def test_the_tied_model_has_one_table():
    work = ALL["tied"](SIZE)
    params, _ = work.task.start(0)
    assert "head" not in params and sources.SYMBOLS in params["Embed_0"]["embedding"].shape
    x = work.task.parts.train.images[:2]
    outputs = work.task.model.apply({"params": params}, x)
    assert outputs.shape == (2, 64, sources.SYMBOLS)
    doubled = params | {"Embed_0": jax.tree.map(lambda leaf: 0 * leaf, params["Embed_0"])}
    np.testing.assert_array_equal(work.task.model.apply({"params": doubled}, x), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_n_is_the_number_of_terms(kind):
    work = ALL[kind](SIZE)
    params, state = work.task.start(0)
    batch = [array[: PACES[kind].batch_size] for array in work.task.parts.train]
    plan = cqjax.plan(work.loss_fn, has_aux=True, batch_size=work.terms)(params, state, *batch)
    assert plan.batch_size == work.terms == (16 * 64 if kind == "tied" else len(batch[1]))


@pytest.mark.parametrize("kind", POSED)
def test_the_parts_have_their_own_places_and_losses(kind):
    task = ALL[kind](SIZE).task
    params, state = task.start(0)
    train, validation, test = task.parts
    assert len(train.images) == len(validation.images) == POSED[kind].inside
    assert not set(map(tuple, train.images)) & set(map(tuple, validation.images))
    assert len(test.images) == 121
    values = {name: metric(params, state) for name, metric in task.watched.items()}
    assert list(values) == ["train_loss", "validation_loss", "test_error"]
    value, _ = ALL[kind](SIZE).loss_fn(params, state, *train)
    assert values["train_loss"] == pytest.approx(float(value), rel=1e-5)
    assert values["validation_loss"] != values["train_loss"]


def test_the_searching_step_finds_the_minimum_of_a_quadratic():
    matrix = jnp.diag(jnp.array([1.0, 10.0, 100.0]))
    optimizer = optax.lbfgs(memory_size=5)

    def loss_fn(params, state, images, labels):
        return 0.5 * (params - images) @ matrix @ (params - images), state

    step, target = searching_step(loss_fn, optimizer), jnp.array([1.0, -2.0, 3.0])
    state = State(jnp.zeros(3), {}, optimizer.init(jnp.zeros(3)))
    first = None
    for _ in range(20):
        state, loss = jax.jit(step)(state, target, target)
        first = loss if first is None else first
    assert float(first) == pytest.approx(0.5 * (1 + 40 + 900))
    np.testing.assert_allclose(state.params, target, atol=1e-3)
