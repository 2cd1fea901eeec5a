"""The page of claims, and the options that are behind it."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import options, report
from experiments.page import Claim, Page, before, count, judge, markdown, median, spread
from experiments.pages import contests, protocol


@dataclass(frozen=True)
class Some:
    preset: options.Preset = "cpu"
    steps: int | None = None
    rates: tuple[float, ...] = (0.5,)
    fast: bool = False
    output: Path = Path("results")
    resume: bool = False


PRESETS = {"smoke": {"steps": 3}, "cpu": {"steps": 30}, "paper": {"steps": 300}}


@pytest.mark.parametrize(("preset", "steps"), [("smoke", 3), ("cpu", 30), ("paper", 300)])
def test_a_preset_fills_what_is_not_given(preset, steps):
    assert options.filled(Some(preset), PRESETS) == Some(preset, steps)
    assert options.filled(Some(preset, 7), PRESETS) == Some(preset, 7)


def test_the_command_has_what_is_not_the_default():
    assert options.command("some", Some()) == "python -m experiments some"
    given = Some("paper", 5, (0.1, 0.2), True, Path("here"), resume=True)
    assert options.command("some", given) == (
        "python -m experiments some --preset paper --steps 5 --rates 0.1 0.2 --fast --output here"
    )


def test_whether_a_claim_holds():
    assert judge(True, True) == "yes"
    assert judge(True, False) == "partly"
    assert judge(False, False) == "no"
    with pytest.raises(ValueError, match="nothing"):
        judge()


def test_numbers_in_words():
    nan = float("nan")
    assert median([3, None, 1, nan, 2]) == 3 and median([1, None, nan]) == float("inf")
    assert spread([3, 1, None]) == "3 [1, ∞]" and spread([2, 2]) == "2"
    assert spread([0.25, 0.5, 0.125], ".0%") == "25% [12%, 50%]" and count(12345.6) == "12,346"
    assert before(1, 2) and before(1, None)
    assert not before(2, 1) and not before(None, 1) and not before(None, None)


def written(*behind):
    page = Page(
        title="A title",
        source="A paper, section 3",
        summary="Something was done.",
        behind=behind,
        claims=[
            Claim("section 3.1", "it is a|b", "1 of 2", "partly"),
            Claim("section 3.2", "it is fast", "3 s", "no"),
        ],
        choices=["A rate was taken."],
        tables={"Numbers": [{"method": "ours", "steps": "7"}]},
        figures={"it.png": "A caption."},
    )
    content = {
        "settings": {"rates": [0.1, 0.2], "steps": 3},
        "command": "python -m x",
        "environment": report.environment(),
    }
    return markdown(page, content)


def test_the_page_says_first_where_our_method_loses_and_what_holds():
    page = written("At 0.1 it loses.", "At 0.2, too.")
    parts = [
        "# A title",
        "Source: A paper, section 3.",
        "## Does it hold?",
        "**Where our method loses.** At 0.1 it loses. At 0.2, too.",
        "| it is a\\|b (section 3.1) | 1 of 2 | **partly** |",
        "| it is fast (section 3.2) | 3 s | **no** |",
        "## What was done",
        "Something was done.",
        "![A caption.](it.png)",
        "## Numbers",
        "| ours | 7 |",
        "- A rate was taken.",
        "python -m x",
        "(results.json)",
        "rates `0.1 0.2`, steps `3`",
        f"jax {report.environment()['versions']['jax']}",
    ]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)


def test_or_that_it_loses_nowhere():
    assert "**Where our method loses.** Nowhere, in what was measured here." in written()


def test_the_page_says_what_diverged_and_ran_again():
    tuning = [{"rate": rate, "validation_loss": rate} for rate in (0.1, 0.03, 0.3)]
    again = {
        "rate": 0.03,
        "tuning": tuning,
        "role": "ours",
        "diverged": [{"rate": 0.3}, {"rate": 0.1}],
    }
    well = {"rate": 0.3, "tuning": tuning, "role": "baseline"}
    held = {
        "effort": {"steps": 9, "tuning_steps": 3, "seeds": 1},
        "entrants": {"A": again, "B": well},
    }
    results = {"dataset": {"name": "digits"}, "contests": {"": held}}
    settings = SimpleNamespace(tries=3, epochs=1, batch_size=2)
    said = protocol.words(settings, results)
    assert "made again at the best of its lower rates: A's at 0.3 and 0.1, then at 0.03." in said
    assert [row["chosen"] for row in contests.tuning(held["entrants"])] == [
        "0.3, which diverged; then 0.1, which diverged; then 0.03 (at the grid's edge)",
        "0.3 (at the grid's edge)",
    ]
    held |= {"entrants": {"B": well}, "variants": {"A, changed": again}}
    assert "A, changed's at 0.3 and 0.1, then at 0.03." in protocol.words(settings, results)
    del held["variants"]
    assert "again" not in protocol.words(settings, results)
    assert "one at each rate of its grid; the rate" in protocol.words(settings, results)
    more = well | {"tuning": tuning + [{"rate": 1.0, "validation_loss": 2.0}]}
    few, many = contests.tuning({"A": well, "B": more})
    assert list(few) == list(many) and (few["rate 4"], many["rate 4"]) == ("–", "1: 2.0000")
    held["effort"]["extensions"] = 2
    assert "grid, and up to 2 more beyond it while the best" in protocol.words(settings, results)
    assert "no more steps" not in protocol.words(settings, results)
    curve = {"step": [2, 4, 6], "seconds": [1.0, 2.0, 2.0], "value": [3.0, 4e9, None]}
    history = {"compile_seconds": 1.0, "train_seconds": 2.0, "batch_loss": curve, "metrics": {}}
    well["runs"] = [{"seed": 1, "history": history}]
    assert "what it was at first: B at 0.3 after 4." in protocol.words(settings, results)
    held["converted"] = {"A 0.1, tuning": 1.2, "A 0.1, seed 1": 1.2, "A 0.1, seed 2": 1.2}
    held["converted"]["B 0.3, seed 1"] = 1.549
    assert "over what it took there: A 0.1 by 1.20, B 0.3 by 1.55." in protocol.words(
        settings, results
    )


def test_the_page_says_on_how_many_of_the_cores_it_was_measured():
    its = report.environment() | {"cpu_count": 64, "cores": 1}
    assert "64 cores, of which this had 1)" in report.machine(its)
    assert "64 cores)" in report.machine(its | {"cores": 64})
    del its["cores"], its["xla_flags"], its["glibc_tunables"]  # as on pages from before them
    assert "64 cores)" in report.machine(its)


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "GLIBC_TUNABLES"])
def test_the_page_says_which_variables_steps_were_timed_with(monkeypatch, variable):
    monkeypatch.setenv(variable, "--some=1")
    assert f", {variable}=--some=1" in report.machine(report.environment())
    monkeypatch.delenv(variable)
    assert variable not in report.machine(report.environment())
