"""Keeps what Ray writes below Python off standard error; its log files have the same lines.

    [2026-11-29 01:44:28,102 E 17129 17129] core_worker.cc:2465: Actor with class name: 'MapWorker(...)' ... may fail.

Python's own lines do not pass through here: they go on to where standard error was, a terminal if it was one.
"""

import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

_OF_RAY = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,.]+ [DIWE] \d+ \d+\] ")  # not F: why a process aborts is worth reading
_WAIT = 2.0  # seconds for the last lines


def without_lines_of_ray() -> Callable[[], None]:
    """Leave such lines out of file descriptor 2 from now on; returns what ends that.

    Does nothing if ``RAY_BACKEND_LOG_LEVEL`` is set: then somebody wants to see them.
    """
    if os.environ.get("RAY_BACKEND_LOG_LEVEL"):
        return lambda: None
    before, (reading, writing) = os.dup(2), os.pipe()
    python, own = sys.stderr, None
    with suppress(AttributeError, OSError, ValueError):  # closed, or a stand-in
        python.flush()
        if python.fileno() == 2:
            own = os.fdopen(os.dup(before), "w", buffering=1, encoding=python.encoding, errors="backslashreplace")
            sys.stderr = own
    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=_pass_on, args=(reading, before), daemon=True)
    thread.start()

    def end() -> None:
        os.dup2(before, 2)  # the pipe has no writer any more, unless a process of Ray's has inherited it
        if own is not None and sys.stderr is own:
            own.flush()
            sys.stderr = python
        thread.join(_WAIT)

    return end


def _pass_on(reading: int, before: int) -> None:
    with open(reading, "rb") as lines, suppress(OSError):  # nobody reads them any more
        for line in lines:
            if not _OF_RAY.match(line):
                os.write(before, line)
