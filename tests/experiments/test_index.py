"""The overview of the experiments' pages is that of their results."""

import json
import re
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.index import overview
from experiments.page import write

COMMITTED = Path(__file__).parents[2] / "docs" / "experiments"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in COMMITTED.glob("*/*.json")))
def test_the_committed_pages_are_those_of_the_committed_results(name, tmp_path):
    folder = COMMITTED / name
    write(tmp_path, json.loads((folder / "results.json").read_text()))
    for file in ("README.md", "results.json"):
        assert (tmp_path / file).read_text() == (folder / file).read_text()
    figures = re.findall(r"]\((.*png)\)", (tmp_path / "README.md").read_text())
    assert figures and all((folder / figure).exists() for figure in figures)


def test_the_committed_overview_is_that_of_the_committed_results():
    assert (COMMITTED / "README.md").read_text() == overview(COMMITTED)


def test_claims_are_counted_and_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.index.write", lambda *_: None)
    """What b answers is open on a, and counted for b alone; on c, with other data, it is open."""
    holds = {"b": ["yes", "no", "yes"], "a": ["partly", "open"], "c": []}
    for name, verdicts in holds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"# Title of {name}\n\ntext\n")
        content = {
            "claims": [
                {"claim": f"{name}{number}", "source": "Fig. 1", "measured": "", "holds": verdict}
                for number, verdict in enumerate(verdicts)
            ],
            "behind": ["x"] * len(verdicts),
            "settings": {"preset": "cpu"},
            "environment": {"device": "TPU v5" if name == "a" else "cpu: cpu", "cpu_count": 2},
            "experiment": "x",
            "results": {"dataset": {"name": "other" if name == "c" else "same"}},
        }
        content["claims"].append(
            {"claim": "all", "source": "", "holds": "no" if name == "b" else "open"}
        )
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    main(["index", "--folder", str(tmp_path)])
    assert "README.md" in capsys.readouterr().out
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "| [a](a/README.md) | Title of a | 0 | 1 | 0 | 1 | 2 | cpu | TPU v5 |" in lines
    assert "| [b](b/README.md) | Title of b | 2 | 0 | 2 | 0 | 3 | cpu | 2 CPU cores |" in lines
    answers = [line for line in lines if "| all () |" in line]
    assert answers == ["| b | all () | **no** |", "| c | all () | **open** |"]
    assert [line for line in lines if "Fig. 1" in line] == [
        "| a | a0 (Fig. 1) | **partly** |",
        "| a | a1 (Fig. 1) | **open** |",
        "| b | b0 (Fig. 1) | **yes** |",
        "| b | b1 (Fig. 1) | **no** |",
        "| b | b2 (Fig. 1) | **yes** |",
    ]
