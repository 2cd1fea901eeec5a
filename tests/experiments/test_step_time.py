"""The table of step times has both optimizers; what it says of time is not for tests."""

import pytest

from experiments.__main__ import main


def test_table(capsys):
    main(["step-time", "--width", "8", "--depth", "1", "--repeats", "2", "--batch-size", "4"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    ratios = {row[0]: float(row[1]) for row in rows if row and row[0] in ("SGD", "C-SGD")}
    assert ratios["SGD"] == 1.0 and ratios["C-SGD"] > 0


def test_bad_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["step-time", "--repeats", "0"])
    assert "--repeats must be at least 1" in capsys.readouterr().err
