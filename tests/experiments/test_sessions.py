"""What a session of an experiment keeps, what the next one makes of it, and what it refuses."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from judged_experiment import refused, untimed

from experiments import checkpoints
from experiments.__main__ import main
from experiments.history import Curve, History
from experiments.training import State

STEPS, STOP = 20, 7
QUICKSTART = (
    "quickstart --dataset=digits --width=8 --depth=1 --batch-size=8 --optimizers adam sgd "
    f"--steps={STEPS} --checkpoint-seconds=0"
).split()
NARROW = (
    "lenet --preset=smoke --dataset=cifar10 --channels 2 3 --hidden 8 6 --batch-size=20 --tries=1 "
    f"--seeds=1 --epochs={STEPS / 9} --tuning-epochs={STEPS / 9} --checkpoint-seconds=0"
).split()

CONTEST = (
    "mlp --preset=smoke --width=8 --depth=1 --optimizers sgd csgd --seeds=1 --epochs=0.1 "
    "--sgd-rates 0.2 0.3 --checkpoint-seconds=0"
).split()


@pytest.fixture(autouse=True, scope="module")
def hasty():
    """Compiling is most of the tests' time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Stopped(Exception):
    """Stands in for whatever ends a process early."""


@pytest.fixture
def stopped(monkeypatch):
    """Runs an experiment until a number of chunks, of all training runs together, is done."""

    def run(command, chunks):
        keep, done = checkpoints.Run.keep, []

        def keep_and_stop(*args, **kwargs):
            if len(done) == chunks:
                raise Stopped
            keep(*args, **kwargs)
            done.append(None)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(checkpoints.Run, "keep", keep_and_stop)
            main(command)

    return run


def numbers(output, *ignored):
    """The results, and the metrics' lines, without what is ignored."""

    def without(value):
        match value:
            case dict():
                return {k: without(v) for k, v in value.items() if not set(ignored) & {k, "*"}}
            case list():
                return [without(item) for item in value]
        return value

    lines = (output / "metrics.jsonl").read_text().splitlines()
    results = json.loads((output / "results.json").read_text())["results"]
    return without([results, [json.loads(line) for line in lines]])


def seconds(content):
    """The seconds of each run of the first contest, by label."""
    found = {}
    for name, each in content["results"]["contests"]["no decay"]["entrants"].items():
        (tuning,), (run,) = each["tuning"], each["runs"]
        found[f"no decay: {name} {tuning['rate']:g}, tuning"] = tuning["seconds"]
        found[f"no decay: {name} {each['rate']:g}, seed {run['seed']}"] = run["seconds"]
    return found


TIMED = ("seconds", "seconds_with_compilation", "train_seconds", "compile_seconds")


@pytest.mark.parametrize("experiment", ["quickstart", "lenet", "mlp"])
def test_stopped_and_resumed_is_run_at_once(
    experiment, stopped, cifar10_folder, tmp_path, capsys, monkeypatch
):
    """Twice, also where training diverges, and with batch normalisation's averages."""
    monkeypatch.setattr("experiments.pipeline.measure", untimed)
    command = {
        "quickstart": [*QUICKSTART, "--sgd-learning-rate=1e30"],
        "lenet": [*NARROW, f"--data-dir={cifar10_folder}"],
        "mlp": CONTEST,
    }[experiment]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*command, f"--output={whole}", "--checkpoint-seconds=1000"])
    capsys.readouterr()
    part = [*command, f"--output={parts}", "--resume"]
    stopped(part, STOP)
    stopped(part, STEPS + 2)
    main(part)
    printed = capsys.readouterr().out
    first, second = {
        "quickstart": ("Adam", "SGD"),
        "lenet": ("no decay: SGD 0.1, tuning", "no decay: back-matching 0.02, tuning"),
        "mlp": ("SGD 0.2, tuning", "SGD 0.3, tuning"),
    }[experiment]
    for line in (f"{first}: resumed after {STOP - 1} steps", f"{first}: finished before"):
        assert line in printed
    assert re.search(rf"{second}: resumed after \d+ steps", printed)
    assert numbers(parts, *TIMED) == numbers(whole, *TIMED)
    if experiment == "quickstart":
        assert (
            json.loads((whole / "results.json").read_text())["results"]["sgd"]["train_loss"] is None
        )
    assert not list(parts.rglob("*state*"))


def test_what_is_finished_is_not_run_again(tmp_path, capsys):
    """Not even its seconds change. What was never begun is."""
    command = [*QUICKSTART, f"--output={tmp_path}"]
    main([*command, "--resume"])
    assert "finished before" not in capsys.readouterr().out
    before, metrics = numbers(tmp_path), (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "losses.png").unlink()
    (tmp_path / "metrics.jsonl").write_text(metrics + metrics[:30])
    main([*command, "--resume"])
    assert capsys.readouterr().out.count("finished before") == 2
    assert numbers(tmp_path) == before
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    assert (tmp_path / "losses.png").exists()
    main(command)
    assert "finished before" not in capsys.readouterr().out
    assert numbers(tmp_path) != before


def test_other_settings_are_refused_or_start_afresh(stopped, tmp_path, capsys, monkeypatch):
    command = [*QUICKSTART, f"--output={tmp_path}"]
    stopped(command, STOP)
    message = refused([*command, "--resume", "--seed=1", "--width=9"], capsys)
    assert f"{tmp_path}/checkpoints is of other settings" in message
    assert "seed was 0 and is 1; width was 8 and is 9" in message
    assert "Leave out --resume to start afresh, or name another --output" in message
    with monkeypatch.context() as patch:
        patch.setattr("experiments.data.Dataset.digest", lambda self: "other examples")
        assert "data was " in refused([*command, "--resume"], capsys)
        patch.undo()
        patch.setattr("jax.__version__", "0.1")
        patch.setattr("experiments.report.version", lambda package: "0.1")
        assert "versions was " in refused([*command, "--resume"], capsys)
    harmless = ["--resume", "--checkpoint-seconds=9", "--dataset=digits"]
    stopped([*command, *harmless], 2)
    assert f"Adam: resumed after {STOP - 1} steps" in capsys.readouterr().out
    main([*command, "--seed=1"])
    assert "resumed" not in capsys.readouterr().out
    main([*command, "--seed=1", "--resume"])
    assert capsys.readouterr().out.count("finished before") == 2


@pytest.mark.parametrize("item", ["state", "history"])
def test_a_damaged_checkpoint_is_named(stopped, tmp_path, capsys, item):
    command = [*QUICKSTART, f"--output={tmp_path}"]
    stopped(command, STOP)
    folder = tmp_path / "checkpoints" / "0-Adam"
    for path in (folder / str(STOP - 1) / item).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])
    message = refused([*command, "--resume"], capsys)
    assert f"error: the checkpoint in {folder} cannot be read" in message
    assert "Remove this folder to start the run afresh" in message


DAMAGED = (
    b"",
    b"\xff\0",
    b"{",
    b"{}",
    b"[1]",
    b"[" * 100_000,
    b'{"metrics": {}, "batch_loss": {"step": [1, 2], "value": ["a"]}}',
)


@pytest.mark.parametrize("name", ["settings.json", f"0-Adam/{STOP - 1}/history/metadata"])
def test_damaged_files_of_a_session_are_named(stopped, tmp_path, capsys, name):
    command = [*QUICKSTART, f"--output={tmp_path}"]
    stopped(command, STOP)
    path = tmp_path / "checkpoints" / name
    for content in DAMAGED:
        path.write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*command, "--resume"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "eave out --resume to start" in line
        assert str(tmp_path / "checkpoints") in line


def session(output, seconds):
    return checkpoints.Session(
        output, {"settings": None}, resume=True, seconds=seconds, tensorboard=False
    )


def test_states_are_saved_as_often_as_asked(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock.now)
    state, history, saved = State({"w": np.arange(3.0)}, {}, ()), History(), []
    with session(tmp_path, 10) as opened:
        run = opened.run(0, "a/b c", 8)
        for step in range(1, 9):
            clock.now += 4
            history.batch_loss.add(step, 0.1 * step, float("nan"))
            run.keep(state, history, finished=False)
            saved.append([int(path.name) for path in (tmp_path / "checkpoints/0-a-b-c").iterdir()])
    assert saved == [[], [], [3], [3], [3], [6], [6], [6]]
    with session(tmp_path, 10) as opened:
        run = opened.run(0, "a/b c", 8)
        restored = run.history()
        assert restored.steps == 6 and np.isnan(restored.batch_loss.value).all()
        np.testing.assert_array_equal(run.state(state).params["w"], np.arange(3.0))
        run.keep(state, history, finished=True)
    with session(tmp_path, 10) as opened:
        assert opened.run(0, "a/b c", 8).history().steps == 8
        assert opened.run(1, "a/b c", 8).history() == History()


def test_evaluations_are_by_step():
    history = History(metrics={"loss": Curve([0, 5], [0.0, 0.2], [3.0, 1.0])})
    history.metrics["accuracy"] = Curve([5], [0.2], [0.5])
    assert history.evaluations() == [
        (0, 0.0, {"loss": 3.0}),
        (5, 0.2, {"loss": 1.0, "accuracy": 0.5}),
    ]
    assert History.of(json.loads(json.dumps(vars(history), default=vars))) == history


def test_tensorboard_gets_every_evaluation_once(stopped, tmp_path, monkeypatch):
    points = {}

    class SummaryWriter:
        def __init__(self, folder):
            points[folder] = []
            self.add = points[folder].append

        def add_scalar(self, metric, value, step):
            self.add((metric, value, step))

        def flush(self):
            self.add("flush")

        def close(self):
            self.add("close")

    module = SimpleNamespace(SummaryWriter=SummaryWriter, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    command = [*QUICKSTART, f"--output={tmp_path}", "--tensorboard", "--resume"]
    stopped(command, STOP)
    (tmp_path / "tensorboard" / "Adam").mkdir(parents=True)
    (tmp_path / "tensorboard" / "Adam" / "events").touch()
    main(command)
    assert not (tmp_path / "tensorboard").exists()  # the writer above writes nothing
    for label in ("Adam", "SGD"):
        got = points[str(tmp_path / "tensorboard" / label)]
        expected = []
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
            if line["run"] == label:
                metrics = {k: v for k, v in line.items() if k not in ("run", "step", "seconds")}
                expected += [(k, v, line["step"]) for k, v in metrics.items()] + ["flush"]
        assert got == [*expected, "close"]


def test_tensorboard_missing_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = refused([*QUICKSTART, "--tensorboard"], capsys)
    assert "--tensorboard needs tensorboardX, which is missing" in message


def test_bad_options(capsys):
    message = refused([*QUICKSTART, "--checkpoint-seconds=-1"], capsys)
    assert "--checkpoint-seconds must be finite and not negative, got -1" in message


def test_a_page_of_what_is_finished(stopped, cifar10_folder, tmp_path, capsys, monkeypatch):
    """Of two contests with four runs each: of none; of the first; of both."""
    timed = []

    def measure(*args):
        timed.append(args[1])
        return untimed(*args)

    monkeypatch.setattr("experiments.pipeline.measure", measure)
    command = [*NARROW, f"--data-dir={cifar10_folder}", f"--output={tmp_path}"]
    stopped(command, 3 * (STEPS + 1))
    assert "no contest is finished" in refused([*command, "--only-finished"], capsys)
    stopped([*command, "--resume"], 2 * (STEPS + 1) + 3)
    main([*command, "--only-finished"])
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["results"]["contests"]) == ["no decay"]
    (begun,) = content["results"]["begun"]["decay 5e-4"]["begun"]
    assert (begun["entrant"], begun["seed"]) == ("SGD", None)
    assert "only-finished" not in content["command"] and len(content["claims"]) == 6
    page = (tmp_path / "README.md").read_text()
    assert "**Not finished when this page was made**: the contest decay 5e-4." in page
    assert timed == ["no decay: ", "decay 5e-4: "]  # by the first of the four sessions alone
    capsys.readouterr()
    before = numbers(tmp_path, *TIMED, "converted")[0]["contests"]["no decay"]
    measured = seconds(content)
    assert content["results"]["contests"]["no decay"]["converted"] == {}
    shutil.rmtree(tmp_path / "checkpoints")  # there is the page alone to go on from
    main([*command, "--resume"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(": finished before") == 5
    assert "decay 5e-4: back-matching 0.02, seed 1: 8 of 8 runs are finished" in printed
    content = json.loads((tmp_path / "results.json").read_text())
    after = numbers(tmp_path, *TIMED, "converted")[0]["contests"]["no decay"]
    assert after == before
    converted = content["results"]["contests"]["no decay"]["converted"]
    assert len(converted) == 4 and seconds(content) == pytest.approx(
        {run: measured[run] * ratio for run, ratio in converted.items()}, rel=1e-5
    )
    # A step "takes" a second. An entrant has a tuning run and another, of as many steps.
    assert all(STEPS / 2 < each < STEPS * 2 for each in seconds(content).values())
    page = (tmp_path / "README.md").read_text()
    first = next(iter(converted))
    assert f"{first.rpartition(', ')[0]} by {converted[first]:.2f}" in page
    shutil.rmtree(tmp_path / "checkpoints")
    main([*command, "--resume"])  # on the same machine nothing is converted again
    again = json.loads((tmp_path / "results.json").read_text())
    assert seconds(again) == pytest.approx(seconds(content), rel=1e-5)
    assert again["results"]["contests"]["no decay"]["converted"] == pytest.approx(converted)
    assert list(content["results"]["contests"]) == ["no decay", "decay 5e-4"]
    assert content["results"]["unfinished"] == [] and len(content["claims"]) == 6
    shutil.rmtree(tmp_path / "checkpoints")
    capsys.readouterr()
    main([*command, "--resume", "--measured=9"])  # of other settings nothing is taken
    assert ": finished before" not in capsys.readouterr().out


def test_a_damaged_page_is_named_and_so_are_damaged_times(
    cifar10_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("experiments.pipeline.measure", untimed)
    (tmp_path / "results.json").write_text('{"results": 3')
    command = [*NARROW, f"--data-dir={cifar10_folder}", f"--output={tmp_path}", "--resume"]
    assert "results.json cannot be read" in refused(command, capsys)
    (tmp_path / "checkpoints" / "times.json").write_text('{"no decay')
    assert "times.json cannot be read" in refused(command, capsys)
