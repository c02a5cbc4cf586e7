"""Helpers for tests of faults: start a job to disturb, wait for a moment in it, kill processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkout import ROOT

SECONDS = 400  # the longest wait for anything that has to happen


@contextmanager
def running(work: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Run ``work`` in a thread beside the body; at the end ``result`` is what it returned, or its error is raised."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:  # raised again below
            outcome["error"] = error

    thread = threading.Thread(target=run, name="run")
    thread.start()
    try:
        yield outcome
    finally:
        thread.join(SECONDS)
    if "error" in outcome:
        raise outcome["error"]
    assert "result" in outcome, "the run has not ended"


def submit(job: str, arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    """Start a job as a user does; it starts a local Ray unless ``environment`` has RAY_ADDRESS."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=inherited | environment, **pipes)  # type: ignore[call-overload,no-any-return]


def wait_for(moment: Callable[[], object], outcome: Mapping[str, Any] | None = None, every: float = 0.02) -> None:
    """Return once ``moment()`` is true; looks again after ``every`` seconds. AssertionError after `SECONDS`.

    ``outcome``: that of the run (`running`) in which the moment has to come; once the run is over, waiting is in vain.
    """
    deadline = time.monotonic() + SECONDS
    while not moment():
        assert time.monotonic() < deadline and not outcome, f"the moment has not come: {outcome}"
        time.sleep(every)


def children(name: str, of: int | None = None) -> list[int]:
    """Descendants of this process, or of the process ``of``, whose title begins with ``name``."""
    parent, title = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            title[int(entry.name)] = (entry / "cmdline").read_text()
        except OSError:
            continue
    found, level = [], {of or os.getpid()}
    while level := {pid for pid, above in parent.items() if above in level}:
        found += [pid for pid in level if title.get(pid, "").startswith(name)]
    return sorted(found)


def kill(pids: list[int]) -> bool:
    """Send SIGKILL to each; whether there were any."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)
