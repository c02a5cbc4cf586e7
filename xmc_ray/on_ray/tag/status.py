"""What a night is doing: said on the console, and told to Prometheus by way of a `gauges.Board`."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Literal, get_args

from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.on_ray.tag.gauges import Board, Value
from xmc_ray.on_ray.tag.progress import Pace
from xmc_ray.on_ray.tag.totals import Totals
from xmc_ray.storage.outage import OUTAGE

Phase = Literal["census", "room", "gate", "reusing", "tagging", "publishing", "finished", "failed"]

_EVERY = 5.0  # seconds between two reports to the board
_LAST = 10.0  # seconds that the last report may take: the board may still be starting
_LAST_OF_STOPPED = 1.5  # the same for a driver that was told to end: `ray job stop` kills it after three seconds


@dataclass
class Status:
    """What there is to know of a night while it is made; ``clock`` gives Unix time."""

    date: str
    clock: Callable[[], float] = time.time
    phase: Phase = "census"
    attempt: int = 1
    rows: int = 0
    to_tag: int = 0
    totals: Totals | None = None
    pace: Pace | None = None
    drift: Mapping[str, float | None] = field(default_factory=dict)
    ended: float | None = None

    def __post_init__(self) -> None:
        self.progressed = self.clock()

    def enter(self, phase: Phase, detail: str = "") -> None:
        """Begin a phase, and say so unless there is no need: others say that they wait for room, and how it ended."""
        self.phase = phase
        self.advance()
        if phase not in ("room", "finished", "failed"):
            print(f"{phase}: {detail}" if detail else phase, flush=True)

    def advance(self) -> None:
        """Something was done just now."""
        self.progressed = self.clock()

    def end(self, phase: Phase) -> None:
        """The night is finished, or this attempt has failed."""
        self.enter(phase)
        self.ended = self.progressed

    @property
    def is_over(self) -> bool:
        """Whether the night has ended, one way or the other."""
        return self.ended is not None

    def values(self) -> list[Value]:
        """What Prometheus hears: see `gauges`. The same names and labels at any moment, as far as they are known."""
        day = datetime.strptime(self.date, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp()
        silent = OUTAGE.since
        found: list[Value] = [("phase", {"phase": phase}, float(phase == self.phase)) for phase in get_args(Phase)]
        found += [("attempt", {}, self.attempt), ("date_seconds", {}, day), ("progress_seconds", {}, self.progressed)]
        found += [("rows", {"what": "all"}, self.rows), ("rows", {"what": "to tag"}, self.to_tag)]
        found += [("storage_silent_seconds", {}, 0.0 if silent is None else self.clock() - silent)]
        found += self._counts()
        found += [("drift", {"against": name}, value) for name, value in self.drift.items() if value is not None]
        estimate = None if self.pace is None or self.is_over else self.pace.estimate()
        found += [] if estimate is None else [("left_seconds", {}, estimate[1])]
        outcome = "success_seconds" if self.phase == "finished" else "failure_seconds"
        return found if self.ended is None else [*found, (outcome, {}, self.ended)]

    def _counts(self) -> list[Value]:
        if self.totals is None:
            return [("documents", {"outcome": outcome}, 0.0) for outcome in ("tagged", "reused", "rejected")]
        counts, reasons, scores = self.totals.counts, dict(self.totals.reasons), self.totals.scores.tolist()
        found: list[Value] = [("documents", {"outcome": each}, counts[each]) for each in ("tagged", "reused", "rejected")]
        found += [("rejects", {"reason": reason}, rows) for reason, rows in reasons.items()]
        return found + [("tags", {"score": f"{place / SCORE_BINS:.2f}"}, rows) for place, rows in enumerate(scores)]


class Reporter:
    """Reports a status to a board every few seconds, and does not let a night fail or wait for it."""

    def __init__(self, status: Status, board: Callable[[bool], Board | None]) -> None:
        """``board``: opens the board of the night, or, given False, one beside it for an attempt that has not become one."""
        self.status, self._open = status, board
        self._is_over = threading.Event()
        self._last = _LAST
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Report from now on: the attempt is the night's."""
        self._thread = threading.Thread(target=self._live, name="reporter", daemon=True)
        self._thread.start()

    def end(self, patience: float = _LAST) -> None:
        """Report for the last time; waits at most ``patience`` seconds, once there is a board."""
        self._last = patience
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(patience)
        elif self.status.phase == "failed":
            self._tell(self._board(False), patience)

    def _live(self) -> None:
        board = self._board(True)
        while not self._is_over.is_set():
            self._tell(board, 0.0)
            self._is_over.wait(_EVERY)
        self._tell(board, self._last)

    def _board(self, is_night: bool) -> Board | None:
        with suppress(Exception):  # of any kind: a night that cannot be watched is still a night
            return self._open(is_night)
        return None

    def _tell(self, board: Board | None, seconds: float) -> None:
        with suppress(Exception):  # likewise; the next time may do better
            if board is not None:
                board.tell(self.status.values(), self.status.is_over, seconds)


@contextmanager
def reported(reporter: Reporter) -> Iterator[None]:
    """Around a night: what ends it is reported, even if that is before `Reporter.begin`."""
    try:
        yield
    except BaseException as error:
        reporter.status.end("failed")
        reporter.end(_LAST if isinstance(error, Exception) else _LAST_OF_STOPPED)
        raise
    reporter.end()
