"""Shared by all benchmarks: side-by-side timing, and the last line that says whether the bar is met.

A benchmark prints its table and ends with ``name: <figure> | bar <bar> | holds`` (or ``falls short``). Ratios are of runs in
the same process, in turns, so that other load on the machine affects both sides alike.
"""

import time
from collections.abc import Callable

import numpy as np


def side_by_side(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 15) -> tuple[float, float]:
    """Median seconds of a call of each, measured in turns after a warm-up."""
    slow(), fast()
    seconds = np.zeros((rounds, 2))
    for round_ in range(rounds):
        for column, call in enumerate((slow, fast)):
            started = time.perf_counter()
            call()
            seconds[round_, column] = time.perf_counter() - started
    medians = np.median(seconds, axis=0)
    return float(medians[0]), float(medians[1])


def verdict(name: str, figure: str, bar: str, holds: bool) -> None:
    """The last line of a benchmark."""
    print(f"{name}: {figure} | bar {bar} | {'holds' if holds else 'falls short'}")
