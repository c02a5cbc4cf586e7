"""What a night says of itself: on the console, to a board, and when it ends in whatever way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fruit import document, manifest_of, write
from in_process import InProcess

from xmc_ray.errors import DataError, XmcError
from xmc_ray.on_ray.tag.gauges import Value
from xmc_ray.on_ray.tag.progress import Pace
from xmc_ray.on_ray.tag.status import Reporter, Status, reported
from xmc_ray.storage import outage

DATE = "2026-11-23"


class Clock:
    seconds = 1_795_400_000.0

    def __call__(self) -> float:
        return self.seconds


def shown(values: list[Value]) -> dict[str, float]:
    """Values by name, and what their own label says."""
    return {".".join([name, *labels.values()]): value for name, labels, value in values}


def test_a_phase_is_said_and_counts_as_progress(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    status = Status(DATE, clock)
    clock.seconds += 60
    status.enter("census")
    assert status.progressed == clock.seconds
    status.enter("room")
    status.enter("gate", "skipped")
    status.drift = {"training": 0.3, "previous": None}
    assert capsys.readouterr().out.splitlines() == ["census", "gate: skipped"]
    values = shown(status.values())
    assert [name for name, value in values.items() if name.startswith("phase.") and value] == ["phase.gate"]
    assert values["drift.training"] == 0.3 and "drift.previous" not in values
    assert values["date_seconds"] == 1_795_392_000 and values["documents.tagged"] == 0, "a series begins before it grows"


def test_the_end_is_a_time_of_success_or_of_failure() -> None:
    for phase, name in (("finished", "success_seconds"), ("failed", "failure_seconds")):
        clock = Clock()
        status = Status(DATE, clock)
        status.pace = Pace(10, clock=clock)
        for _ in range(2):
            clock.seconds += 1
            status.pace.add(1)
        assert "left_seconds" in shown(status.values())
        assert not {"success_seconds", "failure_seconds"} & shown(status.values()).keys()
        status.end(phase)  # type: ignore[arg-type]
        clock.seconds += 100
        values = shown(status.values())
        assert values[name] == clock.seconds - 100 and len({"success_seconds", "failure_seconds"} & values.keys()) == 1
        assert "left_seconds" not in values and status.is_over


def test_storage_that_is_silent_is_told() -> None:
    status = Status(DATE)
    assert shown(status.values())["storage_silent_seconds"] == 0
    outage.OUTAGE.begin("a test", OSError("gone"))
    try:
        assert 0 <= shown(status.values())["storage_silent_seconds"] < 60
    finally:
        outage.OUTAGE.end("a test")


def test_what_ends_a_night_before_it_begins_is_reported_beside_the_night() -> None:
    runner, opened = InProcess(), list[bool]()

    def board(is_night: bool) -> InProcess:
        opened.append(is_night)
        return runner

    reporter = Reporter(Status(DATE), board)
    with pytest.raises(DataError), reported(reporter):
        raise DataError("no input")
    assert opened == [False] and shown(runner.told[-1])["phase.failed"] == 1
    quiet = Reporter(Status(DATE), board)
    with reported(quiet):
        pass  # it was finished before
    assert opened == [False]


def test_a_night_does_not_fail_for_a_board_that_does() -> None:
    def board(is_night: bool) -> Any:
        raise RuntimeError("no board")

    reporter = Reporter(Status(DATE), board)
    with reported(reporter):
        reporter.begin()
        reporter.status.end("finished")


@pytest.fixture
def night(tag_with: Callable[..., str]) -> Callable[..., tuple[str, InProcess]]:
    """A night in this process, and the runner, which notes what was asked of it."""

    def tag(*arguments: object, **settings: Any) -> tuple[str, InProcess]:
        runner = InProcess()
        return tag_with(runner, *arguments, **settings), runner

    return tag


def test_a_night_says_its_phases_and_tells_them(
    night: Callable[..., tuple[str, InProcess]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [document(n) for n in range(30)]
    catalogue = write(tmp_path / "in.parquet", rows)
    first, runner = night(catalogue)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["census", "plan: 30 rows, 30 to tag in 1 pieces", "tagging", "publishing"]
    assert runner.rooms == 1 and runner.boards == [(str(tmp_path / "out"), {"output": str(tmp_path / "out"), "date": DATE})]
    told = shown(runner.told[-1])
    assert (told["phase.finished"], told["documents.tagged"], told["rows.all"], told["rows.to tag"]) == (1, 30, 30, 30)
    assert told["attempt"] == 1

    write(tmp_path / "in.parquet", [*rows[:29], {"id": "new", "text": "a red plum"}, {"id": "bad", "text": None}])
    _, runner = night(catalogue, "--previous=last", date="2026-11-24", max_reject_share=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["census", "plan: 31 rows, 1 to tag in 1 pieces", f"reusing: 29 documents of {first}", "tagging"]
    told = shown(runner.told[-1])
    assert [told[f"documents.{name}"] for name in ("tagged", "reused", "rejected")] == [1, 29, 1]
    assert told["rejects.text is null"] == 1


def test_a_night_with_nothing_to_tag_asks_for_no_machine_loads_no_model_and_passes_no_gate(
    night: Callable[..., tuple[str, InProcess]],
    fruit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not even for rows that are rejects, old ones or new."""
    bad = [{"id": f"bad{n}", "text": None} for n in range(3)]
    rows = [document(n) for n in range(30)]
    first, _ = night(write(tmp_path / "in.parquet", rows + bad), max_reject_share=0.5)

    def no_model(*_: object) -> None:
        raise AssertionError("a model was loaded, or evaluated")

    monkeypatch.setattr("xmc_ray.on_ray.tag.job.load_predictor", no_model)
    monkeypatch.setattr("xmc_ray.on_ray.tag.job.pass_gate", no_model)
    capsys.readouterr()
    write(tmp_path / "in.parquet", [*bad[::-1], *rows, {"id": "more", "text": " "}])
    gate = [f'--gate.documents={{"uri": "{fruit}/test.parquet"}}', '--gate.at_least={"P@1": 0.5}']
    second, runner = night(tmp_path / "in.parquet", "--previous=last", *gate, date="2026-11-24", max_reject_share=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert "plan: 34 rows, 0 to tag in 1 pieces" in lines and "gate: skipped, since the bundle tags nothing" in lines
    manifest = manifest_of(second)
    assert [manifest[name] for name in ("in", "tagged", "reused", "rejected")] == [34, 0, 30, 4]
    assert runner.rooms == 0 and manifest["scoring"] == manifest_of(first)["scoring"]


def test_what_a_night_with_nothing_to_tag_has_left_open_is_measured_by_the_next(
    night: Callable[..., tuple[str, InProcess]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def settle(model: Any, *_: object) -> Any:
        asked.append(model.scoring)
        return replace(model, scoring="exact")

    monkeypatch.setattr("xmc_ray.on_ray.tag.job.settle_scoring", settle)
    auto = "--model.scoring=auto"
    first, _ = night(write(tmp_path / "in.parquet", [{"id": "bad", "text": None}]), auto, max_reject_share=1.0)
    write(tmp_path / "in.parquet", [document(n) for n in range(5)])
    second, _ = night(tmp_path / "in.parquet", auto, "--previous=last", date="2026-11-24", max_reject_share=1.0)
    assert manifest_of(first)["scoring"] == "auto" and manifest_of(second)["not_reused"] is None
    assert asked == ["auto"] and manifest_of(second)["scoring"] == "exact"


def test_the_gate_comes_after_the_census_and_before_anything_is_written(
    night: Callable[..., tuple[str, InProcess]], fruit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = [f'--gate.documents={{"uri": "{fruit}/test.parquet"}}', '--gate.at_least={"P@5": 0.99}']
    with pytest.raises(XmcError):
        night(write(tmp_path / "in.parquet", [document(n) for n in range(30)]), *gate)
    assert capsys.readouterr().out.splitlines()[:3] == ["census", "plan: 30 rows, 30 to tag in 1 pieces", "gate"]
    assert not (tmp_path / "out").exists()


def test_attempts_are_counted_from_the_one_that_begins_the_night(
    night: Callable[..., tuple[str, InProcess]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = write(tmp_path / "in.parquet", [document(n) for n in range(30)])

    def fail(*_: object) -> None:
        raise DataError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr("xmc_ray.on_ray.tag.job._Tagging._tagged", fail)
        for _ in range(2):
            with pytest.raises(DataError, match="interrupted"):
                night(catalogue)
    assert shown(night(catalogue)[1].told[-1])["attempt"] == 3
