"""Each row of the table in docs/devices.md: training on a mesh is training on one device."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import placements
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cqjax

ROOT = pathlib.Path(__file__).parents[2]


def name_of(case):
    within = "" if case.within else "-outside"
    return f"{case.mesh}-{case.network}-{case.split}-{case.optimizer}{within}"


@pytest.mark.parametrize("case", placements.CASES, ids=name_of)
@pytest.mark.usefixtures("float64")
def test_case(case):
    (got, value), start = placements.on_mesh(case)
    want, expected = placements.on_one_device(case.network, case.optimizer)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())
    # What comes out is split as what went in, so that a loop may go on with it.
    split = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (start, got))
    assert split[0] == split[1]


def test_the_table():
    assert placements.table() in (ROOT / "docs" / "devices.md").read_text()


def normalised(params, x, y):
    weight = params["g"] * params["v"] / jnp.linalg.norm(params["v"], axis=0)
    return jnp.mean(jnp.sum((jnp.tanh(x @ weight + params["b"]) @ params["w"] - y) ** 2, -1))


@pytest.mark.usefixtures("float64")
def test_reparametrized_weights_along_automatic_axes():
    """Conjugate gradients end at a residual of 1e-8. Along explicit axes the plan says no."""
    rng = np.random.default_rng(0)
    sizes = {"v": (6, 8), "g": (8,), "b": (8,), "w": (8, 3)}
    params = {name: jnp.asarray(rng.normal(size=size)) for name, size in sizes.items()}
    batch = [jnp.asarray(rng.normal(size=(32, width))) for width in (6, 3)]
    tx = cqjax.csgd(0.1)
    evaluate = cqjax.value_and_grad(normalised, reparametrized="nearest")

    @jax.jit
    def step(params, *batch):
        _, grads, captures = evaluate(params, *batch)
        return tx.update(grads, tx.init(params), params, captures=captures)[0]

    def split(kind):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        return [jax.device_put(part, NamedSharding(mesh, P("data"))) for part in batch]

    want, got = step(params, *batch), step(params, *split(AxisType.Auto))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
    explicit = split(AxisType.Explicit)
    with jax.set_mesh(explicit[0].sharding.mesh):
        plan = evaluate.plan(params, *explicit)
    assert "explicit axes" in plan.uncovered()["v"][0]
    assert [p.path for p in plan.parameters if p.status == "covered"] == ["w"]
