"""Each row of the table in docs/devices.md: training on a mesh is training on one device."""

import pathlib

import jax
import numpy as np
import placements
import pytest

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
