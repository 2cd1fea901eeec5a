"""The documents' code runs as pasted, and what the README says beside it is so."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


DOCUMENTS = (
    README,
    ROOT / "docs" / "choosing.md",
    ROOT / "docs" / "composition.md",
    ROOT / "docs" / "coverage.md",
    ROOT / "docs" / "diagnostics.md",
    ROOT / "docs" / "speed.md",
)


@pytest.fixture(scope="module")
def names():
    """What the README's first block defines: the session that all others go on with."""
    names = {}
    exec(compile(blocks(README)[0], str(README), "exec"), names)
    return names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_runs(path, names):
    """All blocks of a document, one after the other."""
    session = dict(names)
    for code in blocks(path)[path == README :]:
        exec(compile(code, str(path), "exec"), session)


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_example(names):
    assert names["loss"] < 1e-4


@pytest.mark.parametrize(
    ("rule", "rates", "least"),
    [
        (optax.sgd, (0.03, 0.05, 0.1, 0.15, 0.2), 500),
        (optax.adam, (0.003, 0.01, 0.03, 0.1), 95),
    ],
)
def test_others_take_longer(names, rule, rates, least):
    """At the best of these rates; SGD diverges at twice the highest."""
    x, y, k1, k2 = (names[name] for name in ("x", "y", "k1", "k2"))
    initial = {
        "w1": jax.random.normal(k1, (8, 64)) / 2,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(k2, (64, 1)) / 8,
        "b2": jnp.zeros(1),
    }

    @jax.jit
    def losses(rate):
        tx = rule(rate)

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(names["loss_fn"])(params, x, y)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (initial, tx.init(initial)), length=700)[1]

    curves = list(map(losses, rates))
    reached = [int(jnp.argmax(curve < 1e-4)) for curve in curves if jnp.any(curve < 1e-4)]
    assert min(reached) > least
    if rule is optax.sgd:
        assert not jnp.isfinite(losses(0.4)[-1])
