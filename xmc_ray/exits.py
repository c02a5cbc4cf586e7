"""How a job ends as a process: with an exit code and, unless it is done, with one line on standard error.

    0        done
    2        an `XmcError`, or what the system refuses: room, memory, rights
    128 + n  ended by signal n: 130 by Ctrl-C, 143 by SIGTERM, 129 by a terminal that was closed

Any other exception is a bug and keeps its traceback.
"""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, cast

from xmc_ray.errors import ConfigError, UnavailableError, XmcError, printable

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = "the same command resumes, or starts over"
_IMPATIENT = 3  # signals: the last of them ends the process without cleaning up
_SOON = 0.1  # seconds until a signal whose exception was dropped is raised again
_FULL = 16 << 20  # bytes that are left in a folder without room, at most
_ends: list[Callable[[], object]] | None = None  # of what the job has started, the latest last; None: no job is running
_NO_ROOM = re.compile("no space left|os error 28|quota exceeded|disk is full", re.IGNORECASE)  # where no errno is given


def run_and_exit(job: Callable[[], object]) -> NoReturn:
    """Call ``job`` and end this process. Imports belong into ``job``, since a signal may come in the seconds that they take."""
    signals = _Signals()
    code = _run(job, signals)
    signals.is_over = True
    raise SystemExit(code)


def exit_code(job: Callable[[], object]) -> int:
    """Call ``job`` and return the exit code, after a line of what has ended it early; a bug is raised."""
    before, hook = {number: signal.getsignal(number) for number in _ENDING}, sys.unraisablehook
    try:
        return _run(job, _Signals())
    finally:
        _Signals.installed, sys.unraisablehook = None, hook
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with(end: Callable[[], object]) -> None:
    """Have ``end`` called when the job is over, before its last line: what a library has yet to say comes ahead of it.

    Nothing is noted where no job is running: what a program has started by itself is not for its next job to end.
    """
    if _ends is not None:
        _ends.append(end)


def in_job() -> bool:
    """Whether a job is at work, at whose end `end_with` keeps its word."""
    return _ends is not None


@contextmanager
def _ended() -> Iterator[None]:
    """What is started within is ended with it."""
    global _ends
    before, _ends = _ends, []
    try:
        yield
    finally:
        while _ends:
            with suppress(Exception):  # the job's own end is what counts
                _ends.pop()()
        _ends = before


@contextmanager
def keep_signals() -> Iterator[None]:
    """Within, a library cannot replace a job's handlers of signals; below Python it can, and they are put back at the end.

    Ray's exit with other codes, 0 among them, or abort the process three seconds after SIGTERM.
    """
    set_handler = signal.signal

    def refuse(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in _ENDING else set_handler(number, handler)

    if _Signals.installed is not None:
        signal.signal = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        if _Signals.installed is not None:
            _Signals.installed.install()


def own(error: BaseException) -> XmcError | None:
    """An exception as one of ours, if it is one or if the system, rather than a bug, has caused it."""
    if isinstance(error, XmcError):
        return error
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, MemoryError):
        return ConfigError("out of memory", found=text, way_out="take smaller batches or fewer processes, or a larger machine")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, for a GPU; importing it takes long
        return ConfigError("out of memory", found=text, way_out="lower the batch size or the token budget")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("xmc_ray"):
        return ConfigError("a package is missing", found=error.name, way_out="install xmc_ray with all that it requires")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _NO_ROOM.search(str(error)):
        named = getattr(error, "filename", None)
        return no_room([os.path.dirname(os.path.abspath(named))] if isinstance(named, str) else full_folders(), text)
    if isinstance(error, ConnectionError | TimeoutError):
        return UnavailableError("no answer", found=text, way_out=_AGAIN)
    return ConfigError("the system refuses", found=text) if isinstance(error, OSError) else None


def no_room(folders: list[str], found: str) -> ConfigError:
    """The error for folders that are full."""
    way_out = "make room there, or set TMPDIR to another folder"
    return ConfigError("no room left", where=", ".join(folders) or None, found=found, way_out=way_out)


def full_folders() -> list[str]:
    """The folders on this machine that are full, of those in which libraries keep files without being told."""
    import shutil  # only now: each import at the top is a moment in which no signal is handled yet
    import tempfile

    temporary, full = tempfile.gettempdir(), []
    folders = [temporary, f"{temporary}/ray", "/tmp/ray", "/dev/shm", os.path.expanduser("~"), os.getcwd()]
    for folder in dict.fromkeys(folders):
        with suppress(OSError):
            if shutil.disk_usage(folder).free < _FULL:
                full.append(folder)
    return full


def _run(job: Callable[[], object], signals: "_Signals") -> int:
    before, output = sys.stdout, _Output(sys.stdout)
    if before is not None:
        sys.stdout = cast(TextIO, output)
    try:
        signals.install()
        with _ended():
            try:
                job()
            finally:
                signals.is_over = True
    except BaseException as error:
        number = signals.received or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
        reason = XmcError(f"ended by {signal.Signals(number).name}", way_out=_AGAIN) if number else own(error)
        if reason is None:
            raise
        return _fail(reason, 128 + number if number else 2)
    finally:
        output.flush()
        sys.stdout = before
    lost = output.lost
    return 0 if lost is None or lost.errno == errno.EPIPE else _fail(ConfigError("what the job says is lost", found=lost), 2)


def _fail(reason: XmcError, code: int) -> int:
    with suppress(OSError):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    return code


class _Signals:
    """Raises the first signal that asks the job to end as KeyboardInterrupt, which libraries do not take for an error.

    The second is ignored: a parent often passes on what the terminal has sent to all processes already.
    """

    installed: "_Signals | None" = None

    def __init__(self) -> None:
        self.received, self.is_over, self._count = 0, False, 0

    def install(self) -> None:
        """Signals that the parent has switched off stay so."""
        if threading.current_thread() is threading.main_thread():
            _Signals.installed, sys.unraisablehook = self, self._report_dropped
            for number in _ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        self._count += 1
        signal.alarm(0)  # of Ray's own handler, if it was there first
        if self._count >= _IMPATIENT:
            os.write(2, f"error: ended by {signal.Signals(number).name} before everything was cleaned up\n".encode())
            os._exit(128 + number)
        if not self.received and not self.is_over:
            self.received = number
            raise KeyboardInterrupt

    def _report_dropped(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Python prints and drops what is raised in a finalizer; a signal is raised again, once that is over."""
        if isinstance(dropped.exc_value, KeyboardInterrupt) and self.received:
            threading.Timer(_SOON, self._raise_again).start()
        else:
            sys.__unraisablehook__(dropped)

    def _raise_again(self) -> None:
        if not self.is_over:
            number, self.received, self._count = self.received, 0, self._count - 1
            os.kill(os.getpid(), number)


class _Output:
    """Standard output of a job: without control codes, and never a reason to end the job.

    The reader of a pipe may leave (``| head``), and the disk of a log may be full.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self.lost = stream, cast(OSError | None, None)
        with suppress(AttributeError):  # not a stream of the system
            cast(Any, stream).reconfigure(errors="backslashreplace")  # it may know less than Unicode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Nothing is written once a write has failed."""
        self._forgiving(lambda stream: stream.write(printable(text)))
        return len(text)

    def flush(self) -> None:
        """Like `write`."""
        self._forgiving(lambda stream: stream.flush())

    def _forgiving(self, act: Callable[[TextIO], object]) -> None:
        if self._stream is None:  # closed by the parent
            return
        try:
            act(self._stream)
        except OSError as error:
            self.lost = error
            # What is left in the stream's buffer, Python writes at its end, and would complain.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
