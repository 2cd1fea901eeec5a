"""What is captured is one choice, how it is solved another: `capture=` and `solver=`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from linear_layer import assert_close, expected, problem, squared_error
from zoo_moments import DAMPING, flat, updated

import cqjax

pytestmark = pytest.mark.usefixtures("float64")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signals(cqjax.Statistic):
    """Z̄ᵀZ̄."""

    zz: jax.Array

    @classmethod
    def take(cls, site, trip):
        z = site.form.output.pack(trip.dz)
        return cls(jnp.einsum("bno,bnp->bop", z, z, precision=trip.precision))


@pytest.mark.parametrize("capture", [None, cqjax.Rows, cqjax.Gram])
@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
@pytest.mark.parametrize("shape", [(3, 8, 2), (20, 4, 2)])
def test_the_update_is_the_same_whatever_was_captured(shape, solver, capture):
    params, x, y = problem(*shape, bias=True)
    options = {"solver": solver, "capture": capture}
    if (solver, capture) == ("dual", cqjax.Gram):
        with pytest.raises(ValueError, match=r'capture=Gram with solver="dual", which needs rows'):
            cqjax.value_and_grad(squared_error, **options)
        return
    _, got = updated(squared_error, params, (x, y), **options)
    assert_close(got, expected(params, x, y, DAMPING), 1e-8)


@pytest.mark.parametrize("capture", [cqjax.Rows, cqjax.Gram])
def test_the_plan_says_both(capture):
    params, x, y = problem(20, 4, 2, bias=True)
    (block,) = cqjax.plan(squared_error, capture=capture)(params, x, y).blocks
    assert (block.statistic, block.solver) == (capture, "primal")
    _, _, captures = cqjax.value_and_grad(squared_error, capture=capture)(params, x, y)
    assert captures["w"][0].has_rows == (capture is cqjax.Rows)


NAMES = ["mlp", "conv_grouped", "scan_layers", "microbatch_scan", "scan_in_scan_remat"]


@pytest.mark.parametrize("name", NAMES)
def test_a_statistic_of_ones_own(name):
    """It is summed over loops, and stacked where each trip has its own weight: as rows say."""
    loss_fn, params, args = zoo.by_name(name).make(jnp.float64)
    options = {k: v for k, v in zoo.by_name(name).kwargs.items() if k != "has_aux"}
    found = {
        capture: jax.jit(
            lambda p, a, c=capture: cqjax.value_and_grad(loss_fn, capture=c, **options)(p, *a)[2]
        )(params, args)
        for capture in (Signals, cqjax.Rows)
    }
    for own, rows in zip(found[Signals].blocks, found[cqjax.Rows].blocks, strict=True):
        dz = np.asarray(rows.rows().dz)
        want = np.stack([sum(np.outer(row, row) for row in member) for member in dz])
        got = sum(np.asarray(site.zz) for site in own.sites)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-30)


def test_a_lookup_gives_its_counts_in_any_case():
    loss_fn, params, args = zoo.by_name("embed").make(jnp.float64)
    plan = cqjax.plan(loss_fn, capture=Signals)(params, *args)
    assert {block.statistic for block in plan.blocks} == {Signals, cqjax.Counts}


def test_a_second_moment_that_was_not_captured():
    params, x, y = problem(20, 4, 2)
    _, grads, captures = cqjax.value_and_grad(squared_error, capture=Signals)(params, x, y)
    tx = cqjax.scale_by_consequentialism()
    with pytest.raises(
        ValueError, match=r"second moment of w was not captured, only Signals; pass"
    ):
        tx.update(grads, tx.init(params), captures=captures)
    with pytest.raises(ValueError, match=r"rows of w were not captured.*capture=cqjax.Rows"):
        captures["w"][0].rows()


@pytest.mark.parametrize(
    "capture", ["rows", jax.Array, 3, cqjax.Statistic, cqjax.Counts, cqjax.Inputs, cqjax.Groups]
)
def test_what_no_product_gives(capture):
    with pytest.raises(TypeError, match=r"^capture=.*: expected cqjax.Rows, cqjax.Gram, or a"):
        cqjax.plan(squared_error, capture=capture)


class Apart(Signals):
    """Keeps trips apart, and does not say how they are merged."""

    every_trip = True


def test_trips_kept_apart_must_be_merged():
    with pytest.raises(TypeError, match=r"^capture=Apart has every_trip=True and no fold of"):
        cqjax.plan(squared_error, capture=Apart)


class Nothing(cqjax.Statistic):
    """Does not say what it takes."""


def test_a_statistic_that_takes_nothing():
    params, x, y = problem(6, 4, 2)
    with pytest.raises(NotImplementedError, match="^Nothing does not say what to take of w; "):
        cqjax.value_and_grad(squared_error, capture=Nothing)(params, x, y)


def test_captures_can_be_compared():
    params, x, y = problem(6, 4, 2)
    found = [cqjax.value_and_grad(squared_error)(params, x, y)[2] for _ in range(2)]
    assert found[0] == found[0] and found[0] != found[1]


def test_blocks_are_of_second_moments():
    with pytest.raises(ValueError, match=r"^capture=Rows with block_size=2: .*capture=cqjax.Gram"):
        cqjax.plan(squared_error, capture=cqjax.Rows, max_dim=4, block_size=2)


# The record of a layer.


def record(loss_fn, params, args, change=lambda g: g, **options):
    """The one layer of a loss, and its gradient by path."""
    _, grads, captures = cqjax.value_and_grad(loss_fn, **options)(params, *args)
    layers = cqjax.Layers(jax.tree.map(change, grads), captures, "a method")
    ((label, layer),) = layers.items()
    assert label == layer.label
    return layers, layer, flat(grads)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(bias):
    params, x, y = problem(6, 4, 2, bias=bias)
    _, layer, grads = record(squared_error, params, (x, y), lambda g: 2 * g, capture=cqjax.Rows)
    ones = np.ones((6, 1))
    inputs = np.concatenate([x, ones], 1) if bias else np.asarray(x)
    joined = np.concatenate([grads["w"], grads["b"][None]]) if bias else grads["w"]
    assert (layer.terms, layer.size, layer.has_bias) == (6, inputs.shape[1], bias)
    np.testing.assert_allclose(layer.update.joined[0], 2 * joined)
    np.testing.assert_allclose(layer.gradient.joined[0], joined)
    np.testing.assert_allclose(layer.second_moment()[0], inputs.T @ inputs, rtol=1e-12)
    rows = layer.rows()
    np.testing.assert_allclose(rows.x[0], x)
    np.testing.assert_allclose(inputs.T @ rows.dz[0], joined, rtol=1e-9)
    assert not layer.is_gradient and bool(layer.differs())


def test_results_take_the_place_of_updates():
    params, x, y = problem(6, 4, 2, bias=True)
    layers, layer, _ = record(squared_error, params, (x, y))
    assert layer.is_gradient and not layer.differs()
    joined = jnp.arange(10.0).reshape(1, 5, 2)
    new = layers.replaced({"w": cqjax.Matrices.parted(joined, has_bias=True)})
    np.testing.assert_array_equal(new["w"], joined[0, :4])
    np.testing.assert_array_equal(new["b"], joined[0, 4])
    np.testing.assert_array_equal(cqjax.Matrices.parted(joined, False).joined, joined)
