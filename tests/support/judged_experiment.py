"""What the tests of the experiments with a page have in common."""

import json
import re
from typing import get_args

import matplotlib.image
import pytest

from experiments.__main__ import main
from experiments.page import Holds


def run(name, folder, *options):
    """Runs it in its smoke preset: the JSON file and the page."""
    main([name, "--preset=smoke", f"--output={folder}", *options])
    return json.loads((folder / "results.json").read_text()), (folder / "README.md").read_text()


def refused(arguments, capsys):
    """Runs an experiment that ends at once, with status 2 and a message: the message."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    message = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err)
    assert "Traceback" not in message
    return " ".join(message.split())


def check_page(content, page, claims):
    """All claims stand on the page, with their verdicts, and what is lost stands first."""
    assert len(content["claims"]) == claims
    for claim in content["claims"]:
        assert claim["holds"] in get_args(Holds)
        row = (
            f"| {claim['claim']} ({claim['source']}) | {claim['measured']} | **{claim['holds']}** |"
        )
        assert row in page
    lost = page[: page.index("## What was done")]
    assert all(line in lost for line in content["behind"])
    assert content["environment"]["versions"]["jax"] in page


def check_figure(path, panels, least=(350, 400)):
    """It is a picture of so many panels side by side, none of them empty or too small."""
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.shape[1] >= least[1] * panels and picture.shape[0] >= least[0]
    assert path.stat().st_size < 300_000
    width = picture.shape[1] // panels
    for panel in range(panels):
        part = picture[:, panel * width : (panel + 1) * width]
        assert (part.max(axis=-1) - part.min(axis=-1) > 0.2).sum() > 150  # coloured lines


def untimed(console, title, task, entrants, *args):
    """Stands in for `pipeline.measure`: to compile the steps would be most of a short session."""
    pipeline = {"entrant": "SGD", "seconds_with": 1.0, "seconds_without": 1.0, "share": 0.0}
    return {"seconds_per_step": {entrant.name: 1.0 for entrant in entrants}, "pipeline": pipeline}
