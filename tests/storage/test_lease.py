"""A folder is held by one process at a time; a dead one holds nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from seaweed import S3

from xmc_ray import storage
from xmc_ray.errors import ConfigError
from xmc_ray.storage import lease
from xmc_ray.storage.lease import DRIVER, held, is_free

BEAT = 0.2  # seconds

HOLDER = """
import sys, time
from xmc_ray.storage import lease
from xmc_ray.storage.lease import held
with held(sys.argv[1], float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""

WITHOUT_CREATE = """
from xmc_ray import storage
def cannot_create(uri, data):
    raise NotImplementedError
storage.create = cannot_create
"""


@contextmanager
def holder(folder: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, str(BEAT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out" / "night")
    s3: S3 = request.getfixturevalue("s3")
    return s3.uri(f"lease/{tmp_path.name}")


def mark(folder: str) -> dict[str, object]:
    return dict(storage.read_json(storage.join(folder, DRIVER)))


def write(folder: str, **changes: object) -> None:
    storage.write_json(storage.join(folder, DRIVER), mark(folder) | changes)


def test_one_at_a_time(folder: str) -> None:
    with holder(folder) as process:
        refused = pytest.raises(ConfigError, match=rf"another job works in this folder: .*found process {process.pid} on ")
        with refused, held(folder, BEAT):
            pass
        assert mark(folder)["process"] == process.pid, "it is left alone"


def test_who_is_refused_is_told_the_job_to_stop(folder: str) -> None:
    """By the name that `ray job stop` takes."""
    with held(folder, BEAT, job="raysubmit_7"):
        with pytest.raises(ConfigError, match=r"found job raysubmit_7, process \d+ on .*end it by `ray job stop raysubmit_7`"):
            lease.Lease(folder, BEAT).take()
        assert mark(folder)["job"] == "raysubmit_7"
    with held(folder, BEAT), pytest.raises(ConfigError, match=r"found process \d+ on .* or end it and run"):
        lease.Lease(folder, BEAT).take()


def test_who_was_refused_leaves_the_next_holder_alone(folder: str) -> None:
    refused = lease.Lease(folder, BEAT)
    with held(folder, BEAT), pytest.raises(ConfigError):
        refused.take()
    with held(folder, BEAT):
        refused._rival = None  # as it finds when it looks between two holders, a moment before the second has come
        refused.holder = lambda: None  # type: ignore[method-assign]
        refused.release()
        assert mark(folder)["process"] == os.getpid()


def test_nothing_is_left_of_a_job_that_ends(folder: str) -> None:
    with held(folder, BEAT) as taken:
        taken.check()
        assert not is_free(folder) or [file.uri for file in storage.all_files(folder)] == [storage.join(folder, DRIVER)]
    assert storage.is_empty(folder) and not Path(folder).parent.exists()
    with held(folder, BEAT):
        storage.write_bytes(storage.join(folder, "part"), b"")
        assert not is_free(folder)
    assert [file.uri.rpartition("/")[2] for file in storage.all_files(folder)] == ["part"]


def test_a_dead_process_of_this_machine_holds_nothing(folder: str) -> None:
    with holder(folder) as process:
        process.kill()
        process.wait()
        started = time.monotonic()
        with held(folder, 600.0):  # nothing is watched: that would take half an hour
            assert time.monotonic() - started < 60
            assert mark(folder)["process"] != process.pid


def test_a_process_of_another_machine_is_watched(folder: str) -> None:
    with holder(folder) as process:
        process.kill()
        process.wait()
    write(folder, host="elsewhere")
    started = time.monotonic()
    with held(folder, BEAT) as taken:
        assert time.monotonic() - started > 3 * BEAT
        taken.check()


@pytest.mark.parametrize("where", ["boot", "namespace"])
def test_a_process_number_of_another_machine_or_container_of_this_name_is_not_looked_up(folder: str, where: str) -> None:
    """The number is unknown here, and the job lives."""
    with holder(folder) as process:
        process.kill()
        process.wait()
    write(folder, **{where: "another"})
    watched = mark(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease.time, "sleep", lambda _: write(folder, beats=int(str(watched["beats"])) + 1))
        with pytest.raises(ConfigError, match=rf"another job works .* process {process.pid} on "), held(folder, BEAT):
            pass


def test_a_rival_is_found_at_the_moment_of_the_marker(folder: str) -> None:
    with held(folder, 600.0) as taken:  # no heartbeat comes before
        taken.confirm()
        write(folder, driver="another")
        taken.check()
        with pytest.raises(ConfigError, match="another job works"):
            taken.confirm()


def test_who_was_cut_off_finds_another_in_its_place(folder: str) -> None:
    with held(folder, BEAT) as taken:
        write(folder, driver="another")
        time.sleep(3 * BEAT)
        with pytest.raises(ConfigError, match="another job works"):
            taken.check()
    assert mark(folder)["driver"] == "another", "it stays"


def test_a_free_folder_is_held_without_waiting(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease.time, "sleep", pytest.fail)
    with held(folder, 600.0):
        assert mark(folder)["beats"] == 0


def cannot_create(uri: str, data: bytes) -> bool:
    """A storage without conditional writes: it may have written when it says so."""
    storage.write_bytes(uri, data)
    raise NotImplementedError


def test_without_conditional_writes_a_rival_of_the_same_moment_is_seen(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "create", cannot_create)
    with held(folder, BEAT) as first:
        first.check()
        monkeypatch.setattr(lease.time, "sleep", lambda _: write(folder, driver="a rival"))
        with pytest.raises(ConfigError, match="another job works"), held(folder, BEAT):
            pass


@pytest.mark.parametrize("atomic", [True, False])
def test_of_two_that_come_at_once_one_is_refused(atomic: bool, folder: str) -> None:
    code = HOLDER if atomic else WITHOUT_CREATE + HOLDER
    processes = [
        subprocess.Popen([sys.executable, "-c", code, folder, "5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
        (loser,) = (process for process in processes if process.poll() is not None)
        assert loser.stderr is not None and "another job works in this folder" in loser.stderr.read()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_mark_that_is_none_is_written_over(folder: str) -> None:
    storage.write_bytes(storage.join(folder, DRIVER), b"{ not JSON")
    with held(folder, BEAT):
        assert json.dumps(mark(folder))
