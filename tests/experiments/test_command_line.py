"""What the command line says of bad options, locks, Ctrl-C, and terminals that know ASCII alone."""

import ast
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from judged_experiment import refused

import experiments
from experiments import locks
from experiments.__main__ import EXPERIMENTS, main
from experiments.index import Index
from experiments.locks import InUseError, claimed
from experiments.quickstart import Quickstart


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("quickstart --seed=-1", "--seed must be at least 0, got -1"),
        (f"quickstart --seed={10**20}", f"--seed must be at most 2,147,483,647, got {10**20}"),
        (f"rates --seed={10**20}", "--seed must be at most"),
        ("mlp --epochs=1e300", "--epochs must be at most 10,000, got 1e+300"),
        ("mlp --epochs=nan", "--epochs must be positive and finite, got nan"),
        (f"quickstart --steps={10**14}", "--steps must be at most 10,000,000"),
        ("everyday --length=1e300", "--length must be at most 10,000"),
    ],
)
def test_numbers_that_cannot_be_meant(command, complaint, capsys):
    assert complaint in refused(command.split(), capsys)


def test_the_second_run_in_a_folder_says_who_has_it(tmp_path, capsys):
    with claimed(tmp_path):
        message = refused(["quickstart", f"--output={tmp_path}"], capsys)
        assert f"error: {tmp_path} is in use by another run (pid {os.getpid()}, " in message
        assert f"host {socket.gethostname()}, since 2" in message
        assert "wait for it, stop it, or name another --output" in message
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path):
        pass


def holder(**changed):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = {"pid": ended.pid, "host": socket.gethostname(), "since": "yesterday"}
    return json.dumps(stale | changed)


@pytest.mark.parametrize("system", ["with locks", "without locks"])
@pytest.mark.parametrize("content", ["of a dead process", "empty", "damaged"])
def test_a_stale_lock_is_taken_over(tmp_path, monkeypatch, system, content):
    if system == "without locks":
        monkeypatch.setattr(locks, "fcntl", None)
    text = {"of a dead process": holder(), "empty": "", "damaged": "\0["}[content]
    (tmp_path / locks.LOCK).write_text(text, encoding="utf-8")
    with claimed(tmp_path):
        assert json.loads((tmp_path / locks.LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()


@pytest.mark.parametrize("changed", [{"pid": os.getpid()}, {"host": "elsewhere"}])
def test_where_the_system_has_no_locks_the_file_is_one(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / locks.LOCK).write_text(holder(**changed), encoding="utf-8")
    with pytest.raises(InUseError, match="If that run is no more, remove .*lock"):
        with claimed(tmp_path):
            pass


def interrupted(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 130
    return capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    for kind in (Quickstart, Index):
        monkeypatch.setattr(kind, "run", interrupt)
    folder = tmp_path / "my results"
    assert interrupted(["quickstart", "--seed=3", f"--output={folder}"], capsys) == (
        f"stopped; to go on: python -m experiments quickstart --seed 3 --output '{folder}' "
        "--resume\n"
    )
    assert interrupted(["index"], capsys) == "stopped\n"


def test_a_terminal_that_knows_ascii_alone(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    monkeypatch.setattr(Index, "run", lambda self: print("λ = 1"))
    main(["index"])
    assert written.getvalue() == b"? = 1\n"


def test_files_do_not_depend_on_the_locale():
    """Each text file names its encoding."""
    for path in Path(*experiments.__path__).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("read_text", "write_text"):
                    assert "encoding" in [word.arg for word in node.keywords], (path, node.lineno)


@pytest.mark.parametrize("name", [n for n, kind in EXPERIMENTS.items() if hasattr(kind, "presets")])
def test_the_preset_for_hours_leaves_no_option_without_a_value(name):
    missing = {
        preset: {
            option
            for option, value in vars(EXPERIMENTS[name](preset=preset).filled()).items()
            if value is None
        }
        for preset in ("paper", "long")
    }
    assert missing["long"] <= missing["paper"]
