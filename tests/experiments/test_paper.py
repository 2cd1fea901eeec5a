"""The papers' presets one after another, within a time."""

import pytest

from experiments import paper
from experiments.__main__ import main


def row(text, name):
    """The table is printed last."""
    return [line for line in text.splitlines() if line.split()[:1] == [name]][-1]


def test_in_turn_until_the_time_is_over(tmp_path, capfd, monkeypatch):
    """The first is made of a script, and takes a second; the second is interrupted."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nif 'vgg' not in sys.argv: time.sleep(60)\nprint(*sys.argv[3:])\n"
    )
    monkeypatch.setattr(paper.sys, "executable", "python3")
    original = paper.subprocess.Popen

    def popen(command):
        assert command[:3] == ["python3", "-m", "experiments"]
        return original(["python3", str(script), *command[1:]])

    monkeypatch.setattr(paper.subprocess, "Popen", popen)
    main(["paper", "--budget-minutes=0.02", "--preset=smoke", f"--output={tmp_path}"])
    out = capfd.readouterr().out
    assert f"vgg --preset=smoke --resume --output={tmp_path}/vgg" in out
    assert "finished" in row(out, "vgg")
    assert "interrupted" in row(out, "resnet20")
    assert "no time was left" in row(out, "lenet") and "no time was left" in row(out, "mlp")


def test_who_fails_is_named(tmp_path, capfd):
    command = ["paper", "--experiments=lenet", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, f"--data-dir={tmp_path / 'nothing'}"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 1 and "error: " in err
    assert "failed with status 2" in row(out, "lenet")
