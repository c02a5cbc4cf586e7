"""How a job ends as a process: its exit code, and one line for whatever a user can cause, at whatever moment."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from checkout import ROOT

from xmc_ray import exits
from xmc_ray.errors import ConfigError, DataError, UnavailableError, XmcError

PYTHON = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def start(body: str, **options: Any) -> "subprocess.Popen[str]":
    """A process whose job is ``body``."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"import os, signal, sys, time\nfrom xmc_ray.exits import run_and_exit\ndef main():\n{lines}run_and_exit(main)\n"
    return subprocess.Popen([sys.executable, "-c", code], **(PYTHON | options))


def end(body: str, **options: Any) -> tuple[int, str, str]:
    """Exit code, output and errors of `start`."""
    process = start(body, **options)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


# -- signals -------------------------------------------------------------------------------------------------------------

ENDING = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), ENDING)
def test_a_signal_is_one_line_and_its_exit_code_and_what_is_open_is_closed(number: signal.Signals, code: int) -> None:
    body = "try:\n    print('begun', flush=True)\n    time.sleep(600)\nfinally:\n    print('closed')"
    process = start(body)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "closed\n")
    assert errors == f"error: ended by {number.name}; the same command resumes, or starts over\n"


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), signal.SIGINT)"])
def test_the_last_line_comes_after_what_a_library_says_at_its_end(ending: str) -> None:
    """And what goes wrong there changes nothing."""
    ends = "exits.end_with(lambda: print('\\033[33mlate', flush=True))\nexits.end_with(lambda: 1 / 0)"
    code, output, errors = end(f"from xmc_ray import exits\n{ends}\n{ending}", stderr=subprocess.STDOUT)
    last = [] if ending == "pass" else ["error: ended by SIGINT; the same command resumes, or starts over"]
    assert (code, errors) == (130 if last else 0, None)
    assert output.splitlines() == ["\N{REPLACEMENT CHARACTER}[33mlate", *last]


def test_a_job_ends_only_what_it_has_started() -> None:
    """Not what the program around it has started, and what it has started is not for the next job to end."""
    said = list[str]()
    exits.end_with(lambda: said.append("the program's"))

    def outer() -> None:
        exits.end_with(lambda: said.append("outer"))
        assert exits.exit_code(lambda: exits.end_with(lambda: said.append("inner"))) == 0
        assert said == ["inner"]

    assert exits.exit_code(outer) == exits.exit_code(lambda: None) == 0
    assert said == ["inner", "outer"]


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_a_signal_while_a_job_imports_is_one_line(job: str, tmp_path: Path) -> None:
    """Importing takes seconds: the first module that a job imports sends the signal."""
    (tmp_path / "jsonargparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, ROOT / "jobs" / job], **(PYTHON | {"env": environment}), timeout=120)
    assert done.returncode == 130 and re.fullmatch("error: ended by SIGINT; .*\n", done.stderr)


def test_a_second_signal_lets_the_job_clean_up_and_a_third_does_not() -> None:
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    body = f"try:\n    {interrupt}\nfinally:\n    {interrupt}\n    print('closed', flush=True)\n"
    assert end(body)[:2] == (130, "closed\n")
    code, output, errors = end(f"{body}    {interrupt}\n    print('never', flush=True)")
    assert (code, output) == (130, "closed\n") and errors == "error: ended by SIGINT before everything was cleaned up\n"


def test_a_signal_at_the_very_end_leaves_a_finished_job_finished() -> None:
    assert end("import atexit\natexit.register(os.kill, os.getpid(), signal.SIGTERM)\nprint('done')") == (0, "done\n", "")


def test_a_signal_that_the_parent_has_switched_off_stays_off() -> None:
    """As for a job in the background of a script, or under nohup."""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    assert end("os.kill(os.getpid(), signal.SIGHUP)\nprint('done')", preexec_fn=ignore) == (0, "done\n", "")


def test_signals_are_kept_from_a_library() -> None:
    """Ray's handlers exit with 15, and with 0."""
    handler = "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n    signal.signal(signal.SIGUSR1, signal.SIG_IGN)"
    raised = "os.kill(os.getpid(), signal.SIGUSR1)\nos.kill(os.getpid(), signal.SIGTERM)"
    code, _, errors = end(f"from xmc_ray import exits\nwith exits.keep_signals():\n{handler}\n{raised}")
    assert code == 143 and errors.startswith("error: ended by SIGTERM;")


def test_signals_are_taken_back_from_below_python() -> None:
    """Ray's core sets a handler that prints a stack, hands the signal on, and aborts the process after three seconds."""
    body = """
import ctypes
from xmc_ray import exits
with exits.keep_signals():
    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(0))  # kills
os.kill(os.getpid(), signal.SIGTERM)"""
    code, _, errors = end(body)
    assert code == 143 and errors.startswith("error: ended by SIGTERM;")


def test_a_signal_whose_exception_python_drops_is_raised_again() -> None:
    """As it does with one in a finalizer, which the start of Ray has many of."""
    body = "class Dropping:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(0)\n"
    code, output, errors = end(f"{body}Dropping()\nprint('dropped', flush=True)\ntime.sleep(600)")
    assert (code, output) == (
        143,
        "dropped\n",
    ) and errors == "error: ended by SIGTERM; the same command resumes, or starts over\n"


def test_in_a_process_of_others_their_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number, _ in ENDING]
    assert exits.exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert [signal.getsignal(number) for number, _ in ENDING] == before


# -- what the system refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (DataError("no input", where="x"), DataError, "no input: x"),
        (MemoryError("Unable to allocate 9 TiB"), ConfigError, "out of memory; found Unable to allocate 9 TiB; take smaller"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/file"),
            ConfigError,
            r"no room left: /full; found \[Errno 28\]",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/full/file"), ConfigError, "no room left: /full; found .*quota"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), ConfigError, "no room left.*make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/closed"), ConfigError, "the system refuses; found .*'/closed'"),
        (OSError(errno.EMFILE, "Too many open files"), ConfigError, "the system refuses; found .*Too many open files"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            ConfigError,
            "a package is missing; found torch; install",
        ),
        (ConnectionResetError("reset by peer"), UnavailableError, "no answer; found reset by peer; the same command"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: Exception, kind: type[XmcError], line: str) -> None:
    own = exits.own(error)
    assert type(own) is kind and re.match(line, str(own))


def test_a_full_disk_is_named_where_the_error_names_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Mock(free=0 if folder == "/tmp" else 1 << 40))
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert str(exits.own(OSError(errno.ENOSPC, "No space left"))).startswith("no room left: /tmp; found")


def test_a_bug_keeps_its_traceback() -> None:
    assert all(
        exits.own(error) is None
        for error in (ZeroDivisionError(), KeyError("x"), RecursionError(), ImportError("x", name="torch"))
    )
    code, _, errors = end("1 / 0")
    assert code == 1 and "Traceback" in errors and "ZeroDivisionError" in errors


def test_a_memory_error_and_a_full_disk_end_a_job_in_one_line() -> None:
    code, _, errors = end("bytearray(1 << 62)")
    assert code == 2 and re.fullmatch("error: out of memory; .*\n", errors)
    code, _, errors = end("open('/dev/full', 'w', 1).write('x' * 100_000)")
    assert code == 2 and re.fullmatch(r"error: no room left.*No space left on device; .*\n", errors)


# -- standard output -----------------------------------------------------------------------------------------------------


def test_a_reader_who_leaves_does_not_end_a_job(tmp_path: Path) -> None:
    """``| head -1``, and the progress of a night that a thread prints."""
    body = f"""
import threading
def say():
    for n in range(20_000): print(n, flush=n % 100 == 0)
thread = threading.Thread(target=say)
thread.start()
thread.join()
say()
open({str(tmp_path / "done")!r}, "w").close()"""
    process = start(body)
    assert process.stdout is not None and process.stderr is not None and process.stdout.readline() == "0\n"
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(60), errors) == (0, "") and (tmp_path / "done").exists()


def test_output_that_is_lost_to_a_full_disk_is_said_at_the_end() -> None:
    with open("/dev/full", "w") as full:
        code, _, errors = end("print('the table')\nprint('done', file=sys.stderr)", stdout=full)
    assert code == 2 and re.fullmatch("done\nerror: what the job says is lost; found .*No space left on device\n", errors)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_less_than_unicode(encoding: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    body = "from xmc_ray.errors import DataError\nprint('größe 漢')\nraise DataError('größe 漢')"
    code, output, errors = end(body, env=environment, encoding=encoding)
    assert code == 2 and r"\u6f22" in output and r"\u6f22" in errors and "Traceback" not in errors


def test_closed_streams() -> None:
    assert end("sys.stdout = None\nprint('lost')")[0] == 0
    closed = lambda: (os.close(1), os.close(2))  # noqa: E731
    assert end("print('lost')\nraise OSError('lost')", preexec_fn=closed)[0] == 2


def test_data_that_a_job_prints_cannot_command_the_terminal() -> None:
    _, output, _ = end(r"print('a label \x1b[2J', os.fsdecode(b'caf\xe9'), 'größe\ttab\r')")
    assert output == "a label \N{REPLACEMENT CHARACTER}[2J caf\\xe9 größe\ttab\n"
