"""The journal of a training run as curves: its figures over steps.

A run that was killed resumes from a checkpoint and writes some steps again: what it wrote of them before does not count.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

Points = list[tuple[int, float]]
"""(step, value), by rising step."""


@dataclass(frozen=True)
class Curves:
    """``points`` of every figure by its name, how often the run ``resumed`` at an earlier step, and the number of ``broken``
    lines that were left out."""

    points: Mapping[str, Points] = field(default_factory=dict)
    resumed: int = 0
    broken: int = 0

    @classmethod
    def read(cls, lines: Iterable[bytes]) -> "Curves":
        """From the lines of ``metrics.jsonl``. A line that is not a JSON object with a ``step``, or that
        has an integer beyond any float, is left out and counted.

        A step has at most two lines, its losses first and its validation after them: where lines do not rise by step and
        kind, the run has gone back.
        """
        kept: list[tuple[tuple[int, bool], dict[str, float]]] = []
        resumed = broken = 0
        for line in lines:
            entry = _entry(line)
            if entry is None:
                broken += bool(line.strip())
                continue
            step, figures = entry
            position = step, "loss" not in figures
            resumed += bool(kept) and kept[-1][0] >= position
            while kept and kept[-1][0] >= position:
                kept.pop()
            kept.append((position, figures))
        points: dict[str, dict[int, float]] = {}
        for (step, _), figures in kept:
            for name, value in figures.items():
                points.setdefault(name, {})[step] = value  # both lines of a step have the seconds
        return cls({name: list(values.items()) for name, values in points.items()}, resumed, broken)

    def last(self, name: str) -> float | None:
        """The newest value of a figure; None if it has none."""
        return self.points[name][-1][1] if name in self.points else None

    @property
    def step(self) -> int:
        """The last step of any figure; 0 if there is none."""
        return max((points[-1][0] for points in self.points.values()), default=0)


def _entry(line: bytes) -> tuple[int, dict[str, float]] | None:
    try:
        entry: Any = json.loads(line)
        step = int(entry.pop("step"))
        figures = {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return step, {name: value for name, value in figures.items() if isfinite(value)}
