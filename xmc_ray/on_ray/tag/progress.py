"""How far a night is, and when it will be done, by the documents that the model tags.

Reused documents come in seconds and say nothing about the rest. Nor does the time in which the model is loaded, nor the pace of
before the last actor came. So the pace is that of the later half of the pieces, and without the first of each actor, with which
it began.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
from tqdm import tqdm

from xmc_ray.on_ray.tag.totals import Totals
from xmc_ray.storage.outage import OUTAGE, in_words

_SLOW = 10  # documents a second below which a digit is shown after the point


class Pace:
    """How fast documents are tagged, by when each piece of them came in."""

    def __init__(self, total: int, done: int = 0, actors: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """``total``: documents to tag; ``done``: those that earlier attempts have tagged; ``actors``: how many pieces are
        tagged at a time, at most; ``clock``: seconds, from any beginning.
        """
        self.total, self.done = total, done
        self._actors, self._clock = actors, clock
        self._seconds: list[float] = []  # when each piece came in
        self._documents: list[int] = []  # done by then

    def add(self, documents: int) -> None:
        """So many documents more are tagged; a piece of rejects alone says nothing about the pace."""
        if documents:
            self.done += documents
            self._documents.append(self.done)
            self._seconds.append(self._clock())

    def estimate(self) -> tuple[float, float] | None:
        """Documents a second, and seconds until all are tagged; None until each actor has done a piece, and one a second."""
        pieces = len(self._seconds)
        first = max(self._actors, pieces // 2) - 1
        seconds, documents = np.array(self._seconds[first:pieces]), np.array(self._documents[first:pieces])
        if len(seconds) < 2 or not np.ptp(seconds):
            return None
        # A line through all of them: pieces come in waves, those of all actors together, and two may lie anywhere in a wave.
        centred = seconds - seconds.mean()
        rate = float(centred @ documents / (centred @ centred))
        # Until the next piece is due, time simply passes. From then on it slows the pace down.
        gap, waited, span = float(np.diff(seconds).max()), self._clock() - float(seconds[-1]), float(np.ptp(seconds))
        rate *= span / (span + max(0.0, waited - gap))
        return rate, max(0.0, (self.total - self.done) / rate - min(waited, gap))


def line(pace: Pace, totals: Totals) -> str:
    """How far a night is, in a line."""
    share, *others = _parts(pace, totals)
    return ", ".join([f"tagged {pace.done:,} of {pace.total:,} documents ({share})", *others])


def _parts(pace: Pace, totals: Totals) -> list[str]:
    estimate, silent_since = pace.estimate(), OUTAGE.since
    parts = [percent(pace.done, pace.total)]
    if estimate is None:
        parts += ["no estimate yet"]
    else:
        rate, left = estimate
        parts += [f"{rate:,.1f}/s" if rate < _SLOW else f"{rate:,.0f}/s", f"{timedelta(seconds=round(left))} left"]
    parts += [f"{totals.counts['reused']:,} reused"] if totals.counts["reused"] else []
    parts += [f"{totals.counts['rejected']:,} rejected"]
    return parts if silent_since is None else [*parts, in_words(silent_since)]


def percent(done: int, total: int) -> str:
    """100 % is said of what is done, and of nothing else."""
    return "100%" if done >= total else f"{100 * done // total}%"


@contextmanager
def progress(pace: Pace, totals: Totals, every: float | None = None) -> Iterator[None]:
    """Show how far a night is while the body adds to ``pace`` and ``totals``: as a bar on a terminal, else as lines.

    ``every``: seconds between two updates, also while no piece ends; if not given, one on a terminal, and sixty elsewhere.
    """
    is_terminal, is_over = sys.stdout.isatty(), threading.Event()
    every = every or (1.0 if is_terminal else 60.0)

    def show() -> None:
        bar.n = min(pace.done, pace.total)
        bar.set_postfix_str(", ".join(_parts(pace, totals)))

    def update() -> None:
        while not is_over.wait(every):
            if is_terminal:
                show()
            else:
                print(line(pace, totals), flush=True)

    shape = "{bar} {n_fmt}/{total_fmt} documents{postfix}"
    with tqdm(total=pace.total, file=sys.stdout, disable=not is_terminal, dynamic_ncols=True, bar_format=shape) as bar:
        thread = threading.Thread(target=update, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            show()
