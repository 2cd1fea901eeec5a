"""One page about all experiments: which of their sources' claims hold."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from experiments import report
from experiments.page import Holds, write

INTRODUCTION = """\
Each experiment of the source documents has a page, with figures and, in its `results.json`, every
number. All run by `python -m experiments NAME`; `--help` tells the options. A claim holds if all
of its parts do, and partly if some do; it is open if the run was too short to tell. What one page
leaves open and another answers is counted there alone. The pages have the numbers. Each names first
where a method of this library loses; "ours loses" counts the sentences on that.

`--preset cpu`, the default, takes minutes of two CPU cores, and `--preset long` hours.
`--processes 2` shares the training runs out, one to a core. Whatever stops a run, the same command
with `--resume` goes on. With `--only-finished` it makes the page of what is finished; from that
page `--resume` goes on, too, where the checkpoints are gone, on a machine of the same kind, also a
slower or faster one. On a GPU, `python -m experiments paper --budget-minutes 25` takes the sources'
settings, one experiment after another, and goes on when it is called again."""


@dataclass(frozen=True)
class Index:
    """Write all experiments' pages again, from their results.json, and the overview of them."""

    folder: Path = Path("docs/experiments")
    """The folder of the experiments' folders. README.md goes there."""

    def run(self) -> None:
        """Write them."""
        for path in sorted(self.folder.glob("*/results.json")):
            write(path.parent, json.loads(path.read_text(encoding="utf-8")))
        (self.folder / "README.md").write_text(overview(self.folder), encoding="utf-8")
        Console().print(f"Written: {self.folder}/README.md", highlight=False, soft_wrap=True)


def overview(folder: Path) -> str:
    """The text of README.md.

    Args:
      folder: Has a folder for each experiment, with its README.md and results.json.

    Returns:
      A table of the experiments, and one of all claims.
    """
    experiments, claims = [], []
    pages = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/results.json"))
    }
    answered = {
        _question(content, claim)
        for content in pages.values()
        for claim in content["claims"]
        if claim["holds"] != "open"
    }
    for name, content in pages.items():
        judged = [
            claim
            for claim in content["claims"]
            if claim["holds"] != "open" or _question(content, claim) not in answered
        ]
        page = (folder / name / "README.md").read_text(encoding="utf-8")
        title = page.splitlines()[0].removeprefix("# ")
        holds = Counter(claim["holds"] for claim in judged)
        environment = content["environment"]
        device = environment["device"]
        if device.startswith("cpu"):
            device = f"{environment['cpu_count']} CPU cores"
        row = {
            "experiment": f"[{name}]({name}/README.md)",
            "": title,
            **{word: f"{holds[word]}" for word in get_args(Holds)},
            "ours loses": f"{len(content['behind'])}",
            "preset": content["settings"]["preset"],
            "measured on": device,
        }
        experiments.append(row)
        claims += [
            {
                "experiment": name,
                "the source": f"{claim['claim']} ({claim['source']})",
                "holds": f"**{claim['holds']}**",
            }
            for claim in judged
        ]
    parts = [
        "# Experiments",
        INTRODUCTION,
        report.markdown_table(experiments, align="---"),
        "## All claims",
        report.markdown_table(claims, align="---"),
    ]
    return "\n\n".join(parts) + "\n"


def _question(content: Any, claim: Any) -> tuple[Any, ...]:
    """What a claim is about: the same words on other data are another question."""
    data = content["results"].get("dataset", {}).get("name")
    return content["experiment"], data, claim["source"], claim["claim"]
