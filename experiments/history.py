"""How a training run went: its losses and metrics, by steps and seconds."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


@dataclass
class Curve:
    """The values of a metric, with the steps done and the seconds that these took."""

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)

    def add(self, step: int, seconds: float, value: float) -> None:
        """Append a point."""
        self.step.append(step)
        self.seconds.append(seconds)
        self.value.append(value)

    def first_at_most(self, value: float) -> tuple[int, float] | None:
        """Step and seconds of the first point with a value not above this, if there is one."""
        points = zip(self.step, self.seconds, self.value, strict=True)
        return next(((step, seconds) for step, seconds, at in points if at <= value), None)


def _curve(stored: Mapping[str, Any]) -> Curve:
    curve = Curve(**stored)
    curve.value = [math.nan if value is None else value for value in curve.value]  # as in JSON
    for numbers in zip(curve.step, curve.seconds, curve.value, strict=True):
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("a curve has something else than numbers")
    return curve


class Evaluation(NamedTuple):
    """The metrics after some steps."""

    step: int
    seconds: float
    values: dict[str, float]


@dataclass
class History:
    """How a training run went. Seconds count training only: no compilation, no evaluation."""

    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    batch_loss: Curve = field(default_factory=Curve)
    """Each value is the mean over the batches since the point before."""
    metrics: dict[str, Curve] = field(default_factory=dict)
    """Metrics that are evaluated during the run, from step 0, or only at its end."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "History":
        """The history, from what `dataclasses.asdict` made of it; of anything else, an error."""
        metrics = {name: _curve(curve) for name, curve in stored["metrics"].items()}
        curves = {"batch_loss": _curve(stored["batch_loss"]), "metrics": metrics}
        return cls(**{**stored, **curves})

    @property
    def steps(self) -> int:
        """The steps done."""
        return self.batch_loss.step[-1] if self.batch_loss.step else 0

    @property
    def taken(self) -> int:
        """The steps that took time: fewer than those done if the run was lost."""
        seconds = self.batch_loss.seconds
        return self.batch_loss.step[seconds.index(seconds[-1])] if seconds else 0

    def evaluations(self) -> list[Evaluation]:
        """The metrics by steps."""
        by_step: dict[int, Evaluation] = {}
        for name, curve in self.metrics.items():
            for step, seconds, value in zip(curve.step, curve.seconds, curve.value, strict=True):
                by_step.setdefault(step, Evaluation(step, seconds, {})).values[name] = value
        return list(by_step.values())

    def last(self, metric: str) -> float:
        """The last value of a metric."""
        return self.metrics[metric].value[-1]

    def summary(self) -> dict[str, Any]:
        """The numbers at the end, and the whole history, to be stored."""
        return {
            "steps": self.steps,
            "seconds": self.train_seconds,
            "seconds_with_compilation": self.compile_seconds + self.train_seconds,
            **{metric: self.last(metric) for metric in self.metrics},
            "history": asdict(self),
        }
