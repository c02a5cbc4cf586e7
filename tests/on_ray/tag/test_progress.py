"""How far a night is, and when it will be done: the estimates on a simulated clock, and what is shown."""

import heapq
import io
import sys
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from xmc_ray.on_ray.tag.progress import Pace, line, percent, progress
from xmc_ray.on_ray.tag.totals import Totals
from xmc_ray.storage import outage


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def totals() -> Totals:
    return Totals(pa.table({"label": ["red"], "name": [None], "count": [1]}))


def simulated(
    clock: Clock, actors: int, pieces: int, rows: int, loading: float, spread: float, late: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """The documents of each piece as it comes in, with the clock set to that moment.

    Each actor loads its model for ``loading`` seconds, the later ones ``late`` seconds after those before, and tags ten
    documents a second, give or take ``spread``.
    """
    rng = np.random.default_rng(seed)
    free = [(actor * late + loading, actor) for actor in range(actors)]
    done: list[float] = []
    for _ in range(pieces):
        began, actor = heapq.heappop(free)
        ended = began + rows / 10 * rng.uniform(1 - spread, 1 + spread)
        done.append(ended)
        heapq.heappush(free, (ended, actor))
    for clock.seconds in sorted(done):
        yield rows


@pytest.mark.parametrize("spread", [0.0, 0.2])
@pytest.mark.parametrize("actors", [1, 4, 20])
@pytest.mark.parametrize("loading", [0.0, 60.0, 3600.0])
def test_the_time_left_in_the_middle_of_a_night_is_right_however_long_the_model_loads(
    loading: float, actors: int, spread: float
) -> None:
    """A night of 3 % of a catalogue: twelve pieces an actor, which is the least; asked ever again around its middle."""
    clock, pieces = Clock(), 12 * actors
    arrivals = [clock.seconds for _ in simulated(clock, actors, pieces, 500, loading, spread)]
    pace = Pace(500 * pieces, actors=actors, clock=clock)
    for now in loading + (arrivals[-1] - loading) * np.linspace(0.4, 0.6, 33):
        while arrivals[0] <= now:
            clock.seconds = arrivals.pop(0)
            pace.add(500)
        clock.seconds = now
        estimate = pace.estimate()
        assert estimate is not None
        assert estimate[1] == pytest.approx(arrivals[-1] - now, rel=0.25)


def test_actors_that_come_one_after_the_other_do_not_mislead_for_long() -> None:
    """A pool that grows to eight: after half of the pieces, the first actor's solitude is forgotten."""
    clock, ends = Clock(), Clock()
    *_, _ = simulated(ends, 8, 240, 500, 60, 0.2, late=100)
    pace = Pace(240 * 500, actors=8, clock=clock)
    for number, rows in enumerate(simulated(clock, 8, 240, 500, 60, 0.2, late=100)):
        pace.add(rows)
        if number == 160:
            estimate = pace.estimate()
            assert estimate is not None
            assert estimate[1] == pytest.approx(ends.seconds - clock.seconds, rel=0.25)


def test_there_is_no_estimate_until_every_actor_has_done_a_piece_and_one_a_second() -> None:
    clock = Clock()
    pace = Pace(100, actors=2, clock=clock)
    for seconds, known in ((60.0, False), (60.1, False), (61.0, True)):
        clock.seconds = seconds
        pace.add(10)
        assert (pace.estimate() is not None) == known
    alone = Pace(100, clock=clock)
    alone.add(10)
    alone.add(10)
    assert alone.estimate() is None, "at the same moment"


def test_a_night_that_stands_still_takes_longer_and_longer() -> None:
    clock = Clock()
    pace = Pace(1000, clock=clock)
    for clock.seconds in (10.0, 20.0, 30.0, 40.0):
        pace.add(100)

    def left(seconds: float) -> float:
        clock.seconds = seconds
        estimate = pace.estimate()
        assert estimate is not None
        return estimate[1]

    assert left(40) == pytest.approx(60) and left(45) == pytest.approx(55) and left(50) == pytest.approx(50)
    assert left(60) > 60 and left(600) > 1000, "the next piece was due at 50"


def test_what_earlier_attempts_have_done_does_not_count_for_the_pace() -> None:
    clock = Clock()
    pace = Pace(1000, done=900, clock=clock)
    for clock.seconds in (100.0, 150.0):
        pace.add(10)
    assert pace.estimate() == (pytest.approx(0.2), pytest.approx(400))
    pace.add(0)
    assert pace.estimate() == (pytest.approx(0.2), pytest.approx(400)), "a piece of rejects"


def test_a_line_has_a_digit_after_the_point_only_where_it_is_slow() -> None:
    for seconds, shown in ((100.0, "1.0/s, 0:13:20 left"), (0.5, "200/s, 0:00:04 left")):
        clock, sums = Clock(), totals()
        pace = Pace(1000, clock=clock)
        for clock.seconds in (seconds, 2 * seconds):
            pace.add(100)
        assert line(pace, sums) == f"tagged 200 of 1,000 documents (20%), {shown}, 0 rejected"
    sums.counts.update(reused=97_000, rejected=12)
    assert line(pace, sums).endswith(" left, 97,000 reused, 12 rejected")


def test_everything_is_done_at_the_end_and_not_before() -> None:
    assert [percent(done, 2834) for done in (0, 28, 29, 2833, 2834)] == ["0%", "0%", "1%", "99%", "100%"]
    assert percent(0, 0) == "100%"


def test_a_line_says_that_storage_does_not_answer() -> None:
    outage.OUTAGE.begin("a test", OSError("gone"))
    try:
        assert "rejected, storage does not answer since " in line(Pace(10), totals())
    finally:
        outage.OUTAGE.end("a test")
    assert "storage" not in line(Pace(10), totals())


def test_a_night_says_how_far_it_is_though_no_piece_ends(capsys: pytest.CaptureFixture[str]) -> None:
    sums, pace = totals(), Pace(200)
    with progress(pace, sums, every=0.05):
        time.sleep(0.3)
        for _ in range(2):
            pace.add(50)
            time.sleep(0.01)
        sums.counts.update(tagged=100, rejected=10)
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4
    assert lines[0] == "tagged 0 of 200 documents (0%), no estimate yet, 0 rejected"
    assert lines[-1].startswith("tagged 100 of 200 documents (50%), ") and lines[-1].endswith(" left, 10 rejected")
    time.sleep(0.2)
    assert capsys.readouterr().out == "", "it is over"


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    sums, pace = totals(), Pace(200)
    monkeypatch.setattr("sys.stdout", Terminal())
    with progress(pace, sums, every=0.05):
        pace.add(100)
        sums.counts.update(tagged=100, rejected=10)
        time.sleep(0.3)
        shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
        pace.add(100)
    assert " 50%" in shown and "100/200" in shown and "10 rejected" in shown
    assert "200/200" in sys.stdout.getvalue() and "100%" in sys.stdout.getvalue()  # type: ignore[attr-defined]
