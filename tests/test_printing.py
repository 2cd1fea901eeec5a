"""What is read at a prompt: signatures, plans and captures."""

import inspect
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import cqjax

FUNCTIONS = [name for name in cqjax.__all__ if inspect.isfunction(getattr(cqjax, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_as_written(name):
    """No alias is spelled out: `optax.ScalarOrSchedule` alone would be a union of nine types."""
    for parameter in inspect.signature(getattr(cqjax, name)).parameters.values():
        assert isinstance(parameter.annotation, str) and len(parameter.annotation) < 60, parameter


def test_all_names_are_there():
    assert dir(cqjax) == sorted(cqjax.__all__)
    assert len(set(cqjax.__all__)) == len(cqjax.__all__)
    for name in cqjax.__all__:
        assert hasattr(cqjax, name), name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        cqjax.absent  # noqa: B018


def network(name):
    """Parameters under this name, one of them not covered, and a loss."""
    params = {name: {"w": jnp.ones((8, 4)), "b": jnp.zeros(4), "gain": jnp.ones(4)}}

    def loss_fn(params, x):
        layer = params[name]
        return jnp.mean(((x @ layer["w"] + layer["b"]) * layer["gain"]) ** 2)

    return loss_fn, params, jnp.ones((32, 8))


@pytest.mark.parametrize("length", [4, 30, 60, 90])
def test_a_plan_fits_a_hundred_columns(length):
    """Each path is in one piece, notes stand beside it or below."""
    name = "n" * length
    loss_fn, params, x = network(name)
    plan = cqjax.plan(loss_fn)(params, x)
    text = str(plan)
    assert max(map(len, text.splitlines())) <= 100
    for path in ("w", "b", "gain"):
        assert f"{name}/{path}" in text
    words = " ".join(text.split())
    assert "uncovered: enters `mul`, which is no matrix product" in words
    assert f"bias of {name}/w" in words
    row = next(line for line in text.splitlines() if "primal" in line).split()
    assert row[-6:-1] == ["1", "32", "8", "4", "primal"]


def test_captures_print_as_a_table():
    loss_fn, params, x = network("net")
    _, _, captures = cqjax.value_and_grad(loss_fn, capture=cqjax.Rows)(params, x)
    header, _, line = str(captures).splitlines()
    assert header.split() == ["weight", "bias", "sites", "captured"]
    captured = "Rows: x float32[1,32,8], dz float32[1,32,4], h float32[1,32]"
    assert line.split() == ["net/w", "net/b", "1", *captured.split()]
    (capture,) = captures["net/w"]
    assert repr(capture).startswith("Capture(net/w, net/b: Rows: x float32[1,32,8]")
    # a tree of something else, and tracers
    assert "net/w" in str(jax.tree.map(lambda leaf: None, captures))
    jax.jit(lambda captures: print(captures))(captures)


WITHOUT_FLAX = """
import sys
sys.modules["flax"] = None
import json
import jax, jax.numpy as jnp
import cqjax

def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2)

params = {"w1": jnp.ones((3, 5)) / 3, "w2": jnp.ones((5, 1))}
x, y = jnp.eye(4, 3), jnp.ones((4, 1))
loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x, y)
tx = cqjax.cadam()
updates, _ = tx.update(grads, tx.init(params), params, captures=captures)
messages = []
for name in ("nnx", "training"):
    try:
        getattr(cqjax, name)
    except ModuleNotFoundError as error:
        messages.append(str(error))
print(json.dumps([updates["w1"].shape, sorted(captures), messages]))
"""


def test_plain_jax_needs_no_flax():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLAX], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    shape, covered, messages = json.loads(done.stdout)
    assert shape == [3, 5] and covered == ["w1", "w2"]
    for name, message in zip(("nnx", "training"), messages, strict=True):
        assert message.startswith(f"cqjax.{name} needs Flax (")
        assert message.endswith("pip install 'cqjax[flax]'")


def test_flax_is_imported_by_who_uses_it():
    code = (
        "import cqjax, sys; print('flax' in sys.modules); cqjax.nnx; print('flax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
