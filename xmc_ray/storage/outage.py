"""Whether storage answers this process: said in one line when it stops, and in one when it answers again.

Who waits for storage says so here: `files.patiently`, and the heartbeat of a lease. Many threads may wait for the same
storage, and one line is enough for all of them. In a worker of Ray the line goes to the worker's log; the driver, whose
lease beats all the time, notices by itself that the storage of the output is away.
"""

import logging
import threading
import time

from xmc_ray.errors import printable

_LOG = logging.getLogger(__name__)  # without a handler, warnings go to standard error


class Outage:
    """Since when some of this process's requests have had no answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[object, float] = {}  # who waits -> Unix time of the first request without an answer

    @property
    def since(self) -> float | None:
        """Unix time since when somebody waits for storage; None if nobody does."""
        with self._lock:
            return min(self._since.values(), default=None)

    def begin(self, who: object, error: BaseException) -> None:
        """``who`` waits from now on, unless it does already; the first to wait says so."""
        with self._lock:
            is_first = not self._since
            self._since.setdefault(who, time.time())
        if is_first:
            _LOG.warning("%s: %s", in_words(time.time()), printable(" ".join(str(error).split())))

    def end(self, who: object) -> None:
        """``who`` waits no longer, whether it had an answer or has given up; the last to wait says so."""
        with self._lock:
            since = self._since.pop(who, None)
            is_last = since is not None and not self._since
        if is_last and since is not None:
            _LOG.warning("nobody waits for storage any more, after %.0f s", time.time() - since)


def in_words(since: float) -> str:
    """For the console; times are UTC, as in a night's manifest."""
    return f"storage does not answer since {time.strftime('%H:%M:%S', time.gmtime(since))} UTC"


OUTAGE = Outage()
"""That of this process."""
