"""The demo's data: made from the package, the same everywhere."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from checkout import ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpo")
    subprocess.run([sys.executable, ROOT / "examples" / "hpo" / "make.py", folder], check=True)
    return folder


def test_sizes_of_the_splits(made: Path) -> None:
    sizes = [pq.read_metadata(made / f"{name}.parquet").num_rows for name in ("train", "test", "labels")]
    assert sizes == [16_181, 2_822, 4_802]


def test_rows_follow_the_rules(made: Path) -> None:
    train, test = (pq.read_table(made / f"{split}.parquet").to_pylist() for split in ("train", "test"))
    for rows, inside in ((train, False), (test, True)):
        assert all((int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 100 < 15) is inside for row in rows)
    seen = {label for row in train for label in row["labels"]}
    assert seen == set(pq.read_table(made / "labels.parquet")["label"].to_pylist())
    assert all(row["labels"] and set(row["labels"]) <= seen for row in test)
    assert all(row["id"] not in row["labels"] and row["text"].strip() for row in train + test)
    by_id = {row["id"]: row for row in train + test}
    hernia = by_id["HP:0000023"]
    assert hernia["text"].startswith("Inguinal hernia. Protrusion of the contents")
    assert "HP:0100790" in hernia["labels"]  # hernia
    assert "HP:0000118" not in seen  # "Phenotypic abnormality", above nearly everything
