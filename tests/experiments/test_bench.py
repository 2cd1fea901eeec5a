"""The benchmarks run small: all tables, all numbers, bars judged. What they say of time is not for
tests."""

import json
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judged_experiment import refused

import cqjax
from experiments.__main__ import main
from experiments.benchmarks import (
    accelerator,
    against_adam,
    bench,
    choice,
    kfac,
    patch_gram,
    peers,
    steps,
    timing,
    workloads,
)
from experiments.benchmarks.networks import ActorCritic, ScannedLanguage
from experiments.everyday.networks import Language
from experiments.models import MLP, ResNet, TransformerBlock
from experiments.training import capturing_step

TINY = {
    "mlp-32": workloads.WORKLOADS["mlp-32"]._replace(model=MLP(8, 1, 10), inputs=(4, 12)),
    "resnet20": workloads.WORKLOADS["resnet20"]._replace(
        model=ResNet(2, width=4, batch_norm=False), inputs=(4, 8, 8, 3)
    ),
}
REGRESSION = TINY["mlp-32"]._replace(model=MLP(8, 1, 12), regression=True)
TRANSFORMER = workloads.WORKLOADS["transformer"]._replace(
    model=TransformerBlock(2), inputs=(2, 4, 8)
)


AGAINST_ADAM = {
    "dense": against_adam.Row(
        lambda: against_adam.images(MLP(8, 1, 10), 4, 12), compiling=2, step=1.5
    ),
    "screens": against_adam.Row(
        lambda: against_adam.screens(ActorCritic(hidden=4), 1, 84, 84, 1), compiling=4
    ),
}


def small_language(blocks, scanned=False):
    kind = ScannedLanguage if scanned else Language
    return kind(against_adam.SYMBOLS, 8, blocks, heads=1)


@pytest.fixture(autouse=True, scope="module")
def hasty():
    """Compiling is most of the tests' time: less thoroughly, and nothing twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def broken(task, compiles):
    raise ValueError("too many | values\nto unpack")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Parts of each kind at small sizes, Adam broken, K-FAC-JAX missing: the JSON, the Markdown."""
    output = tmp_path_factory.mktemp("bench") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        for name, workload in TINY.items():
            patch.setitem(bench.PARTS, name, partial(steps.measure, name, workload))
        patch.setattr(kfac, "installed", lambda: False)
        patch.setitem(peers.PEERS, workloads.ADAM, broken)
        patch.setattr(against_adam, "ROWS", AGAINST_ADAM)
        patch.setattr(against_adam, "DEPTHS", (1,))
        patch.setattr(against_adam, "_language", small_language)
        patch.setattr(accelerator, "ROWS", {"first": AGAINST_ADAM["dense"], "later": None})
        patch.setattr(accelerator, "LONGEST", 0.0)
        patch.setattr(choice, "ROWS", (8,))
        patch.setattr(choice, "FEATURES", (6,))
        patch.setattr(patch_gram, "BATCH", 2)
        patch.setattr(patch_gram, "SHAPES", {(6, 6, 2): 1e9})
        names = [*TINY, "against-adam", "scale", "patch-gram", "choice", "accelerator"]
        sizes = ["--repeats=3", "--compiles=1", "--budget=0.01"]
        main(["bench", "--parts", *names, *sizes, f"--output={output}"])
    return json.loads((output / "bench.json").read_text()), (output / "bench.md").read_text()


def row(text, label):
    """The cells of the first row of that name, of each table that has one."""
    lines = [line.replace(r"\|", "¦").strip("| ").split(" | ") for line in text.splitlines()]
    return next(line for line in lines if line[0] == label)


def test_every_optimizer_has_its_numbers(run):
    results, text = run
    for part, workload in TINY.items():
        optimizers = results["parts"][part]["optimizers"]
        assert set(optimizers) == {*peers.COMMON, *workload.peers}
        for label, numbers in optimizers.items():
            assert label in text
            if "failed" in numbers:
                assert label in (workloads.ADAM, workloads.KFAC)
                continue
            for key in ("ratio", "seconds"):
                low, high = numbers[key]["quartiles"]
                assert 0 < low <= numbers[key]["median"] <= high
                assert numbers[key]["samples"] == 3
            assert numbers["compile_seconds"] > 0 and numbers["compile_ratio"] > 0
            assert numbers["temporary_bytes"] > 0 and numbers["temporary_ratio"] > 0
            assert numbers["entry_instructions"] > 0 and np.isfinite(numbers["loss"])
            assert numbers["fallbacks"] == 0
            if label in steps.PERIODIC:
                assert numbers["steps_per_sample"] == timing.PERIOD
        assert optimizers["SGD"]["ratio"]["median"] == optimizers["SGD"]["compile_ratio"] == 1


def test_who_fails_is_reported_with_the_reason(run):
    results, text = run
    optimizers = results["parts"]["mlp-32"]["optimizers"]
    assert optimizers[workloads.ADAM] == {"failed": "ValueError: too many | values"}
    assert row(text, workloads.ADAM)[1] == "ValueError: too many ¦ values"
    assert row(text, workloads.KFAC)[1] == "not installed (pip install 'cqjax[bench]')"


def test_an_accelerators_steps_are_counted_and_profiled(run):
    results, text = run
    numbers = results["parts"]["accelerator"]
    first = numbers["first"]
    assert first["step"]["median"] > 0 and set(first["seconds"]) == {"Adam", "C-Adam"}
    adam, ours = first["launches"]
    assert 0 < adam < ours
    assert first["profile"] and all(value > 0 for value in first["profile"].values())
    assert numbers["later"] is None and row(text, "later: no time was left")[1] == "–"


def test_gram_and_choice_have_their_numbers(run):
    results, text = run
    numbers = results["parts"]["patch-gram"]["6×6×2"]
    for how in ("alone", "interleaved"):
        assert numbers[how]["ratio"]["median"] > 0
        assert set(numbers[how]["seconds"]) == {"cqjax", "patches"}
    assert all(size > 0 for size in numbers["temporary_bytes"].values())
    (numbers,) = results["parts"]["choice"]["combinations"]
    assert (numbers["rows"], numbers["features"]) == (8, 6)
    seconds = {solver: numbers["seconds"][solver]["median"] for solver in choice.SOLVERS}
    assert numbers["choice"] in seconds and numbers["loss"] >= 1
    assert row(text, "8")[1] == f"{numbers['choice']} +{numbers['loss'] - 1:.0%}"


def test_c_adam_is_compared_with_adam(run):
    results, text = run
    found = results["parts"]["against-adam"]
    assert set(found) == set(AGAINST_ADAM)
    for title, numbers in {**found, **results["parts"]["scale"]}.items():
        spent = numbers["processor_seconds"]
        totals = [sum(spent[name].values()) for name in ("C-Adam", "Adam")]
        assert set(spent["Adam"]) == set(timing.PHASES)
        assert numbers["compiling"] == pytest.approx(totals[0] / totals[1])
        assert row(text, title)[2] == f"{numbers['compiling']:.2f}"
    assert found["dense"]["step"]["samples"] == 3 and "step" not in found["screens"]
    assert set(results["parts"]["scale"]) == {"1 layers", "1 layers by nn.scan"}


@pytest.mark.parametrize("title", against_adam.ROWS)
def test_every_row_can_be_traced(title):
    """At its own size; only shapes are computed."""

    def loss():
        work = against_adam.ROWS[title].make()
        return work.loss_fn(*work.start, *work.batch)[0]

    assert jax.eval_shape(loss) == jax.ShapeDtypeStruct((), jnp.float32)


def test_every_bar_is_judged(run):
    results, text = run
    bars = {bar["work"]: bar for bar in results["bars"]}
    mlp, resnet = (workload.title for workload in TINY.values())
    csgd, every_10 = workloads.CSGD, workloads.EVERY_10
    compiling, memory = ", trace and compile time", ", temporary memory"
    gram = "patch Gram, 3×3 SAME, batch 2, 6×6×2: times faster than patches, "
    expected = {
        f"{mlp}: {csgd}": 1.15,
        f"{mlp}: {csgd}{compiling}": 2,
        f"{resnet}: {csgd}": 2,
        f"{resnet}: {every_10}": 1.2,
        f"{resnet}: {csgd}{memory}": 1.25,
        f"{resnet}: {csgd}{compiling}": 2,
        f"{resnet}: {every_10}{compiling}": 2,
        "dense: C-Adam to Adam, a step": 1.5,
        "dense: C-Adam to Adam, trace, lower and compile": 2,
        "screens: C-Adam to Adam, trace, lower and compile": 4,
        **{f"{gram}{how}": 1e9 for how in ("alone", "interleaved")},
    }
    assert expected.items() <= {work: bar["limit"] for work, bar in bars.items()}.items()
    (last,) = bars.keys() - expected
    assert last.startswith("automatic primal/dual choice") and bars[last]["limit"] == 1.1
    for work, bar in bars.items():
        verdict = row(text, work)[3]
        assert (verdict == "yes") == bar["held"]
    assert not bars[f"{gram}alone"]["held"]


def test_the_environment_is_told(run):
    results, text = run
    environment = results["environment"]
    assert set(environment["versions"]) == {"jax", "jaxlib", "flax", "optax", "numpy"}
    for value in (environment["cpu"], environment["date"], environment["device"], jax.__version__):
        assert value in text
    assert results["settings"]["repeats"] == 3


def test_a_combination_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(choice, "ROWS", (4,))
    monkeypatch.setattr(choice, "FEATURES", (3,))
    monkeypatch.setattr(choice, "SLOW", 0.0)
    result = choice.measure("choice", timing.Effort(1, 1.0, 1))
    assert result.numbers["combinations"][0]["left_out"] == "dual takes 0.0 s"
    assert "not timed: dual takes" in result.tables[0].rows[0]["d = 3"]
    (bar,) = result.bars
    assert not bar.held and bar.work.endswith("nothing was measured")


def test_the_workloads_are_the_issues():
    shapes = {}
    for name, workload in workloads.WORKLOADS.items():
        inputs = jax.ShapeDtypeStruct(workload.inputs, jnp.float32)
        variables = jax.eval_shape(workload.model.init, jax.random.key(0), inputs)
        assert list(variables) == ["params"]
        shapes[name] = workload.inputs, sum(p.size for p in jax.tree.leaves(variables))

    def mlp(width):
        return 784 * width + width + 7 * (width * width + width) + 10 * width + 10

    d = 512
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    channels = [3, *7 * [16], *6 * [32], *6 * [64]]
    resnet = 9 * sum(np.multiply(channels[:-1], channels[1:])) + 64 * 10
    assert shapes == {
        "mlp-32": ((32, 784), mlp(800)),
        "mlp-128": ((128, 784), mlp(800)),
        "mlp-512": ((512, 784), mlp(800)),
        "mlp-1600": ((32, 784), mlp(1600)),
        "resnet20": ((128, 32, 32, 3), resnet),
        "transformer": ((8, 512, 512), block),
    }


def one_step(workload, label):
    stepper = peers.PEERS[label](workloads.task(workload), 1)
    stepper()
    return stepper


def test_the_patch_route_is_another_way_to_the_same(monkeypatch):
    monkeypatch.setattr(peers, "RATE", 0.1)
    ours, theirs = (one_step(TINY["resnet20"], label) for label in ("C-SGD", workloads.PATCHES))
    for one, other in zip(*map(jax.tree.leaves, (ours.state, theirs.state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert ours.program.entry_instructions != theirs.program.entry_instructions


def test_pinv_is_c_sgd_without_damping(monkeypatch):
    monkeypatch.setattr(peers, "RATE", 0.5)
    stepper = one_step(TINY["mlp-32"], workloads.PINV)
    task, tx = (
        workloads.task(TINY["mlp-32"]),
        cqjax.csgd(0.5, damping=1e-6, relative_damping=0.0, max_change=None),
    )
    csgd = timing.Training(capturing_step(task.loss_fn, tx), tx.init, task.start, task.batch)
    csgd()
    both = (jax.tree.leaves(training.state.params) for training in (stepper, csgd))
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


class Optimizer:
    """Stands in for K-FAC-JAX's, as far as the benchmark calls it: it is SGD."""

    def __init__(self, value_and_grad_func, l2_reg, num_burnin_steps):
        assert l2_reg == num_burnin_steps == 0
        self.differentiate = jax.jit(value_and_grad_func)

    def init(self, params, rng, batch):
        return 0

    def step(self, params, state, rng, batch, learning_rate, momentum, damping):
        loss, grads = self.differentiate(params, batch)
        params = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
        return params, state, {"loss": loss}


@pytest.mark.parametrize("workload", [TINY["mlp-32"], REGRESSION], ids=["classes", "targets"])
def test_k_fac_is_timed_where_it_works(workload, monkeypatch):
    registered = []
    module = SimpleNamespace(
        Optimizer=Optimizer,
        __spec__=ModuleSpec("kfac_jax", None),
        register_softmax_cross_entropy_loss=lambda *_: registered.append("cross-entropy"),
        register_squared_error_loss=lambda *_, weight: registered.append("squared error"),
    )
    monkeypatch.setitem(sys.modules, "kfac_jax", module)
    stepper, sgd = (one_step(workload, label) for label in (workloads.KFAC, workloads.SGD))
    assert set(registered) == {"squared error" if workload.regression else "cross-entropy"}
    assert stepper.program.compile_seconds >= 0 and stepper.program.temporary_bytes is None
    sgd()
    sgd()  # K-FAC-JAX's first two steps tell how long it compiles
    assert float(stepper.loss) == pytest.approx(float(sgd.loss), rel=1e-5)


@pytest.mark.parametrize("label", [workloads.MUON, workloads.CSGD, workloads.EVERY_10])
def test_the_transformers_step_can_be_traced(label, monkeypatch):
    monkeypatch.setattr(timing, "compiled", lambda f, *args, **_: jax.eval_shape(f, *args))
    training = peers.PEERS[label](workloads.task(TRANSFORMER), 1)
    params = jax.tree.map(jnp.shape, training.state.params)
    assert jax.tree.map(jnp.shape, training.program[0].params) == params


BAD_OPTIONS = {
    "--repeats=0": "--repeats must be at least 1, got 0",
    "--compiles=0": "--compiles must be at least 1, got 0",
    "--budget=0": "--budget must be positive and finite, got 0",
    "--budget=inf": "--budget must be positive and finite, got inf",
    "--parts": "--parts must have at least one",
    "--parts choice choice": "none twice",
    "--parts lunch": "lunch",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, capsys):
    assert BAD_OPTIONS[options] in refused(["bench", *options.split()], capsys)
