"""The tables of rates, against the supplement's formulas and what is true of any network."""

import jax
import numpy as np
import pytest
from judged_experiment import refused

from experiments import rates
from experiments.__main__ import main
from experiments.models import LeNet, ResNet


@pytest.fixture
def tables(tmp_path, capsys, monkeypatch):
    """Runs the experiment: the cells of each table, as they were written in Markdown."""

    def run(*options, **networks):
        monkeypatch.setattr(rates, "NETWORKS", networks)
        main(["rates", f"--output={tmp_path}", "--networks", *networks, *options])
        printed, written = capsys.readouterr().out, (tmp_path / "rates.md").read_text()
        result = {}
        for table in written.split("## ")[1:]:
            title, _, *lines = table.strip().splitlines()
            assert title in printed
            cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            assert cells[0][:5] == ["layer", "kernel", "s", "m", "rate"]
            assert cells[0][5:] == (["m measured"] if "from the weights" in title else [])
            for row in cells[2:]:
                assert " ".join(row).split() in [line.split() for line in printed.splitlines()]
            result[title] = cells[2:]
        return result

    return run


def test_lenet_has_the_supplements_rates(tables):
    rows = tables("--seed=3", "--batch-size=2", lenet=("LeNet", LeNet()))[
        "LeNet, m from the weights"
    ]
    params = LeNet().init(jax.random.key(3), np.zeros((1, 32, 32, 3)))["params"]
    square = {name: float((layer["kernel"] ** 2).sum()) for name, layer in params.items()}
    m = [1.0]  # then below fc3 and normalisation, below fc2 and normalisation, ...
    m.append(m[-1] * square["fc3"] / 84 / (square["fc2"] / 84))
    m.append(m[-1] * square["fc2"] / 120 / (square["fc1"] / 120))
    m.append(m[-1] * square["fc1"] / 400 / (square["cv2"] / 16))
    m.append(m[-1] * square["cv2"] / 6 / (196 / 25) / (square["cv1"] / 6))
    names, s = ["cv1", "cv2", "fc1", "fc2", "fc3"], [196, 25, 1, 1, 1]
    assert [row[0] for row in rows] == names
    assert [row[1] for row in rows][::4] == ["5 × 5 × 3 × 6", "84 × 10"]
    assert [int(row[2]) for row in rows] == s
    np.testing.assert_allclose([float(row[3]) for row in rows], m[::-1], rtol=6e-3)
    expected = 1 / (np.array(m[::-1]) * s)
    np.testing.assert_allclose([float(row[4]) for row in rows], expected, rtol=6e-3)


def test_a_residual_networks_factors_are_measured(tables):
    network = ("A residual network", ResNet(8, width=2))
    (rows,) = tables("--batch-size=4", resnet20=network).values()
    assert [row[0] for row in rows][::7] == ["conv", "fc"] and len(rows) == 8
    assert [int(row[2].replace(",", "")) for row in rows] == [1024] * 3 + [256] * 2 + [64] * 2 + [1]
    assert rows[-1][3:] == ["1", "1"]
    for row in rows:
        s, m, rate = (float(cell.replace(",", "")) for cell in row[2:])
        assert m > 0 and rate == pytest.approx(1 / (m * s), rel=1e-2)


def test_bad_options(capsys):
    message = refused(["rates", "--batch-size", "0"], capsys)
    assert "--batch-size must be at least 1, got 0" in message
