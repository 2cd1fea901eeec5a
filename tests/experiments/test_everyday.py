"""The contest on everyday work, run small: each kind's N and metrics against NumPy, the page."""

import __future__

import io
from contextlib import redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
from judged_experiment import check_figure, check_page, refused, run, untimed

import cqjax
from experiments import data
from experiments.contest import _evaluation
from experiments.everyday import entrants, sources
from experiments.everyday.experiment import KINDS, TUNED, Everyday
from experiments.everyday.work import ALL, PACES, Size
from experiments.page import median
from experiments.pages import everyday as pages

SIZE = Size(0.03, 8, 20_000, 32, 400, 100)
NAMES = ["Adam", "Nesterov", "Muon", "C-SGD", "C-Nesterov", "C-Muon", "C-Adam"]
UNTUNED = ["C-Adam, untuned", "C-Adam, defaults"]
HELD = ["tabular", "mlp"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def work(kind):
    return ALL[kind](SIZE, data.load("digits", None, download=False))


@pytest.fixture(scope="module")
def start(work):
    return work.task.start(3)


def losses(kind, outputs, targets):
    """What the loss's mean runs over, in NumPy."""
    outputs = np.asarray(outputs, np.float64)
    if kind in ("coordinates", "tabular"):
        return ((outputs - targets) ** 2).sum(axis=-1)
    if kind == "autoencoder":
        each = np.log1p(np.exp(-np.abs(outputs))) + outputs.clip(min=0) - outputs * targets
        return each.sum(axis=-1)
    normal = np.log(np.exp(outputs).sum(axis=-1))
    return normal - np.take_along_axis(outputs, targets[..., None], axis=-1)[..., 0]


def scores(kind, outputs, targets):
    """What the score's mean runs over, in NumPy."""
    outputs = np.asarray(outputs, np.float64)
    if kind in ("coordinates", "tabular"):
        return ((outputs - targets) ** 2).sum(axis=-1)
    if kind == "autoencoder":
        return (1 / (1 + np.exp(-outputs)) - targets) ** 2
    return outputs.argmax(axis=-1) == targets


def test_n_is_the_number_of_terms_that_the_mean_runs_over(kind, work, start):
    params, state = start
    size = PACES[kind].batch_size
    x, y = (array[:size] for array in work.task.parts.train)
    training = {"train": True, "mutable": ["batch_stats"]} if kind == "cnn" else {}
    outputs = work.task.model.apply({"params": params, **state}, x, **training)
    terms = losses(kind, outputs[0] if training else outputs, y)
    loss, _ = work.loss_fn(params, state, x, y)
    assert float(loss) * work.terms == pytest.approx(terms.sum(), rel=1e-5)
    assert terms.size == work.terms == size * (64 if kind == "language" else 1)
    inferred = cqjax.plan(work.loss_fn, has_aux=True)(params, state, x, y).batch_size
    assert inferred == work.terms


def test_metrics_are_those_of_their_parts(kind, work, start):
    params, state = start
    _, validating, metrics = _evaluation(work.task, 50)
    train, validation, test = work.task.parts
    variables = {"params": params, **state}
    of = {
        "train_loss": (losses, [array[:50] for array in train]),
        "validation_loss": (losses, validation),
        work.task.score: (scores, test),
    }
    assert list(metrics) == list(of) and list(validating) == ["validation_loss"]
    right = kind in ("language", "cnn", "mlp")
    assert work.task.score == ("test_accuracy" if right else "test_error")
    for name, (values, (x, y)) in of.items():
        expected = values(kind, work.task.model.apply(variables, x), y).mean()
        assert metrics[name](params, state) == pytest.approx(expected, rel=1e-4)


def test_parts_share_no_example(kind, work):
    parts = work.task.parts
    if kind == "coordinates":
        places = [tuple(place) for part in parts for place in np.float64(part.images).tolist()]
        assert len(set(places)) == len(places)
    assert len(parts.validation.labels) <= 100 and len(parts.test.labels) <= 100
    assert len(parts.train.labels) >= PACES[kind].batch_size


def test_the_text_is_that_of_the_standard_library():
    symbols = sources.text(500)
    whole = Path(__future__.__file__).read_text()[:500]
    ours = ["�" if at == sources.SYMBOLS - 1 else sources.PRINTABLE[at] for at in symbols]
    for mine, its in zip(ours, whole, strict=True):
        assert mine == its or (mine == "�" and its not in sources.PRINTABLE)
    parts = sources.sequences(20_000, 64)
    for x, y in parts:
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def test_a_position_sees_only_the_past():
    work = ALL["language"](SIZE, data.load("digits", None, download=False))
    params, _ = work.task.start(0)
    x = work.task.parts.train.images[:1]
    other = x.copy()
    other[0, 40:] = (other[0, 40:] + 1) % sources.SYMBOLS
    first, second = (work.task.model.apply({"params": params}, each)[0] for each in (x, other))
    np.testing.assert_allclose(first[:40], second[:40], rtol=1e-5, atol=1e-6)
    assert not np.allclose(first[40], second[40])


def test_the_table_is_standardised_by_what_is_trained_on():
    train, validation, _ = sources.table(2000)
    for array in train:
        np.testing.assert_allclose(array.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(array.std(axis=0), 1, rtol=1e-4)
    assert abs(validation.images.mean(axis=0)).max() > 1e-3
    assert abs(np.corrcoef(train.images.T) - np.eye(32)).max() > 0.3
    assert abs(train.images).max() > 8  # the normal distribution has no such value


def test_what_is_left_to_adam(kind, work, start):
    params, _ = start
    axes = jax.tree.leaves_with_path(
        entrants.matrices(params), is_leaf=lambda leaf: leaf is None or hasattr(leaf, "_fields")
    )
    shapes = dict(jax.tree.leaves_with_path(params))
    names = {jax.tree_util.keystr(keys, simple=True, separator="/"): its for keys, its in axes}
    for (keys, its), name in zip(axes, names, strict=True):
        hidden = name.endswith("kernel") and "head" not in name and "first" not in name
        assert (its is not None) == hidden
        if its:
            both = (*its.reduction_axis, *its.output_axis)
            assert both == tuple(range(shapes[keys].ndim))
    if kind == "language":
        block = "TransformerBlock_0/MultiHeadDotProductAttention_0"
        assert names[f"{block}/query/kernel"] == ((0,), (1, 2))
        assert names[f"{block}/out/kernel"] == ((0, 1), (2,))
    if kind == "cnn":
        assert names["Conv_0/kernel"] == ((0, 1, 2), (3,))


def test_the_schedule_rises_and_falls_and_uncovered_parameters_have_adams_rate():
    """Of the language model: after the warm-up C-Adam's steps are as long as the rates say."""
    work = ALL["language"](SIZE._replace(length=1.0), data.load("digits", None, download=False))
    grids = dict.fromkeys(TUNED, (0.1,))
    by_name = {entrant.name: entrant for entrant in entrants.everyone(work, grids)}
    params, state = work.task.start(0)
    x, y = (array[:16] for array in work.task.parts.train)
    optimizer, _ = by_name["C-Adam"].at(1e-3, 1e-4)
    differentiate = cqjax.value_and_grad(work.loss_fn, has_aux=True, batch_size=work.terms)
    _, grads, captures = jax.jit(differentiate)(params, state, x, y)
    opt_state, lengths = optimizer.init(params), []

    @jax.jit
    def update(opt_state):
        return optimizer.update(grads, opt_state, params, captures=captures)

    for _ in range(16):
        updates, opt_state = update(opt_state)
        lengths.append({k: np.abs(v).max() for k, v in updates.items() if k == "positions"})
        lengths[-1]["head"] = np.abs(updates["head"]["kernel"]).max()
    assert lengths[0]["head"] == 0  # 15 of 300 steps of warm-up
    assert lengths[6]["head"] == pytest.approx(1e-3 * 6 / 15, rel=1e-2)
    assert lengths[15]["head"] == pytest.approx(1e-3, rel=1e-2)
    uncovered = cqjax.plan(work.loss_fn, has_aux=True, batch_size=work.terms)(params, state, x, y)
    rate = 1e-4 if "positions" in uncovered.uncovered() else 1e-3
    assert lengths[15]["positions"] == pytest.approx(rate, rel=1e-2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON file, the page, the folder, what was printed."""
    folder = tmp_path_factory.mktemp("everyday")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("experiments.pipeline.measure", untimed)
        jax.config.update("jax_disable_most_optimizations", True)
        content, page = run("everyday", folder, "--kinds", *HELD)
        jax.config.update("jax_disable_most_optimizations", False)
    return content, page, folder, printed.getvalue()


def test_all_have_the_same_grids_and_run_alike(ran):
    for kind, contest in ran[0]["results"]["contests"].items():
        assert list(contest["entrants"]) == NAMES + UNTUNED
        steps = contest["effort"]["steps"]
        assert steps == contest["effort"]["tuning_steps"] == round(0.03 * PACES[kind].steps)
        for name, entrant in contest["entrants"].items():
            tried = {at["rate"]: at["validation_loss"] for at in entrant["tuning"]}
            if name in UNTUNED:
                assert not tried and entrant["rate"] == 0.01
                continue
            first = getattr(Everyday, f"{name.lower().replace('-', '')}_rates")[:2]
            assert list(tried)[:2] == list(first)
            at_edge = min(first, key=tried.get)  # of two rates, each is at an edge
            further = at_edge / 3.2 if at_edge == min(first) else at_edge * 3.2
            assert list(tried)[2] == pytest.approx(further, rel=0.1) and len(tried) == 3
            assert entrant["rate"] == min(tried, key=tried.get)
        starts = {
            run["history"]["metrics"]["train_loss"]["value"][0]
            for entrant in contest["entrants"].values()
            for run in entrant["runs"]
        }
        assert len(starts) == 1


def test_runs_of_an_entrant_share_a_program(ran):
    for contest in ran[0]["results"]["contests"].values():
        for name, entrant in contest["entrants"].items():
            seconds = {at["compile_seconds"] for at in entrant["tuning"]}
            seconds |= {run["history"]["compile_seconds"] for run in entrant["runs"]}
            assert len(seconds) == 1, name
        tuned, untuned = (contest["entrants"][n]["runs"][0] for n in ("C-Adam", UNTUNED[0]))
        compiling = [run["history"]["compile_seconds"] for run in (tuned, untuned)]
        assert compiling[0] == compiling[1]


def test_the_page_and_the_figures(ran):
    content, page, folder, printed = ran
    check_page(content, page, claims=3)
    assert all(claim["holds"] == "open" for claim in content["claims"])
    assert "take `relative_damping=1`, weight decay, or fewer steps" in page
    for file in ("steps.png", "seconds.png"):
        check_figure(folder / file, panels=2)
    check_figure(folder / "front.png", panels=4, least=(250, 300))
    assert "60/60 runs" in printed
    contest = content["results"]["contests"]["mlp"]
    ends = {
        n: median([run["validation_loss"] for run in e["runs"]])
        for n, e in contest["entrants"].items()
    }
    (behind,) = (line for line in content["behind"] if line.startswith("mlp, C-Adam: "))
    lost = behind.partition("; training loss")[0]
    for name in ("Adam", "Nesterov", "Muon"):
        assert (f"{name} " in lost and "validation" in lost) == (ends[name] < ends["C-Adam"])


def outcome(validation, share, untuned, finite=True):
    """A contest in which Adam ends with the validation loss 1 after 100 steps."""

    def entrant(loss, step, role):
        to = {"step": step, "seconds": step / 10, "seconds_with_compilation": step / 10 + 1}
        curve = {"step": [0, 50, 100], "seconds": [0.0, 5.0, 10.0], "value": [2.0, 0.5, loss]}
        one = {
            "steps": 100,
            "seconds": 10.0,
            "seconds_with_compilation": 11.0,
            "train_loss": 1.0,
            "validation_loss": loss,
            "test_error": 1.0,
            "to_target": to,
            "compile_seconds": 1.0,
            "history": {
                "compile_seconds": 1.0,
                "batch_loss": curve,
                "metrics": {"train_loss": curve, "validation_loss": curve},
            },
        }
        return {"role": role, "rate": 0.01, "tuning": [], "runs": [one]}

    entrants_ = {
        "Adam": entrant(1.0, 100, "baseline"),
        "Muon": entrant(0.95, 70, "other"),
        "C-Adam": entrant(validation, 100 * share, "ours"),
        UNTUNED[0]: entrant(untuned if finite else None, 50, "untuned"),
    }
    effort = {"steps": 100, "batch_size": 4, "seeds": 1}
    target = {"entrant": "Adam", "train_loss": 1.0}
    seconds = dict.fromkeys(entrants_, 0.1)
    return {
        "entrants": entrants_,
        "effort": effort,
        "target": target,
        "seconds_per_step": seconds,
    }


@pytest.mark.parametrize(
    ("ahead", "soon", "untuned", "finite", "verdicts"),
    [
        (5, 4, 3, True, ["yes", "yes", "yes"]),
        (4, 3, 2, True, ["no", "no", "partly"]),
        (6, 6, 6, False, ["yes", "yes", "partly"]),
    ],
)
def test_verdicts(ahead, soon, untuned, finite, verdicts):
    held = {
        kind: outcome(
            0.9 if number < ahead else 1.1,
            0.6 if number < soon else 0.61,
            0.9 if number < untuned else 1.1,
            finite or number > 0,
        )
        for number, kind in enumerate(KINDS)
    }
    results = {"contests": held, "dataset": {"name": "Fashion-MNIST"}}
    settings = Everyday().filled()
    page = pages.page(settings, results)
    assert [claim.holds for claim in page.claims] == verdicts
    lost = "mlp, C-Adam: validation loss 1.1 (better: Muon 0.95, Adam 1)"
    assert any(line.startswith(lost) for line in page.behind) == (ahead < 6)
    assert any("validation loss is lowest after 50 steps" in choice for choice in page.choices)


BAD_OPTIONS = {
    "--kinds mlp mlp": "none twice",
    "--adam-rates 0.1 0.1": "--adam-rates must be at least --tries, 2, different rates",
    "--length=0": "--length must be positive",
    "--extensions=-1": "--extensions must be finite and not negative",
    "--rows=0": "--rows must be at least 1",
    "--rows=50 --kinds tabular": "--batch-size 64 is more than the 40 training",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(options, capsys, tmp_path):
    command = ["everyday", "--preset=smoke", f"--output={tmp_path}", *options.split()]
    assert BAD_OPTIONS[options] in refused(command, capsys)


def test_presets_are_whole():
    for preset in ("cpu", "paper"):
        settings = Everyday(preset=preset).filled()
        missing = [name for name, value in vars(settings).items() if value is None]
        assert missing == ["data_dir"] and settings.seeds >= 3 and settings.kinds == KINDS
