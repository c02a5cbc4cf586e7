"""One job at a time in a folder: whoever works there holds it, for as long as that process lives.

The holder writes ``_driver.json`` and counts up in it every few seconds. Whoever finds one of another process watches it: if it
changes, the folder is held, and the newcomer is refused; if it does not, its writer is dead, and the newcomer takes over. A
dead process of the same machine is known at once. Clocks of different machines are never compared.

Not every storage offers more, so this is a guard and no guarantee: a holder that was cut off from its storage for that long
finds another's name in the file when it is back, and stops (decision 0014).
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xmc_ray import storage
from xmc_ray.errors import ConfigError, XmcError

DRIVER = "_driver.json"


_BEAT = 10.0  # seconds from one sign of life to the next


_MISSED = 3.5  # beats without one, and the holder is dead


_SETTLED = 1.0  # seconds after which the name of a rival that came at the same moment shows


class Lease:
    """A held folder."""

    def __init__(self, folder: str, beat: float) -> None:
        self.folder, self._uri, self._beat = folder, storage.join(folder, DRIVER), beat
        self._mine: dict[str, Any] = {"driver": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self._mine |= {"since": datetime.now(timezone.utc).isoformat(timespec="seconds"), "beats": 0}
        self._rival: dict[str, Any] | None = None
        self._made = _missing(folder)
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._live, name="lease", daemon=True)

    def check(self) -> None:
        """ConfigError if another job has taken the folder over."""
        if self._rival is not None:
            raise _refusal(self.folder, self._rival)

    def take(self) -> None:
        """Hold the folder from now on; ConfigError while another job holds it."""
        found = self._others()
        if found is not None and not _is_dead(found):
            known, give_up = found, time.monotonic() + _MISSED * self._beat
            while found is not None and time.monotonic() < give_up:
                if found != known:
                    raise _refusal(self.folder, found)
                time.sleep(self._beat / 10)
                found = self._others()
        self._write()
        time.sleep(min(_SETTLED, self._beat))
        self._rival = self._others()
        self.check()
        self._heart.start()

    def release(self) -> None:
        """Let the folder go, unless another job has it by now."""
        self._over.set()
        if self._heart.ident is not None:
            self._heart.join()
        with suppress(XmcError, OSError):  # whoever comes next finds out
            if self._rival is None and self._others() is None:
                storage.remove(self._uri)
                for made in self._made:  # by this lease, and nothing else has come to lie there
                    made.rmdir()

    def _live(self) -> None:
        while self._rival is None and not self._over.wait(self._beat):
            with suppress(XmcError, OSError):  # a storage that is away will be back
                self._rival = self._others()
                if self._rival is None:
                    self._mine["beats"] += 1
                    self._write()

    def _write(self) -> None:
        storage.write_json(self._uri, self._mine)

    def _others(self) -> dict[str, Any] | None:
        """What another job has written, if one has."""
        if not storage.exists(self._uri):
            return None
        try:
            found = storage.read_json(self._uri)
        except XmcError:  # gone in this moment, or no file of ours
            return None
        return found if isinstance(found, dict) and found.get("driver") != self._mine["driver"] else None


@contextmanager
def held(folder: str, beat: float = _BEAT) -> Iterator[Lease]:
    """Hold ``folder`` against other jobs; ConfigError if one holds it, after some 35 seconds if that has to be found out."""
    lease = Lease(folder, beat)
    try:
        lease.take()
        yield lease
    finally:
        lease.release()


def is_free(folder: str) -> bool:
    """Whether there is nothing in a folder, but for the name of a job that holds it."""
    mark = storage.join(folder, DRIVER)
    return all(file.uri == mark for file in storage.all_files(folder))


def _missing(folder: str) -> list[Path]:
    """The local folders that are not there yet, the innermost first."""
    path = Path(storage.absolute(folder))
    return [one for one in (path, *path.parents) if not one.exists()] if storage.is_local(folder) else []


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether it is known to be, without watching: a process of this machine that is not there."""
    if found.get("host") != socket.gethostname() or not isinstance(found.get("process"), int):
        return False
    try:
        os.kill(found["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _refusal(folder: str, found: dict[str, Any]) -> ConfigError:
    return ConfigError(
        "another job works in this folder",
        where=folder,
        found=f"process {found.get('process')} on {found.get('host')}, since {found.get('since')}",
        way_out="let it finish; or end it, and give the same command again, which goes on where it was",
    )
