"""The journal of a training run as curves: figures over steps, and what the run has cost.

A run that was killed goes on from a checkpoint and tells some steps again: what it told of them before does not count.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

Points = list[tuple[int, float]]


"""(step, value), steps rising."""


@dataclass(frozen=True)
class Curves:
    """``points`` of every figure by its name; how often the run ``resumed`` at an earlier step; lines left out, ``broken``."""

    points: Mapping[str, Points] = field(default_factory=dict)
    resumed: int = 0
    broken: int = 0

    @classmethod
    def read(cls, lines: Iterable[bytes]) -> "Curves":
        """From the lines of ``metrics.jsonl``. What is no JSON object with a ``step`` is left out and counted.

        A step is told of twice at most, its losses first and its validation after them: a run that has gone back is one whose
        lines do not rise by step and kind.
        """
        kept: list[tuple[tuple[int, bool], dict[str, float]]] = []
        resumed = broken = 0
        for line in lines:
            entry = _entry(line)
            if entry is None:
                broken += bool(line.strip())
                continue
            step, figures = entry
            place = step, "loss" not in figures
            resumed += bool(kept) and kept[-1][0] >= place
            while kept and kept[-1][0] >= place:
                kept.pop()
            kept.append((place, figures))
        points: dict[str, dict[int, float]] = {}
        for (step, _), figures in kept:
            for name, value in figures.items():
                points.setdefault(name, {})[step] = value  # both lines of a step tell the seconds
        return cls({name: list(told.items()) for name, told in points.items()}, resumed, broken)

    def last(self, name: str) -> float | None:
        """The newest value, if there is any."""
        return self.points[name][-1][1] if name in self.points else None

    @property
    def step(self) -> int:
        """The last one that is told of; 0 if none is."""
        return max((told[-1][0] for told in self.points.values()), default=0)


def _entry(line: bytes) -> tuple[int, dict[str, float]] | None:
    try:
        entry: Any = json.loads(line)
        step = int(entry.pop("step"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return step, dict(_numbers(entry))


def _numbers(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in entry.items():
        if isinstance(value, int | float) and isfinite(value):
            yield name, float(value)
