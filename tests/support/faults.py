"""What tests of faults share: jobs to disturb, processes to kill, moments to wait for."""

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

SECONDS = 120  # to wait for a moment that has to come


@contextmanager
def running(work: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """``work`` in a thread of its own while the body goes on; at the end ``result`` is what it returned, or its error comes."""
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
    assert "result" in outcome, "the run has not come to an end"


def submit(job: str, arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    """A job as a user starts it, with a local Ray of its own unless RAY_ADDRESS is given."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=inherited | environment, **pipes)  # type: ignore[call-overload,no-any-return]


def wait_for(moment: Callable[[], object], outcome: Mapping[str, Any] | None = None, every: float = 0.002) -> None:
    """``outcome``: of a run that the moment has to come in; once it is over there is nothing to wait for."""
    deadline = time.monotonic() + SECONDS
    while not moment():
        assert time.monotonic() < deadline and not outcome, f"the moment has not come: {outcome}"
        time.sleep(every)


def children(name: str, of: int | None = None) -> list[int]:
    """The processes below this one (or ``of``) whose title begins with ``name``."""
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
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return bool(pids)
