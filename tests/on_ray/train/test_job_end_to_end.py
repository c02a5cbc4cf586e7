"""The training job end to end on Ray, called in process with a tiny model; bad input as a user meets it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fruit import options
from safetensors.torch import load_file
from seaweed import S3

from xmc_ray import command
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.feedback import Feedback
from xmc_ray.errors import ConfigError, DataError, ModelError, XmcError
from xmc_ray.on_ray.train import job

pytestmark = pytest.mark.usefixtures("ray_session")


def train(*arguments: Any) -> str:
    return job.run(command.parse(job.TrainConfig, options(*arguments)))


def test_one_worker_learns_and_leaves_a_run_folder(trained: Path) -> None:
    entries = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scores = [entry["validation/P@1"] for entry in entries if "validation/P@1" in entry]
    assert len(scores) >= 2 and scores[-1] > 0.9
    assert any("documents_per_second" in entry for entry in entries)
    assert list((trained / "tensorboard").glob("events*"))
    assert "seed = 6088" in (trained / "run.toml").read_text()
    assert list((trained / "checkpoints").rglob("checkpoint.json"))
    bundle = XMCClassifier.load(str(trained / "bundle"))
    (tags,) = bundle.predict(["a green plum"], k=3)
    assert {label for label, _ in tags} == {"fruit", "green", "plum"}
    metrics, calibration = bundle.bundle.metrics, bundle.bundle.calibration
    assert metrics["P@1"] == max(scores)
    assert calibration is not None and metrics["calibration"]["predictions"] == len(calibration) > 0
    assert calibration.arithmetic == metrics["calibration"]["arithmetic"] == "cpu float32"
    assert metrics["calibration"]["ECE@5"] < 0.3 and set(metrics["calibration"]["thresholds"]) == {"0.5", "0.8", "0.9"}


def test_two_workers_on_object_storage(fruit: Path, tiny_encoder: Path, s3: S3, trained: Path) -> None:
    """With a linear ranker, half of whose labels each of them solves."""
    ranked = "--lexical.width=8", "--lexical.columns=512", "--linear.candidates=5"
    bundle = train(fruit, os.path.relpath(tiny_encoder), s3.uri("runs/two"), "--workers.count=2", *ranked)
    classifier = XMCClassifier.load(bundle)
    (tags,) = classifier.predict(["a yellow grape"], k=3)
    assert {label for label, _ in tags} == {"fruit", "yellow", "grape"}
    linear, metrics = classifier.bundle.model.linear, classifier.bundle.metrics
    assert linear is not None and linear.candidates == 5 and len(linear.bias_L) == 8 and len(linear.weight_W)
    assert metrics["P@1"] > 0.9 and classifier.bundle.calibration is not None


def test_without_held_out_documents_there_is_no_calibration(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    few = "--validation.share=0", "--loop.epochs=3", "--validation.every=1"
    bundle = train(fruit, tiny_encoder, tmp_path / "run", *few)
    opened = XMCClassifier.load(bundle).bundle
    entries = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [entry["step"] for entry in entries if "sample_loss" in entry] == [90]  # one, though there are three passes
    assert opened.calibration is None and opened.metrics["calibration"] == {"documents": 0, "predictions": 0}


def test_a_run_is_not_resumed_with_other_feedback(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """The bundle names what it was trained with; the same command with other verdicts at the same place is refused."""
    path, words = tmp_path / "feedback.parquet", ["--encoder.layers=0", "--lexical.width=8", "--lexical.columns=512"]
    settings = *words, "--loop.epochs=1", "--validation.share=0", "--checkpoints.keep=true", f"--feedback.uri={path}"
    pq.write_table(pa.table({"id": ["train-0"], "label": ["fruit"], "verdict": ["rejected"]}), path)
    bundle = Path(train(fruit, tiny_encoder, tmp_path / "run", *settings))
    fingerprint = Feedback.read(str(path)).fingerprint
    assert json.loads((bundle / "config.json").read_text())["feedback"] == fingerprint
    assert json.loads((bundle / "metrics.json").read_text())["feedback"] == fingerprint
    shutil.rmtree(bundle)
    pq.write_table(pa.table({"id": ["train-0"], "label": ["fruit"], "verdict": ["accepted"]}), path)
    with pytest.raises(ModelError, match=f"the checkpoint is of a run with other feedback.*found {fingerprint}"):
        train(fruit, tiny_encoder, tmp_path / "run", *settings)
    with pytest.raises(ConfigError, match=r"the run folder holds a run with other settings.*feedback\.weight"):
        train(fruit, tiny_encoder, tmp_path / "run", *settings, "--feedback.weight=2")


BAD = {
    "missing file": (["--documents.uri=/nowhere/x.parquet"], DataError, "/nowhere/x.parquet"),
    "encoder not found": (["--encoder.name=/nowhere/encoder"], ModelError, "/nowhere/encoder"),
    "wrong column": (['--documents.text=["words"]'], DataError, "words"),
    "no feedback": (["--feedback.uri=/nowhere/feedback.parquet"], DataError, "/nowhere/feedback.parquet"),
    "no label names": (["--label_names=/nowhere/names.parquet"], DataError, "/nowhere/names.parquet"),
    "more workers than groups": (["--workers.count=5"], ConfigError, "5 workers, 4 groups"),
    "batch and workers": (["--workers.count=4", "--loop.batch_size=3"], ConfigError, "cannot share a batch"),
    "nothing to resume from": (["--resume=/nowhere/checkpoint"], ModelError, "/nowhere/checkpoint"),
    "gpu where there is none": (["--workers.gpu=true"], ConfigError, "found 0 GPUs, 1 workers of 1 CPU and 1 GPU"),
    "more CPUs than there are": (["--workers.count=2", "--workers.cpus=4"], ConfigError, "found 6 CPUs, 2 workers of 4 CPU"),
    "too many tokens": (["--text.max_tokens=100000"], ConfigError, "max_tokens"),
    "too many layers": (["--encoder.layers=99"], ConfigError, "encoder.layers"),
    "non-finite loss": (["--optim.rows_lr=1e30", "--optim.warmup=0", "--optim.clip_norm=0"], ModelError, "step"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_training_input_is_one_clear_line(case: str, fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    further, kind, told = BAD[case]
    with pytest.raises(XmcError) as caught:
        train(fruit, tiny_encoder, tmp_path / "run", *further)
    assert type(caught.value) is kind
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "bundle").exists()


RESUMED: dict[str, tuple[list[str], Callable[[dict[str, Any]], Any], str]] = {
    "another label set": ([], lambda marker: marker["identity"].update(labels="0123"), "other labels"),
    "another encoder of the same name": ([], lambda marker: marker["identity"].update(encoder="0123"), "other encoder"),
    "another model shape": (["--model.bottleneck=8"], lambda marker: None, "other model"),
    "other batches": (["--loop.batch_size=12"], lambda marker: None, "other documents"),
    "a newer format": ([], lambda marker: marker.update(xmc_ray_checkpoint=99), "newer format"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_start_that_does_not_fit_is_told_before_any_training(
    case: str, fruit: Path, tiny_encoder: Path, trained: Path, tmp_path: Path
) -> None:
    further, change, told = RESUMED[case]
    shutil.copytree(sorted((trained / "checkpoints").glob("step-*"))[-1], tmp_path / "step-000000270")
    marker = tmp_path / "step-000000270" / "checkpoint.json"
    content = json.loads(marker.read_text())
    change(content)
    marker.write_text(json.dumps(content))
    start, cache = f"--resume={tmp_path / 'step-000000270'}", f"--cache={trained.parent / 'cache'}"
    with pytest.raises(ModelError, match=told):
        train(fruit, tiny_encoder, tmp_path / "run", start, cache, *further)
    assert not (tmp_path / "run").exists()


def test_a_run_begins_at_the_checkpoint_it_is_given(
    fruit: Path, tiny_encoder: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On fewer workers than asked for, since the cluster has no room for more."""
    first = sorted((trained / "checkpoints").glob("step-*"))[0]
    room_for_one = ["--workers.count=2", "--workers.least=1", "--workers.cpus=4"]
    train(fruit, tiny_encoder, tmp_path / "run", f"--resume={first}", f"--cache={trained.parent / 'cache'}", *room_for_one)
    assert not (tmp_path / "run" / "checkpoints").exists()
    step = int(first.name.removeprefix("step-"))
    assert f"training with 1 workers after step {step}, saved by 1: {first}" in capfd.readouterr().out
    bundles = [load_file(folder / "bundle" / "model.safetensors") for folder in (trained, tmp_path / "run")]
    assert all(torch.equal(tensor, bundles[1][name]) for name, tensor in bundles[0].items())


def test_a_run_killed_in_its_last_validation_has_it_after_all(
    fruit: Path, tiny_encoder: Path, trained: Path, tmp_path: Path
) -> None:
    """What such a run leaves: its last step is saved, without a score, and there is no bundle."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))
    settings = (tmp_path / "run" / "run.toml").read_text()
    (tmp_path / "run" / "run.toml").write_text(settings.replace(str(trained), str(tmp_path / "run")))
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "checkpoint.json"
    marker = json.loads(newest.read_text())
    expected = marker["metrics"]
    newest.write_text(json.dumps(marker | {"score": None, "metrics": {}}))
    train(fruit, tiny_encoder, tmp_path / "run", f"--cache={trained.parent / 'cache'}", "--checkpoints.keep=true")
    assert expected and json.loads(newest.read_text())["metrics"] == expected
    bundles = [load_file(folder / "bundle" / "model.safetensors") for folder in (trained, tmp_path / "run")]
    assert all(torch.equal(tensor, bundles[1][name]) for name, tensor in bundles[0].items())


@pytest.mark.parametrize(
    ("labels", "told"),
    [([], "empty|no input|no document"), ([[], []], "no document has a label"), ([None, None], "no document has a label")],
)
def test_empty_and_unlabelled_data(labels: list[Any], told: str, tiny_encoder: Path, tmp_path: Path) -> None:
    schema = pa.schema({"id": pa.string(), "text": pa.string(), "labels": pa.list_(pa.string())})
    rows = [{"id": f"{n}", "text": "a red apple", "labels": row} for n, row in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "train.parquet")
    pq.write_table(pa.table({"label": ["red"], "name": ["Red"]}), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match=told):
        train(tmp_path, tiny_encoder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_alone_and_another_is_refused(fruit: Path, tiny_encoder: Path, trained: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    assert train(fruit, tiny_encoder, trained, "--workers.count=2") == str(trained / "bundle")
    with pytest.raises(ConfigError, match=r"other settings: .*found optim\.rows_lr = 0\.08 instead of 0\.5"):
        train(fruit, tiny_encoder, trained, "--optim.rows_lr=0.5")
    with pytest.raises(ConfigError, match="not empty"):
        train(fruit, tiny_encoder, trained, "--resume=never")
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_a_folder_of_something_else_is_refused(fruit: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty: .*precious\.txt"):
        train(fruit, tiny_encoder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_that_learns_nothing_says_so_in_the_log_the_exit_line_and_the_report(
    fruit: Path, tiny_encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Numbers: a loss that ends above its start."""
    wild = ["--optim.rows_lr=12", "--optim.head_lr=0", "--optim.encoder_lr=0", "--optim.warmup=0", "--optim.decay=false"]
    train(fruit, tiny_encoder, tmp_path / "run", *wild, "--loop.epochs=1")
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("WARNING: the model is no better than an untrained one")]
    assert [line for line in lines if line.startswith("bundle ") and "; WARNING: the model is no better" in line]
    assert "The model is no better than an untrained one" in (tmp_path / "run" / "report.html").read_text()
