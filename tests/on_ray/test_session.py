"""The session: which Ray it is, whether it has room, and our own errors out of it."""

from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data

from xmc_ray.errors import ConfigError, DataError, XmcError
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
