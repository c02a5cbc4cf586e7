"""Runs in MLflow's file store, read back through its own API."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from followers import trackers_in
from mlflow import MlflowClient
from mlflow.entities import Run as Logged

from xmc_ray import MLflowCallback
from xmc_ray.callbacks.callback import Run, Trained

RUN = Run(name="runs/mine", settings={f"part.setting_{n}": n for n in range(150)} | {"loop.epochs": 3}, output="/runs/mine")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    trackers_in(tmp_path, monkeypatch)
    return MlflowClient()


def runs(client: MlflowClient, experiment: str = "Default") -> list[Logged]:
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    return list(client.search_runs([known.experiment_id]))


def history(client: MlflowClient, run: Logged, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def test_names_of_settings_may_hold_what_mlflow_does_not_take(client: MlflowClient) -> None:
    """Fields of documents are such names."""
    fields = {"text.fields.title (en)": 2.0, "text.fields.title@en": 1.0, "text.fields.a,b": 1.0, "text.fields.a#b": 3.0}
    MLflowCallback().on_train_start(replace(RUN, settings=fields))
    (run,) = runs(client)
    expected = {"text.fields.title _en_": "2.0", "text.fields.title_at_en": "1.0", "text.fields.a_b": "3.0"}
    assert run.data.params == expected


def test_a_run_is_all_there(client: MlflowClient, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>é</p>")
    callback = MLflowCallback()
    callback.on_train_start(RUN)
    callback.on_log(1, {"loss": 0.5, "documents_per_second": 100.0})
    callback.on_log(20, {"loss": 0.25})
    callback.on_validation(20, {"P@1": 0.75})
    (run,) = runs(client)
    assert run.info.status == "RUNNING"
    trained = Trained(metrics={"P@1": 0.8, "calibration/ECE@5": 0.1}, bundle="/runs/mine/bundle", fingerprint="0123", files={})
    callback.on_train_end(replace(trained, files={"report.html": str(report)}))
    (run,) = runs(client)
    assert run.info.run_name == "runs/mine" and run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in RUN.settings.items()}
    assert history(client, run, "train/loss") == [(1, 0.5), (20, 0.25)]
    assert history(client, run, "train/documents_per_second") == [(1, 100.0)]
    assert history(client, run, "validation/P_at_1") == [(20, 0.75)]
    assert run.data.metrics["final/P_at_1"] == 0.8 and run.data.metrics["final/calibration/ECE_at_5"] == 0.1
    tags = run.data.tags
    assert tags["xmc_ray.run"] == RUN.id and tags["xmc_ray.output"] == "/runs/mine"
    assert tags["xmc_ray.bundle"] == "/runs/mine/bundle" and tags["xmc_ray.fingerprint"] == "0123"
    (artifact,) = client.list_artifacts(run.info.run_id)
    assert artifact.path == "report.html"
    assert Path(client.download_artifacts(run.info.run_id, "report.html", str(tmp_path))).read_text() == "<p>é</p>"


@pytest.mark.parametrize(("error", "status"), [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_resumed_run_goes_on_in_the_same_one(error: BaseException, status: str, client: MlflowClient) -> None:
    """Also with other settings, where they may change: MLflow keeps the first value of a param."""
    first = MLflowCallback()
    first.on_train_start(RUN)
    first.on_log(1, {"loss": 0.5})
    first.on_exception(error)
    (before,) = runs(client)
    assert before.info.status == status
    other: dict[str, Any] = {**RUN.settings, "part.setting_0": 99, "new": True}
    second = MLflowCallback()
    second.on_train_start(replace(RUN, settings=other, resumed=True))
    second.on_log(2, {"loss": 0.25})
    (run,) = runs(client)
    assert run.info.run_id == before.info.run_id and run.info.status == "RUNNING"
    assert run.data.params["part.setting_0"] == "0" and run.data.params["new"] == "True"
    assert history(client, run, "train/loss") == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("place", ["argument", "name", "id"])
def test_the_experiment_is_the_one_that_is_named(place: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "name":
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tags")
    if place == "id":
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("tags"))
    for _ in range(2):
        callback = MLflowCallback("tags" if place == "argument" else None)
        callback.on_train_start(Run(name="x", settings={}))
    assert len(runs(client, "tags")) == 2


def test_what_no_run_was_opened_for_is_not_logged(client: MlflowClient) -> None:
    callback = MLflowCallback()
    callback.on_log(1, {"loss": 0.5})
    callback.on_train_end(Trained(metrics={}))
    callback.on_exception(ValueError())
    assert runs(client) == []
