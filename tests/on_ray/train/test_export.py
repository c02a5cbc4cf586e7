"""The best checkpoint of a run becomes its bundle, calibrated on documents of their own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from fruit import COLOURS, KINDS

from xmc_ray import storage
from xmc_ray.bundle.content import load_bundle
from xmc_ray.command import to_toml
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.groups import LabelGroups
from xmc_ray.data.labels import LabelIndex
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.predict import PredictConfig
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.on_ray.train import export
from xmc_ray.on_ray.train.config import TrainConfig, WorkersConfig
from xmc_ray.on_ray.train.export import keep_best, predict_held_out
from xmc_ray.training.checkpoint import Checkpoints, CheckpointsConfig
from xmc_ray.training.fit import build_model, predictions_and_hits
from xmc_ray.training.loop import TrainState

LABELS = [["fruit", colour, kind] for colour in COLOURS for kind in KINDS]
TEXTS = [f"a {colour} {kind}" for _, colour, kind in LABELS]


class Tokens:
    """What `keep_best` asks of a token cache: the documents held out for calibration."""

    def __init__(self, table: pa.Table | None) -> None:
        self.table = table

    def some(self, split: str, documents: int) -> Any:
        assert split == "calibration"
        return np.arange(0 if self.table is None else 1)

    def chunks(self, split: str, numbers: Any) -> Iterator[pa.Table]:
        yield from [self.table] * len(numbers)


@pytest.fixture
def prepared(tiny_encoder: Path) -> Any:
    lists, tokenizer = pa.array(LABELS), Tokenizer.load(tiny_encoder, 16)
    labels = LabelIndex.count([lists])
    table = pa.table({"tokens": tokenizer.encode(pa.array(TEXTS))[0], "labels": labels.encode(lists)})
    groups = LabelGroups(np.arange(len(labels)) % 3)
    parts = {"tokenizer": tokenizer, "labels": labels, "groups": groups, "term_weights": None}
    return SimpleNamespace(tokens=Tokens(table), counts={"train": len(table)}, feedback=None, **parts)


@pytest.fixture
def config(tiny_encoder: Path, tmp_path: Path) -> TrainConfig:
    encoder = EncoderConfig(name=str(tiny_encoder), layers=1, feature_layers=2, pooling="mean")
    model = ModelConfig(shortlist=3, bottleneck=16)
    return TrainConfig(documents=DocumentsConfig(uri="x"), output=str(tmp_path), encoder=encoder, model=model)


def checkpoints(folder: Path, prepared: Any, config: TrainConfig, scores: list[float | None]) -> list[dict[str, torch.Tensor]]:
    """Checkpoints of steps 1, 2 and so on, with biases that tell them apart; their weights."""
    state = TrainState.start(build_model(config, prepared.tokenizer, prepared.labels, prepared.groups), config.optim)
    saving, weights = Checkpoints(str(folder), CheckpointsConfig(keep_last=9), {}), []
    for step, score in enumerate(scores, 1):
        state.step = step
        with torch.no_grad():
            state.model.recall.bias.fill_(-float(step))
        saving.save(state, score, {} if score is None else {"P@1": score})
        weights.append({name: tensor.clone() for name, tensor in state.model.state_dict().items()})
    saving.wait()
    return weights


@pytest.mark.parametrize(("scores", "kept"), [([0.2, 0.9, 0.5], 2), ([None, None, None], 3), ([0.9, 0.9, None], 2)])
def test_the_best_is_kept_or_else_the_last(
    scores: list[float | None], kept: int, prepared: Any, config: TrainConfig, tmp_path: Path
) -> None:
    weights = checkpoints(tmp_path / "checkpoints", prepared, config, scores)
    fingerprint = keep_best(config, prepared)
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.fingerprint == fingerprint and bundle.run_toml == to_toml(config)
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, weights[kept - 1][name]), name
    assert bundle.metrics["step"] == kept and bundle.metrics.get("P@1") == scores[kept - 1]
    assert bundle.calibration is not None
    measured = bundle.metrics["calibration"]
    assert measured["documents"] == len(TEXTS) and measured["predictions"] == len(bundle.calibration) > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_calibration_is_fitted_by_the_arithmetic_of_training(
    precision: Any, prepared: Any, config: TrainConfig, tmp_path: Path
) -> None:
    """Kind: calibration is fitted by one arithmetic and applied to scores of another."""
    config = replace(config, loop=replace(config.loop, precision=precision))
    checkpoints(tmp_path / "checkpoints", prepared, config, [0.5])
    keep_best(config, prepared)
    bundle, table = load_bundle(str(tmp_path / "bundle")), prepared.tokens.table
    documents, truth = (table[name].combine_chunks() for name in ("tokens", "labels"))
    expected = predictions_and_hits(bundle.model, documents, truth, len(prepared.labels), PredictConfig(precision=precision))
    assert bundle.calibration is not None
    np.testing.assert_array_equal(bundle.calibration.score_N, expected[0][expected[1] >= 0])
    assert bundle.calibration.arithmetic == bundle.metrics["calibration"]["arithmetic"] == f"cpu {precision}"


def test_calibration_is_fitted_on_the_resources_of_a_worker(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind: what a worker computes with a GPU is computed again by the driver, which has none, and other threads."""
    assert export.ask_a_worker(config, sum, [1, 2]) == 3, "on one machine there is nobody else to ask"
    monkeypatch.setattr(export, "is_cluster", lambda: True)
    asked: dict[str, Any] = {}
    task = SimpleNamespace(remote=lambda *arguments: arguments)
    monkeypatch.setattr(ray, "remote", lambda work: SimpleNamespace(options=lambda **given: asked.update(given) or task))
    monkeypatch.setattr(ray, "get", lambda arguments: arguments)
    monkeypatch.setattr(export, "make_room", lambda *wanted: asked.update(room=wanted))
    config = replace(config, workers=WorkersConfig(count=2, gpu=True, cpus=3, threads=1, patience=5))
    assert export.ask_a_worker(config, predict_held_out, "saved", "prepared") == ("saved", "prepared")
    assert asked == {"num_cpus": 3, "num_gpus": 1, "room": ("workers", 1, {"CPU": 3.0, "GPU": 1.0}, 5)}
    threads = torch.get_num_threads()
    assert export.settle(config).type == "cuda" and torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_without_held_out_documents_there_is_no_calibration(prepared: Any, config: TrainConfig, tmp_path: Path) -> None:
    checkpoints(tmp_path / "checkpoints", prepared, config, [None])
    prepared.tokens = Tokens(None)
    keep_best(config, prepared)
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.calibration is None and bundle.metrics["calibration"] == {"documents": 0, "predictions": 0}


def test_a_model_of_everything_takes_the_calibration_of_another(prepared: Any, config: TrainConfig, tmp_path: Path) -> None:
    checkpoints(tmp_path / "checkpoints", prepared, config, [0.5])
    keep_best(config, prepared)
    first = load_bundle(str(tmp_path / "bundle")).calibration
    file = tmp_path / "calibration.parquet"
    (tmp_path / "bundle" / "calibration.parquet").rename(file)
    (tmp_path / "bundle" / "config.json").unlink()
    prepared.tokens = Tokens(None)
    keep_best(replace(config, calibration=str(file)), prepared)
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert first is not None and bundle.calibration is not None
    np.testing.assert_array_equal(bundle.calibration.score_N, first.score_N)
    assert bundle.calibration.arithmetic == first.arithmetic == "cpu float32"
    measured = bundle.metrics["calibration"]
    assert measured["taken_from"] == str(file) and measured["documents"] == 0 and measured["predictions"] == len(first)


def test_a_calibration_of_other_labels_is_refused(prepared: Any, config: TrainConfig, tmp_path: Path) -> None:
    checkpoints(tmp_path / "checkpoints", prepared, config, [0.5])
    for table in (pa.table({"label": [0], "score": [0.5], "hit": [True]}), prepared.labels.to_table()):
        storage.write_parquet(tmp_path / "other.parquet", table)
        with pytest.raises(ModelError, match=r"the calibration is of other labels: .*other\.parquet; .*of the same documents"):
            keep_best(replace(config, calibration=str(tmp_path / "other.parquet")), prepared)
    with pytest.raises(DataError):
        keep_best(replace(config, calibration=str(tmp_path / "nowhere.parquet")), prepared)


def test_a_bundle_gets_no_marker_once_another_job_has_taken_the_run_over(
    prepared: Any, config: TrainConfig, tmp_path: Path
) -> None:
    checkpoints(tmp_path / "checkpoints", prepared, config, [0.5])

    def confirm() -> None:
        raise ConfigError("another job works in this folder")

    with pytest.raises(ConfigError, match="another job"):
        keep_best(config, prepared, confirm)
    assert (tmp_path / "bundle" / "model.safetensors").exists() and not (tmp_path / "bundle" / "config.json").exists()


def test_an_unfinished_bundle_is_replaced(prepared: Any, config: TrainConfig, tmp_path: Path) -> None:
    checkpoints(tmp_path / "checkpoints", prepared, config, [0.5])
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.safetensors").write_bytes(b"half")
    keep_best(config, prepared)
    assert load_bundle(str(tmp_path / "bundle")).metrics["step"] == 1


def test_no_checkpoint_at_all(prepared: Any, config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="training has left no checkpoint"):
        keep_best(config, prepared)
