"""A lease on a folder: one job at a time works there, for as long as its process lives.

The holder creates ``_driver.json`` and writes a heartbeat to it. A newcomer that finds the file of another process watches it:
if it changes, the folder is held and the newcomer is refused; if it does not, the holder is dead and the newcomer takes over. A
dead process of the same machine is recognised immediately: of the same start of the same system, and of the same PID namespace,
since containers and machines may share a host name. Clocks of different machines are never compared.

Of several newcomers to a free folder one wins, since storage creates the file only once. Where storage cannot do that, and
where a dead holder's file is replaced, each writes its own, waits, and checks whose file remains. So the lease is a guard and
no guarantee: a holder that was cut off from its storage for long finds another's file when it is back, and stops (decision
0014).
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xmc_ray import storage
from xmc_ray.errors import ConfigError, DataError, XmcError
from xmc_ray.storage.outage import OUTAGE

DRIVER = "_driver.json"
_BEAT = 10.0  # seconds from one heartbeat to the next
_MISSED = 3.5  # a holder is dead after this many missed heartbeats
_SETTLED = 1.0  # seconds until a rival's write of the same moment is visible


class Lease:
    """A folder held against other jobs; see `held`."""

    def __init__(self, folder: str, beat: float, job: str | None = None) -> None:
        self.folder, self._uri, self._beat = folder, storage.join(folder, DRIVER), beat
        self._mine: dict[str, Any] = {"driver": uuid.uuid4().hex, **_machine(), "process": os.getpid(), "job": job}
        self._mine |= {"since": datetime.now(timezone.utc).isoformat(timespec="seconds"), "beats": 0}
        self._rival: dict[str, Any] | None = None
        self._wrote = False
        self._created = _missing(folder)
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._live, name="lease", daemon=True)

    def check(self) -> None:
        """ConfigError if another job has taken the folder over, as far as the last heartbeat knows."""
        if self._rival is not None:
            raise _refusal(self.folder, self._rival)

    def confirm(self) -> None:
        """Like `check`, but looks now: for the moment before a marker is written."""
        self._rival = self._rival or storage.patiently(self.holder)
        self.check()

    def take(self) -> None:
        """Hold the folder from now on; ConfigError while another job holds it."""
        while not self._create():
            holder = self.holder()
            if holder is None or _is_dead(holder) or self.watch(holder) is not None:
                self._write()
                time.sleep(min(_SETTLED, self._beat))
                break
        self._rival = self.holder()
        self.check()
        self._heart.start()

    def release(self) -> None:
        """Let the folder go, unless another job has taken it over."""
        self._over.set()
        if self._heart.ident is not None:
            self._heart.join()
        OUTAGE.end(self)
        with suppress(XmcError, OSError):  # the next job finds a dead holder
            if self._wrote and self._rival is None and self.holder() is None:
                storage.remove(self._uri)
                for created in self._created:
                    created.rmdir()  # fails where there is something else by now

    def _live(self) -> None:
        while self._rival is None and not self._over.wait(self._beat):
            try:
                self._rival = self.holder()
                if self._rival is None:
                    self._mine["beats"] += 1
                    self._write()
                OUTAGE.end(self)
            except (XmcError, OSError) as error:  # the next beat may find storage available again
                if storage.is_unavailable(error):
                    OUTAGE.begin(self, error)

    def watch(self, holder: dict[str, Any]) -> dict[str, Any] | None:
        """The holder once it has missed its beats, None once its file is removed; ConfigError when it beats."""
        deadline = time.monotonic() + _MISSED * self._beat
        while time.monotonic() < deadline:
            now = self.holder()
            if now is None:
                return None
            if now != holder:
                raise _refusal(self.folder, now)
            time.sleep(self._beat / 10)
        return holder

    def _create(self) -> bool:
        """Whether there was no file and ours is there now, which is true for at most one of several rivals."""
        if self.holder() is not None:  # not to be overwritten by a storage that ignores the condition
            return False
        try:
            self._wrote = storage.create(self._uri, json.dumps(self._mine).encode())
        except NotImplementedError:
            return False
        return self._wrote

    def _write(self) -> None:
        self._wrote = True  # or perhaps, if it fails
        storage.write_json(self._uri, self._mine)

    def holder(self) -> dict[str, Any] | None:
        """The content of another job's file, if there is one."""
        try:
            content = storage.read_json(self._uri)
        except DataError:  # there is none, or it is not a lease
            return None
        return content if isinstance(content, dict) and content.get("driver") != self._mine["driver"] else None


@contextmanager
def held(folder: str, beat: float = _BEAT, job: str | None = None) -> Iterator[Lease]:
    """Hold ``folder`` against other jobs; ConfigError if one holds it, which may take 35 seconds to find out.

    ``job``: by what name `ray job stop` knows this process, if it was submitted, for those who are refused.
    """
    lease = Lease(folder, beat, job)
    try:
        lease.take()
        yield lease
    finally:
        lease.release()


def is_held(folder: str, beat: float = _BEAT) -> bool:
    """Whether a job works in ``folder``, which may take 35 seconds to find out; what a killed one has left is no lease."""
    lease = Lease(folder, beat)
    holder = lease.holder()
    if holder is None or _is_dead(holder):
        return False
    try:
        lease.watch(holder)
    except ConfigError:
        return True
    return False


def is_free(folder: str, files: Sequence[storage.FileInfo] | None = None) -> bool:
    """Whether a folder holds nothing but a lease, or what interrupted writes have left. ``files``: its listing, if at hand."""
    lease = storage.join(folder, DRIVER)
    files = storage.all_files(folder) if files is None else files
    return all(file.uri == lease or storage.is_temporary(file.uri) for file in files)


def _missing(folder: str) -> list[Path]:
    """The local folders on the way to ``folder`` that do not exist yet, the innermost first."""
    path = Path(storage.normalise(folder))
    return [part for part in (path, *path.parents) if not part.exists()] if storage.is_local(folder) else []


def _machine() -> dict[str, Any]:
    """Where a process number means the same process: on this host, since it was started, in this PID namespace."""
    machine: dict[str, Any] = {"host": socket.gethostname(), "boot": None, "namespace": None}
    with suppress(OSError):  # not Linux, where neither is shared with another machine of this name
        machine["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine["namespace"] = os.readlink("/proc/self/ns/pid")
    return machine


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that no longer exists."""
    machine = _machine()
    if {name: holder.get(name) for name in machine} != machine or not isinstance(holder.get("process"), int):
        return False
    try:
        os.kill(holder["process"], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _refusal(folder: str, holder: dict[str, Any]) -> ConfigError:
    job = holder.get("job")
    found = f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"
    found, end = (f"job {job}, {found}", f"end it by `ray job stop {job}`") if job else (found, "end it")
    way_out = f"let it finish, or {end} and run the same command again, which resumes"
    return ConfigError("another job works in this folder", where=folder, found=found, way_out=way_out)
