"""Storage that does not answer is said once, by whoever waits for it."""

import logging
import threading
from pathlib import Path

import pytest

from xmc_ray import storage
from xmc_ray.errors import DataError, UnavailableError
from xmc_ray.storage import files, lease
from xmc_ray.storage.lease import held
from xmc_ray.storage.outage import OUTAGE, Outage, in_words


def test_the_first_to_wait_says_so_and_the_last(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    assert outage.since is None
    with caplog.at_level(logging.WARNING):
        outage.begin("a", OSError("no\nroute \x1b[31m"))
        since = outage.since
        outage.begin("a", OSError("still"))
        outage.begin("b", OSError("me too"))
        assert since is not None and outage.since == since
        outage.end("a")
        assert outage.since is not None
        outage.end("b")
        outage.end("c")
    first, last = caplog.messages
    assert first.startswith("storage does not answer since ") and first.endswith(" UTC: no route \N{REPLACEMENT CHARACTER}[31m")
    assert last.startswith("nobody waits for storage any more, after ") and outage.since is None


def test_times_are_those_of_the_manifest() -> None:
    assert in_words(7384) == "storage does not answer since 02:03:04 UTC"


def test_who_retries_waits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(files, "_PAUSE", 0.0)
    caplog.set_level(logging.WARNING)
    seen = list[float | None]()

    def act() -> str:
        seen.append(OUTAGE.since)
        if len(seen) < 4:
            raise UnavailableError("no answer")
        return "done"

    assert storage.patiently(act) == "done"
    assert seen[0] is None and None not in seen[1:] and OUTAGE.since is None
    assert len(caplog.messages) == 2
    with pytest.raises(UnavailableError):
        storage.patiently(lambda: (_ for _ in ()).throw(UnavailableError("no answer")), seconds=-1)
    with pytest.raises(DataError):
        storage.patiently(lambda: (_ for _ in ()).throw(DataError("not there")))
    assert OUTAGE.since is None and len(caplog.messages) == 2, "who gives up at once has not waited"


def test_a_heartbeat_notices_though_nobody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that only waits for its workers knows that their storage is away."""
    away, noticed = threading.Event(), threading.Event()
    read, begin = lease.Lease.holder, OUTAGE.begin

    def others(self: lease.Lease) -> object:
        if away.is_set():
            raise UnavailableError("no answer")
        return read(self)

    def begun(who: object, error: BaseException) -> None:
        begin(who, error)
        noticed.set()

    monkeypatch.setattr(lease.Lease, "holder", others)
    monkeypatch.setattr(OUTAGE, "begin", begun)
    with held(str(tmp_path / "night"), 0.05):
        assert OUTAGE.since is None
        away.set()
        assert noticed.wait(60) and OUTAGE.since is not None
        away.clear()
        for _ in range(600):
            if OUTAGE.since is None:
                break
            threading.Event().wait(0.1)
        assert OUTAGE.since is None
        away.set()
        noticed.clear()
        assert noticed.wait(60)
    assert OUTAGE.since is None, "the job is over"
