"""Runs in the offline mode of Weights & Biases, read back from the files that it syncs later."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from followers import forget_wandb, trackers_in
from wandb_records import offline_runs

from xmc_ray import WandbCallback
from xmc_ray.callbacks.callback import Run, Trained

RUN = Run(name="runs/mine", settings={"loop.epochs": 3, "documents.text": ["title", "body"]})


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    trackers_in(tmp_path, monkeypatch)
    yield
    forget_wandb()


def test_a_run_is_all_there(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>é</p>")
    callback = WandbCallback()
    callback.on_train_start(RUN)
    callback.on_log(1, {"loss": 0.5})
    callback.on_log(20, {"loss": 0.25, "documents_per_second": 100.0})
    callback.on_validation(20, {"P@1": 0.75})
    files = {"report.html": str(report)}
    callback.on_train_end(Trained(metrics={"P@1": 0.8}, bundle="/runs/mine/bundle", fingerprint="0123", files=files))
    (run,) = offline_runs(tmp_path)
    assert (run["id"], run["name"], run["project"], run["exit"]) == (RUN.id, "runs/mine", "xmc_ray", 0)
    assert run["config"]["loop.epochs"] == 3 and run["config"]["documents.text"] == ["title", "body"]
    first, second = run["history"]
    assert (first["_step"], first["train/loss"]) == (1, 0.5)
    assert (second["_step"], second["train/loss"], second["validation/P@1"]) == (20, 0.25, 0.75)
    assert second["train/documents_per_second"] == 100.0
    summary = run["summary"]
    assert (summary["final/P@1"], summary["bundle"], summary["fingerprint"]) == (0.8, "/runs/mine/bundle", "0123")
    assert run["files"] == ["report.html"]


def test_a_resumed_run_has_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline each part of it is a folder; ``wandb sync`` makes one run of them."""
    monkeypatch.setenv("WANDB_PROJECT", "tags")
    first = WandbCallback()
    first.on_train_start(RUN)
    first.on_log(1, {"loss": 0.5})
    first.on_exception(KeyboardInterrupt())
    second = WandbCallback(project="others")
    second.on_train_start(replace(RUN, settings={"loop.epochs": 4}, resumed=True))
    second.on_log(2, {"loss": 0.25})
    second.on_train_end(Trained(metrics={}))
    before, after = offline_runs(tmp_path)
    assert before["id"] == after["id"] == RUN.id
    assert (before["exit"], after["exit"]) == (1, 0) and (before["project"], after["project"]) == ("tags", "others")
    steps = [(entry["_step"], entry["train/loss"]) for part in (before, after) for entry in part["history"]]
    assert steps == [(1, 0.5), (2, 0.25)]


def test_what_no_run_was_opened_for_is_not_logged(tmp_path: Path) -> None:
    callback = WandbCallback()
    callback.on_log(1, {"loss": 0.5})
    callback.on_train_end(Trained(metrics={}))
    callback.on_exception(ValueError())
    assert offline_runs(tmp_path) == []
