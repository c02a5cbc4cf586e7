"""The session: which Ray it is, whether it has room, and our own errors out of it."""

import errno
import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
from ray import exceptions
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError

from xmc_ray.errors import ConfigError, DataError, ModelError, UnavailableError, XmcError
from xmc_ray.on_ray import session


def raise_ours() -> None:
    raise DataError("no input", where="there", way_out="look elsewhere")


def raise_other() -> None:
    raise ZeroDivisionError("of the worker")


def raise_ours_in_a_stage(table: pa.Table) -> pa.Table:
    raise_ours()
    return table


class RaiseOurs:
    def __call__(self, table: pa.Table) -> pa.Table:
        return raise_ours_in_a_stage(table)


def test_our_errors_come_out_of_a_task_as_they_were_raised(ray_session: None) -> None:
    with pytest.raises(DataError) as caught, session.own_errors():
        ray.get(ray.remote(raise_ours).remote())
    assert type(caught.value) is DataError and str(caught.value) == "no input: there; look elsewhere"
    with pytest.raises(ZeroDivisionError, match="of the worker"), session.own_errors():
        ray.get(ray.remote(raise_other).remote())


@pytest.mark.parametrize("stage", [raise_ours_in_a_stage, RaiseOurs])
def test_our_errors_come_out_of_a_stream_as_they_were_raised(stage: Any, ray_session: None) -> None:
    """Stages that are generators raise beside Ray Data's wrapper, plain functions and actors within."""
    session.connect()
    stream = ray.data.range(1).map_batches(stage, batch_format="pyarrow", concurrency=1)
    with pytest.raises(DataError) as caught, session.own_errors():
        list(session.arrow_batches(stream))
    assert type(caught.value) is DataError and str(caught.value) == "no input: there; look elsewhere"


class Failing:
    """An actor that cannot begin."""

    def __init__(self, error: Exception) -> None:
        raise error

    def call(self) -> None:
        """Never gets here."""


def test_our_errors_come_out_of_an_actor_that_cannot_begin(ray_session: None) -> None:
    actor = ray.remote(num_cpus=0)(Failing).remote(ModelError("the bundle is damaged"))
    with pytest.raises(ModelError, match=r"^the bundle is damaged$"), session.own_errors():
        ray.get(actor.call.remote())
    actor = ray.remote(num_cpus=0)(Failing).remote(ZeroDivisionError("a bug"))
    with pytest.raises(RayActorError, match="ZeroDivisionError"), session.own_errors():
        ray.get(actor.call.remote())


def fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/full/file")


def use_too_much_memory() -> None:
    raise MemoryError("Unable to allocate 9 TiB")


def test_what_the_system_refuses_to_a_worker_is_one_line(ray_session: None) -> None:
    for task, line in ((fill_the_disk, "^no room left: /full; found "), (use_too_much_memory, "^out of memory; found Unable")):
        with pytest.raises(ConfigError, match=line) as caught, session.own_errors():
            ray.get(ray.remote(num_cpus=0)(task).remote())
        assert str(caught.value).isprintable()


def die() -> None:
    os._exit(1)


class Dying:
    """An actor whose process ends."""

    def call(self) -> None:
        """Kills it."""
        os._exit(1)


def test_a_process_that_dies_is_one_line(ray_session: None) -> None:
    """As one that the kernel has killed for its memory."""
    lost = r"^Ray has lost a process, a machine or an object; found .+; run the same command again, which resumes$"
    with pytest.raises(UnavailableError, match=lost), session.own_errors():
        ray.get(ray.remote(num_cpus=0, max_retries=0)(die).remote())
    actor = ray.remote(num_cpus=0)(Dying).remote()
    with pytest.raises(UnavailableError, match=lost), session.own_errors():
        ray.get(actor.call.remote())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            exceptions.ObjectStoreFullError("3 GB needed\nThe local object store is full"),
            "Ray's object store is full; found 3 GB",
        ),
        (exceptions.OutOfDiskError("out of disk"), "Ray has no room left for its files; found .*RAY_TMPDIR"),
        (exceptions.OutOfMemoryError("Task was killed"), "a machine has run out of memory; found Task was killed"),
        (exceptions.NodeDiedError("node 3"), "Ray has lost a process, a machine or an object; found node 3"),
        (exceptions.ObjectLostError("ab", None, ""), "Ray has lost .* object; found "),
        (exceptions.LocalRayletDiedError(), "Ray has lost "),
        (exceptions.RuntimeEnvSetupError("no pip"), "Ray cannot set up its processes; found .*no pip"),
        (WorkerGroupError("worker 0", {0: exceptions.ActorDiedError()}), "Ray has lost "),
        (ControllerError(exceptions.NodeDiedError("node 3")), "Ray has lost "),
        (ControllerError(DataError("out of order")), "^out of order$"),
    ],
)
def test_what_befalls_ray_is_one_line(error: Exception, line: str) -> None:
    with pytest.raises(XmcError, match=line) as caught, session.own_errors():
        raise error
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_full_disk_is_named_when_processes_die_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.exits, "full_folders", lambda: ["/tmp/ray"])
    with pytest.raises(ConfigError, match=r"^no room left: /tmp/ray; found node 3; make room"), session.own_errors():
        raise exceptions.NodeDiedError("node 3")


def test_of_tasks_that_fail_together_one_error_is_told(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would print the tracebacks of the others."""
    monkeypatch.delenv("RAY_IGNORE_UNHANDLED_ERRORS", raising=False)
    session.connect()
    assert os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] == "1"


@pytest.mark.parametrize(
    "error", [WorkerGroupError("x", {0: KeyError("a bug")}), exceptions.RaySystemError("a bug"), KeyError("a")]
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), session.own_errors():
        raise error


# -- no Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", pytest.fail)
    return monkeypatch


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "[::1]:{port}", "no-such-host.invalid:6379", "127.0.0.1:99999"])
def test_no_cluster_at_the_address_is_one_line_at_once(address: str, not_connected: pytest.MonkeyPatch) -> None:
    """Ray itself tries for three minutes."""
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        address = address.format(port=bound.getsockname()[1])
        not_connected.setenv("RAY_ADDRESS", address)
        with pytest.raises(
            UnavailableError, match=rf"^no Ray cluster at this address: {re.escape(address)}; found .*RAY_ADDRESS"
        ):
            session.connect()


def test_what_listens_and_is_silent_is_no_cluster(not_connected: pytest.MonkeyPatch) -> None:
    not_connected.setattr(session, "_ANSWER", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        not_connected.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UnavailableError, match=r"^no Ray cluster at this address: 127.0.0.1:\d+; found timed out; start"):
            session.connect()


def test_what_speaks_another_protocol_is_no_cluster(not_connected: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        not_connected.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        answering = threading.Thread(target=answer_in_http_1, args=(server,))
        answering.start()
        with pytest.raises(UnavailableError, match=r"found what answers there is not Ray; start"):
            session.connect()
        answering.join()


def answer_in_http_1(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection, suppress(ConnectionError):
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1024):  # until the other side has closed: a reset would lose what was sent
            pass


def test_ray_at_the_address_answers(ray_session: None) -> None:
    session._check_answer(ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:1", "auto"])
def test_what_ray_says_of_an_address_is_one_line(address: str, not_connected: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise {"nonsense": ValueError, "auto": RuntimeError}.get(address, ConnectionError)("Version mismatch:\n  Ray: 1.0")

    not_connected.setattr(ray, "init", refuse)
    not_connected.setenv("RAY_ADDRESS", address)
    line = rf"^cannot join the Ray cluster: {re.escape(address)}; found Version mismatch:; check RAY_ADDRESS"
    with pytest.raises(ConfigError, match=line):
        session.connect()


def test_the_address_local_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not session.is_cluster()


def test_a_folder_of_somebody_else_is_left_alone(not_connected: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a machine that people share, whoever starts Ray first may own its default folder."""
    options: dict[str, Any] = {}
    not_connected.setattr(ray, "init", lambda **given: options.update(given))
    not_connected.setenv("RAY_TMPDIR", str(tmp_path))
    not_connected.delenv("RAY_ADDRESS", raising=False)
    closed, access = tmp_path / "ray", os.access
    session.connect()
    assert options["_temp_dir"] == str(closed)
    closed.mkdir()
    not_connected.setattr(os, "access", lambda path, mode: path != str(closed) and access(path, mode))
    session.connect()
    own = Path(options["_temp_dir"])
    assert own == tmp_path / f"ray-{os.getuid()}" and own.stat().st_mode & 0o777 == 0o700
    not_connected.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=rf"^the folder for Ray's files belongs to somebody else: {closed}; set RAY_TMPDIR"):
        session.connect()


def test_workers_look_where_the_driver_does(not_connected: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed library is found last, after what PYTHONPATH names; a checkout that the driver has is found first."""
    given: list[str] = []
    not_connected.setattr(ray, "init", lambda **options: given.append(os.environ["PYTHONPATH"]))
    not_connected.setenv("RAY_TMPDIR", str(tmp_path))
    not_connected.setenv("PYTHONPATH", "/mine")
    not_connected.delenv("RAY_ADDRESS", raising=False)
    session.connect()
    own = str(Path(session.__file__).parents[2])
    not_connected.setattr(session, "site_folders", lambda: {own})
    session.connect()
    assert given == [f"{own}{os.pathsep}/mine", "/mine"]


def test_a_ray_that_cannot_start_is_one_line(not_connected: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(**options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{options['_temp_dir']}/session")

    not_connected.setattr(ray, "init", fail)
    not_connected.setenv("RAY_TMPDIR", str(tmp_path))
    not_connected.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        ConfigError, match=rf"^cannot start Ray on this machine: {tmp_path}/ray; found no room left: {tmp_path}/ray"
    ):
        session.connect()


def test_the_innermost_error_is_found() -> None:
    inner, middle, outer = XmcError("ours"), RuntimeError("a wrapper"), RuntimeError("another")
    middle.__cause__ = inner
    outer.worker_failures = {0: middle}  # type: ignore[attr-defined]
    assert session.find_own(outer) is inner
    assert session.find_own(RuntimeError()) is None


def test_a_ray_of_this_machine_has_the_room_that_it_has(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    session.make_room("workers", 3, {"CPU": 2}, minutes=0)
    with pytest.raises(ConfigError, match=r"too few CPUs here; found 6 CPUs, 4 workers of 2 CPU; take fewer workers"):
        session.make_room("workers", 4, {"CPU": 2}, minutes=0)
    with pytest.raises(ConfigError, match=r"too few GPUs here; found 0 GPUs, 1 actors of 1 CPU and 0\.5 GPU"):
        session.check_room("actors", 1, {"CPU": 1, "GPU": 0.5})


def test_a_cluster_is_waited_for_and_then_given_up(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "there")
    monkeypatch.setattr(session, "_FIRST_LINE", 0.1)
    session.make_room("workers", 1, {"CPU": 1}, minutes=1)
    assert not capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"no room for the workers; found 1 nodes, .* after 0\.03 minutes; expected 2 workers"
    ):
        session.make_room("workers", 2, {"CPU": 64}, minutes=0.03)
    assert "waiting for 2 workers of 64 CPU; found 1 nodes, " in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"expected 1 actors of 6 CPU and 1 CPU for the tasks beside them; "):
        session.make_room("actors", 1, {"CPU": 6}, minutes=0, beside=1)  # the Ray of the session has six


def test_an_error_of_ours_is_told_and_not_what_has_caused_it() -> None:
    """An encoder that the hub does not have: an OSError of its library is behind it."""

    def load() -> None:
        try:
            raise OSError("not in the cache")
        except OSError as error:
            raise ModelError("encoder not found", where="bert") from error

    with pytest.raises(ModelError, match=r"^encoder not found: bert$"), session.own_errors():
        load()


def test_a_submitted_job_knows_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert session.submission_id() is None
    for content, expected in (('{"metadata": {"job_submission_id": "a"}}', "a"), ("{}", None), ("[]", None), ("no JSON", None)):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", content)
        assert session.submission_id() == expected
