"""The quick start's table and figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import drawing
from experiments.training import History

LABELS = {"sgd": "SGD", "adam": "Adam", "csgd": "C-SGD"}
# Paul Tol's high-contrast colours: told apart by colour-blind readers and in grey.
STYLES = (("#004488", "o"), ("#DDAA33", "s"), ("#BB5566", "^"))
AGAINST = {"step": "steps", "seconds": "training time in seconds, without compilation"}


def summaries(histories: Mapping[str, History]) -> dict[str, dict[str, Any]]:
    """The numbers of each optimizer, as they go into the JSON file."""
    target = histories["sgd"].last("train_loss") if "sgd" in histories else None
    results = {name: history.summary() for name, history in histories.items()}
    if target is not None:
        for name, history in histories.items():
            reached = history.metrics["train_loss"].first_at_most(target)
            reached = reached and {"step": reached[0], "seconds": reached[1]}
            results[name]["reaches_sgd_loss"] = reached
    return results


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row of the table for each optimizer."""
    return [_row(LABELS[name], result) for name, result in results.items()]


def _row(label: str, result: Mapping[str, Any]) -> dict[str, str]:
    row = {
        "optimizer": label,
        "steps": f"{result['steps']:,}",
        "seconds": f"{result['seconds']:.1f}",
        "with\ncompiling": f"{result['seconds_with_compilation']:.1f}",
        "training\nloss": f"{result['train_loss']:.4f}",
        "test\naccuracy": f"{result['test_accuracy']:.2%}",
    }
    if "reaches_sgd_loss" in result:
        reached = result["reaches_sgd_loss"]
        row["SGD's final loss\nreached after"] = (
            f"{reached['step']:,} steps, {reached['seconds']:.1f} s" if reached else "not reached"
        )
    return row


def draw(path: Path, title: str, images: int, lines: Mapping[str, History]) -> None:
    """Draw the training loss, by steps and by seconds.

    Args:
      path: The picture.
      title: Stands over it.
      images: How many the training loss is that of.
      lines: How the training went, by the label of its line.
    """
    figure, panels = drawing.panels(1, 2, (5.5, 4.8))
    for axes, (against, words) in zip(panels, AGAINST.items(), strict=True):
        for (label, history), (colour, marker) in zip(lines.items(), STYLES, strict=False):
            faint, curve = history.batch_loss, history.metrics["train_loss"]
            axes.plot(getattr(faint, against), faint.value, color=colour, alpha=0.3, linewidth=1)
            line = {"color": colour, "marker": marker, "markersize": 4.5, "label": label}
            axes.plot(getattr(curve, against), curve.value, **line)
        axes.set(xlim=(0, None), xlabel=words)
        drawing.logarithmic(axes)
    first, second = panels
    second.sharey(first)
    second.tick_params(labelleft=False)
    first.set_ylabel("training loss (cross-entropy, log scale)")
    note = f"{images:,} training images;\nfaint: batches, averaged"
    first.legend(title=note, title_fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
