"""docs/extending.md: its code runs, and its K-FAC is that of NumPy."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"
DAMPING = 0.3

pytestmark = pytest.mark.usefixtures("float64")


def blocks():
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def document():
    """The names that its definitions make: all but the last block, which trains."""
    names = {}
    for block in blocks()[:-1]:
        exec(block, names)
    return names


def test_it_trains(capsys):
    names = {}
    with jax.enable_x64(False):
        exec("\n".join(blocks()), names)
    assert float(names["loss"]) < 0.02
    assert capsys.readouterr().out


def kfac(x, dz, gradient):
    """(XᵀX / N + √λ I)⁻¹ G (N Z̄ᵀZ̄ + √λ I)⁻¹, of rows with the bias among them."""
    n, root = len(x), np.sqrt(DAMPING)
    inputs = sum(np.outer(row, row) for row in x) / n + root * np.eye(x.shape[1])
    outputs = n * sum(np.outer(row, row) for row in dz) + root * np.eye(dz.shape[1])
    return np.linalg.inv(inputs) @ gradient @ np.linalg.inv(outputs)


def loss(params, x, y):
    return 0.5 * jnp.mean(jnp.sum((x @ params["w"] + params["b"] - y) ** 2, -1))


def in_a_loop(params, x, y):
    """The same in three microbatches."""

    def body(total, batch):
        return total + loss(params, *batch), None

    parts = jax.tree.map(lambda a: a.reshape(3, -1, *a.shape[1:]), (x, y))
    return jax.lax.scan(body, 0.0, parts)[0] / 3


@pytest.mark.parametrize("loss_fn", [loss, in_a_loop])
def test_k_fac_is_that_of_numpy(document, loss_fn):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(12, 4)), rng.normal(size=(12, 3)), rng.normal(size=(4, 3))
    params = {"w": jnp.asarray(w), "b": jnp.asarray(rng.normal(size=3))}
    tx = document["scale_by_kfac"](DAMPING)
    differentiate = cqjax.value_and_grad(loss_fn, capture=document["Factors"])
    _, grads, captures = jax.jit(differentiate)(params, x, y)
    updates, _ = tx.update(grads, tx.init(params), params, captures=captures)
    rows = np.concatenate([x, np.ones((12, 1))], 1)
    dz = (x @ w + np.asarray(params["b"]) - y) / 12
    want = kfac(rows, dz, rows.T @ dz)
    np.testing.assert_allclose(updates["w"], want[:-1], rtol=1e-9)
    np.testing.assert_allclose(updates["b"], want[-1], rtol=1e-9)


def test_consequentialism_takes_the_same_captures(document):
    """Its statistic defines the second moment."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(12, 3))
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    tx = optax.chain(
        cqjax.scale_by_consequentialism(damping=DAMPING, relative_damping=0.0), optax.sgd(1.0)
    )
    found = []
    for capture in (document["Factors"], cqjax.Gram):
        _, grads, captures = cqjax.value_and_grad(loss, capture=capture)(params, x, y)
        found.append(tx.update(grads, tx.init(params), params, captures=captures)[0])
    np.testing.assert_allclose(found[0]["w"], found[1]["w"], rtol=1e-9)
