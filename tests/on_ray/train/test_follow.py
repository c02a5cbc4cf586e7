"""Callbacks of the training job: each figure once, in one run of a tracker, however often the job is resumed."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from followers import Hangs, Raises, Recorder, forget_wandb, trackers_in
from fruit import options
from mlflow import MlflowClient
from wandb_records import offline_runs

from xmc_ray import command
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.on_ray.train import follow, job
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.on_ray.train.follow import Follower, followed

FIRST = {"step": 1, "loss": 0.5, "seconds": 1.0}
SECOND = {"step": 2, "loss": 0.25, "seconds": 2.0}
VALIDATED = {"step": 2, "validation/P@1": 0.75, "sample_loss": 0.3}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    Recorder.calls.clear()
    yield
    Recorder.calls.clear()


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    return TrainConfig(documents=DocumentsConfig(uri="x"), output=str(tmp_path / "runs" / "mine"))


def write_journal(config: TrainConfig, *entries: dict[str, Any]) -> None:
    lines = [json.dumps(entry) for entry in entries]
    Path(config.output, "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))


def test_entries_of_the_journal_become_calls(config: TrainConfig) -> None:
    with followed(config, [Recorder()]) as follower:
        for entry in (FIRST, {"step": 1, "checkpoint": "/x"}, SECOND, VALIDATED):
            follower.tell(entry)
    (run,) = Recorder.of("on_train_start")[0]
    assert run.name == "runs/mine" and run.output == config.output and not run.resumed
    assert run.settings["loop.epochs"] == 10 and run.settings["documents.uri"] == config.documents.uri
    assert Recorder.calls[1:] == [
        ("on_log", 1, {"loss": 0.5, "seconds": 1.0}),
        ("on_checkpoint", 1, "/x"),
        ("on_log", 2, {"loss": 0.25, "seconds": 2.0}),
        ("on_validation", 2, {"P@1": 0.75}),
        ("on_log", 2, {"sample_loss": 0.3}),
    ]


def test_workers_that_start_again_at_a_checkpoint_are_not_told_twice(config: TrainConfig) -> None:
    with followed(config, [Recorder()]) as follower:
        for entry in (FIRST, SECOND, VALIDATED, FIRST, SECOND, VALIDATED, {"step": 3, "loss": 0.1}):
            follower.tell(entry)
    assert [step for step, _ in Recorder.of("on_log")] == [1, 2, 2, 3] and len(Recorder.of("on_validation")) == 1


def test_a_run_that_is_resumed_keeps_its_id_and_what_was_told(config: TrainConfig) -> None:
    with followed(config, [Recorder()]):
        pass
    write_journal(config, FIRST, SECOND)
    with followed(config, [Recorder()]) as follower:
        for entry in (SECOND, VALIDATED):
            follower.tell(entry)
    first, second = [run for (run,) in Recorder.of("on_train_start")]
    assert first.id == second.id and (first.resumed, second.resumed) == (False, True)
    assert Recorder.calls[2:] == [("on_validation", 2, {"P@1": 0.75}), ("on_log", 2, {"sample_loss": 0.3})]


def test_callbacks_that_come_later_are_told_of_what_was_before(config: TrainConfig) -> None:
    write_journal(config, FIRST, SECOND, FIRST)
    with followed(config, [Recorder()]) as follower:
        follower.tell({"step": 3, "loss": 0.1})
    assert [step for step, _ in Recorder.of("on_log")] == [1, 2, 3]


def test_an_error_is_told_and_raised(config: TrainConfig) -> None:
    with pytest.raises(ModelError, match="no luck"), followed(config, [Recorder()]):
        raise ModelError("no luck")
    ((error,),) = Recorder.of("on_exception")
    assert str(error) == "no luck" and not Recorder.of("on_train_end")


def test_a_bundle_without_readable_metrics_ends_the_run_all_the_same(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with followed(config, [Recorder()]) as follower:
        follower.end(config, "0123")
    ((trained,),) = Recorder.of("on_train_end")
    assert trained.fingerprint == "0123" and trained.metrics == {} and not Recorder.of("on_exception")
    assert "warning: callbacks are told of the bundle without its metrics: " in capsys.readouterr().out


def test_an_error_before_the_first_step_is_told(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(config.output, follow.FILE).write_text("not JSON")
    with pytest.raises(DataError), followed(config, [Recorder()]):
        pytest.fail("it has begun")
    assert len(Recorder.of("on_exception")) == 1


def test_without_callbacks_nothing_is_kept(config: TrainConfig) -> None:
    with followed(config, []) as follower:
        follower.tell(FIRST)
    assert not list(Path(config.output).iterdir())


def test_a_callback_that_hangs_is_left_with_a_line(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "_PATIENCE", 0.05)
    monkeypatch.setattr(follow, "_HURRY", 0.05)
    hanging = Hangs()
    with followed(config, [hanging]) as follower:
        follower.tell(FIRST)
    assert capsys.readouterr().out == "warning: callbacks have not ended after 0 s, and are left\n"
    started = time.monotonic()
    with pytest.raises(DataError, match="too bad"), followed(config, [hanging]) as follower:
        fail(follower)
    assert time.monotonic() - started < 10
    hanging.released.set()


def fail(follower: Follower) -> None:
    follower.tell(SECOND)
    raise DataError("too bad")


def out_of_luck() -> Callable[[dict[str, Any]], None]:
    """`job.work` that fails after step 129, some steps after a checkpoint.

    A closure, because Ray sends those by value: its workers cannot import a test.
    """

    def work(settings: dict[str, Any]) -> None:
        from xmc_ray.errors import ModelError
        from xmc_ray.on_ray.train import worker

        progress = worker._progress

        def fail(step: Any, *arguments: Any) -> Any:
            if step.number == 130:
                raise ModelError("out of luck")
            return progress(step, *arguments)

        worker._progress = fail
        worker.work(settings)

    return work


@pytest.mark.usefixtures("ray_session")
def test_a_job_that_fails_and_goes_on_is_one_run_in_the_trackers(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside a callback that raises. Steps after the checkpoint are in the journal twice, and in no tracker."""
    forget_wandb()
    trackers_in(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    names = json.dumps(["mlflow", "wandb", "followers:Recorder", "followers:Raises"])
    further = f"--callbacks={names}", "--report_seconds=0", "--checkpoints.steps=20"
    config = command.parse(TrainConfig, options(fruit, tiny_encoder, tmp_path / "run", *further))
    client, failed = MlflowClient(), Raises.times
    with monkeypatch.context() as patch:
        patch.setattr(job, "work", out_of_luck())
        with pytest.raises(ModelError, match="out of luck"):
            job.run(config)
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FAILED" and run.data.metrics["train/loss"] > 0
    bundle = job.run(config)

    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = Counter(entry["step"] for entry in entries if "loss" in entry)
    assert steps[125] == 2 and max(steps) == 270
    (run,) = client.search_runs(["0"])
    logged = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(logged) == [*range(1, 271)] and run.info.status == "FINISHED"
    validated = [metric.step for metric in client.get_metric_history(run.info.run_id, "validation/P_at_1")]
    assert sorted(validated) == [108, 216, 270]
    metrics = json.loads(Path(bundle, "metrics.json").read_text())
    assert run.data.metrics["final/P_at_1"] == metrics["P@1"]
    assert run.data.metrics["final/documents/train"] == metrics["documents"]["train"]
    assert run.data.params["loop.epochs"] == "10" and run.data.tags["xmc_ray.bundle"] == bundle
    assert run.data.tags["xmc_ray.fingerprint"] == json.loads(Path(bundle, "config.json").read_text())["fingerprint"]
    report = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))
    assert Path(report).read_bytes() == (tmp_path / "run" / "report.html").read_bytes()

    known = json.loads((tmp_path / "run" / "callbacks.json").read_text())["run"]
    parts = offline_runs(tmp_path)
    assert [part["id"] for part in parts] == [known, known] and [part["exit"] for part in parts] == [1, 0]
    rows = [row["_step"] for part in parts for row in part["history"] if "train/loss" in row]
    assert sorted(rows) == [*range(1, 271)]
    assert parts[1]["summary"]["final/P@1"] == metrics["P@1"] and sorted(parts[1]["files"]) == ["README.md", "report.html"]

    starts = [run for (run,) in Recorder.of("on_train_start")]
    assert [run.id for run in starts] == [known, known] and [run.resumed for run in starts] == [False, True]
    assert [step for step, figures in Recorder.of("on_log") if "loss" in figures] == [*range(1, 271)]
    assert {step for step, _ in Recorder.of("on_checkpoint")} >= {20, 40, 140, 270}
    said = capsys.readouterr().out
    raised = "warning: callback Raises is not called any more: on_log raised RuntimeError: no luck"
    assert said.splitlines().count(raised) == 2 and Raises.times == failed + 2
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"0123456789" * 4 not in written and "0123456789" * 4 not in said
    forget_wandb()


@pytest.mark.usefixtures("ray_session")
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = command.parse(TrainConfig, options(fruit, tiny_encoder, tmp_path / "run", '--callbacks=["mlflow"]'))
    with pytest.raises(ConfigError, match=r"MLflow is missing; .*pip install 'xmc_ray\[mlflow\]'"):
        job.run(config)
    assert not (tmp_path / "run").exists()
