"""The evaluation job on Ray, whose figures are those of `XMCClassifier.evaluate`, and the gate of a night."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xmc_ray import command
from xmc_ray.bundle.members import Members
from xmc_ray.classifier import XMCClassifier
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.errors import ConfigError, DataError, ModelError
from xmc_ray.on_ray.evaluate import EvaluateConfig, GateConfig, evaluate, pass_gate
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig

pytestmark = pytest.mark.usefixtures("ray_session")


def run(documents: Path, bundle: object, *further: str) -> dict[str, Any]:
    arguments = [f"--documents.uri={documents}", f"--bundle={bundle}", "--pool.max=1", "--pool.threads=1", *further]
    return evaluate(command.parse(EvaluateConfig, arguments))


def by_the_classifier(documents: Path, bundle: str | list[str]) -> dict[str, Any]:
    test = pq.read_table(documents)
    return XMCClassifier.load(bundle).evaluate(test["text"].to_pylist(), test["labels"].to_pylist())


def test_it_equals_the_classifier(fruit: Path, trained: Path, tmp_path: Path) -> None:
    documents, output = fruit / "test.parquet", f"--output={tmp_path / 'evaluation'}"
    result = run(documents, trained / "bundle", "--pool.batch_rows=7", output)
    expected = by_the_classifier(documents, str(trained / "bundle"))
    assert result["total"] == expected["total"] and result["bands"] == expected["bands"]
    assert result["total"]["P@1"] > 0.9
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == result
    with pytest.raises(ConfigError, match="there already"):
        run(documents, trained / "bundle", output)


def test_documents_without_a_known_label(trained: Path, tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "a red apple", "labels": ["unheard of"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="no document has a label that the bundle knows"):
        run(tmp_path / "test.parquet", trained / "bundle")


def test_actors_that_do_not_fit(fruit: Path, trained: Path) -> None:
    with pytest.raises(ConfigError, match="too few GPUs here; found 0 GPUs, 1 actors of 2 CPU and 1 GPU"):
        run(fruit / "test.parquet", trained / "bundle", "--pool.gpu=true")


def test_thresholds(fruit: Path, trained: Path, bundles: list[str]) -> None:
    documents, at_least_half = fruit / "test.parquet", "--min_precision=0.5"
    calibration = run(documents, trained / "bundle", at_least_half)["calibration"]
    assert calibration["calibrated"] and calibration["min_precision"] == 0.5
    assert calibration["precision"] > 0.5 and calibration["coverage"] > 0.9 and calibration["ECE@5"] < 0.3
    for ks in ("[1]", "[1, 14]"):  # the depths of the metrics change nothing about the scores
        assert run(documents, trained / "bundle", at_least_half, f"--ks={ks}")["calibration"] == calibration
    with pytest.raises(ConfigError, match=r"needs a calibrated bundle: .*/other; found no calibration"):
        run(documents, bundles[1], at_least_half)


def test_scores_are_computed_as_a_night_computes_them(fruit: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind: what is measured was computed by another arithmetic, or another scoring, than what is published."""
    documents, warning = (
        fruit / "test.parquet",
        "warning: scores are computed by cpu bfloat16 and were calibrated by cpu float32",
    )
    result = run(documents, trained / "bundle", "--model.precision=bfloat16", "--model.scoring=exact")
    assert (result["arithmetic"], result["scoring"]) == ("cpu bfloat16", "exact")
    assert result["calibration"]["by"] == ["cpu float32"] and warning in capsys.readouterr().out
    result = run(documents, trained / "bundle", "--model.scoring=auto")
    said = capsys.readouterr().out
    assert result["arithmetic"] == "cpu float32" and "warning" not in said
    assert result["scoring"] in ("grouped", "exact") and f"scoring: {result['scoring']}, measured on " in said


def test_an_ensemble(fruit: Path, bundles: list[str]) -> None:
    result = run(fruit / "test.parquet", json.dumps(bundles), "--pool.batch_rows=7")
    expected = by_the_classifier(fruit / "test.parquet", bundles)
    assert result["total"] == expected["total"] and result["bands"] == expected["bands"]
    assert result["bundle"] == Members.read(bundles).fingerprint


def test_no_room_for_an_actor(fruit: Path, trained: Path) -> None:
    with pytest.raises(ConfigError, match="too few GPUs here; found 0 GPUs, 1 actors of 2 CPU and 1 GPU"):
        run(fruit / "test.parquet", trained / "bundle", "--pool.gpu")


def test_the_gate(fruit: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents, members = DocumentsConfig(uri=str(fruit / "test.parquet")), Members.read(str(trained / "bundle"))
    pool, scoring = PoolConfig(max=1, threads=1), ScoringConfig(precision="bfloat16")
    pass_gate(GateConfig(documents=documents, at_least={"P@1": 0.9, "R@3": 0.5}), members, pool, scoring)
    assert "the bundle passes the gate: P@1 " in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"does not pass the gate: .*; found P@5 0\.\d{4}; expected at least 0\.99"):
        pass_gate(GateConfig(documents=documents, at_least={"P@5": 0.99}), members, pool, scoring)
    with pytest.raises(ConfigError, match=r"no such metric: gate.at_least; found Q@1; expected documents"):
        pass_gate(GateConfig(documents=documents, at_least={"Q@1": 0.1}), members, pool, scoring)
    pass_gate(GateConfig(), members, pool, scoring)  # no gate, nothing is predicted
    with pytest.raises(ConfigError, match=r"gate\.documents and gate\.at_least require each other"):
        GateConfig(documents=documents)
