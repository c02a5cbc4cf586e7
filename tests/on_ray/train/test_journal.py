"""The journal of a training run: what workers report is printed, kept, and copied to the run folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from xmc_ray.errors import ModelError, UnavailableError
from xmc_ray.on_ray.train.journal import journal
from xmc_ray.storage import files, folders

pytestmark = pytest.mark.usefixtures("ray_session")

REPORTS: list[dict[str, Any]] = [
    {"line": "training with 1 workers"},
    {"line": "step 1", "step": 1, "loss": 0.5},
    {"line": "step 2: validation", "step": 2, "validation/P@1": 0.25},
]


def report(output: Path, *entries: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps in ``metrics.jsonl`` after a journal with these entries."""
    with journal(str(output)) as mailbox:
        for entry in entries:
            mailbox.put(entry)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_printed_and_steps_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(tmp_path, *REPORTS) == [{"step": 1, "loss": 0.5}, {"step": 2, "validation/P@1": 0.25}]
    assert capsys.readouterr().out.splitlines() == [entry["line"] for entry in REPORTS]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_run_that_goes_on_adds_to_its_journal(tmp_path: Path) -> None:
    report(tmp_path, *REPORTS[:2])
    assert [entry["step"] for entry in report(tmp_path, REPORTS[2])] == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("a loss is not finite")])
def test_what_ends_training_is_what_is_told(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for, and no error of the journal, whose storage or mailbox is gone, comes in its place."""
    monkeypatch.setattr(files.time, "sleep", pytest.fail)

    def train() -> None:
        with journal(str(tmp_path)) as mailbox:
            mailbox.put(REPORTS[1])
            monkeypatch.setattr(folders, "upload", always_away)
            ray.kill(mailbox.actor)
            raise error

    with pytest.raises((KeyboardInterrupt, ModelError)):
        train()


def always_away(*arguments: Any) -> None:
    raise UnavailableError("away")


def test_a_storage_that_is_away_delays_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, failures = folders.upload, [UnavailableError("away")] * 3

    def failing(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        upload(*arguments)

    monkeypatch.setattr(folders, "upload", failing)
    monkeypatch.setattr(files, "_PAUSE", 0)
    assert [entry["step"] for entry in report(tmp_path, *REPORTS)] == [1, 2] and not failures


def test_what_is_told_is_in_the_run_folder_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a driver that is killed has told of nothing that the next one would not find there."""
    told: list[dict[str, Any]] = []
    upload, uploads = folders.upload, []

    def failing(*arguments: Any) -> None:
        uploads.append(len(told))
        if len(uploads) == 1:
            raise UnavailableError("away")
        upload(*arguments)

    def tell(entry: dict[str, Any]) -> None:
        written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert entry in written or "checkpoint" in entry
        told.append(entry)

    monkeypatch.setattr(folders, "upload", failing)
    checkpoint = {"step": 2, "checkpoint": "/run/checkpoints/step-000000002"}
    with journal(str(tmp_path), tell) as mailbox:
        for entry in (*REPORTS, checkpoint):
            mailbox.put(entry)
    assert uploads == [0, 0]
    assert told == [{"step": 1, "loss": 0.5}, {"step": 2, "validation/P@1": 0.25}, checkpoint]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
