"""The demo's data: made from the package, the same everywhere; and the other examples."""

import hashlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from in_process import InProcess
from made_nights import write_night, write_run

from examples import filters, iceberg, pictures


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpo")
    subprocess.run([sys.executable, ROOT / "examples" / "hpo" / "make.py", folder], check=True)
    return folder


def test_the_example_of_fields(tiny_encoder: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "fields.py", "--encoder", tiny_encoder]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})
    lines = shown.stdout.splitlines()
    assert {line.partition(":")[0] for line in lines[:2]} == {"red", "plum"}
    assert lines[2].startswith("plum: score 0.") and " title: plum\n" in shown.stdout and "\nbody: [" in shown.stdout


def test_the_example_of_feedback(tiny_encoder: Path) -> None:
    """What editors reject falls, and what they accept rises, on a text that none of them has seen."""
    command = [sys.executable, ROOT / "examples" / "feedback.py", "--encoder", tiny_encoder]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."})
    (green, red), (green_after, red_after) = (
        map(float, pair) for pair in re.findall(r": green ([\d.]+), red ([\d.]+)", shown.stdout)
    )
    assert red > green and green_after > 2 * green and red_after < 0.8 * red


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


def test_filters(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each tenant gets labels of its own, and a document without one those of everybody."""
    tags = filters.main(tmp_path / "run", str(tiny_encoder), InProcess())
    found = {row["filter"]: row["labels"] for row in tags.to_pylist()}
    assert found["painter"][0] == "red" and {*found["painter"]} <= {*filters.COLOURS}
    assert found["grocer"][0] == "plum" and {*found["grocer"]} <= {*filters.KINDS}
    assert {*found[None]} == {"red", "plum"}
    assert "painter ['red', " in capsys.readouterr().out


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, **options: object) -> None:
    """An example as `python examples/NAME.py --option value` runs it, in this process and its Ray."""
    arguments = [f"--{option}={value}" for option, value in options.items()]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_tags_as_a_step_of_a_pipeline(
    ray_session: None, trained: Path, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_example(monkeypatch, "stage.py", documents=fruit / "test.parquet", bundle=trained / "bundle", output=tmp_path / "out")
    written, given = pq.read_table(tmp_path / "out").sort_by("id"), pq.read_table(fruit / "test.parquet").sort_by("id")
    assert written.select(given.column_names).to_pylist() == given.to_pylist()
    right = [
        bool(set(predicted) & set(labels))
        for predicted, labels in zip(written["predicted_labels"].to_pylist(), written["labels"].to_pylist(), strict=True)
    ]
    assert np.mean(right) > 0.9 and written["predicted_reason"].null_count == len(written)


def test_a_second_model_scores_the_best_labels_again(
    ray_session: None, trained: Path, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The label that the text names in so many words is nearer to it than the others."""
    few = pq.read_table(fruit / "test.parquet").slice(0, 6)
    pq.write_table(few, tmp_path / "few.parquet")
    run_example(
        monkeypatch, "rerank.py", documents=tmp_path / "few.parquet", bundle=trained / "bundle", output=tmp_path / "out"
    )
    written = pq.read_table(tmp_path / "out").sort_by("id").to_pylist()
    assert [row["id"] for row in written] == sorted(few["id"].to_pylist())
    for row in written:
        assert row["predicted_labels"][0] in row["labels"] and len(row["predicted_labels"]) == 5
        assert row["predicted_scores"] == sorted(row["predicted_scores"])[::-1]


def test_tags_are_closed_upwards_by_an_ontology(tmp_path: Path) -> None:
    """Labels above that the model has never seen make more of what is true tagged, and hardly less of the tags true."""
    command = [sys.executable, ROOT / "examples" / "hierarchy.py", tmp_path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert pq.read_metadata(tmp_path / "hierarchy.parquet").num_rows > 19_000
    labels, all_labels = (int(count) for count in re.findall(r"(\d+) labels; (\d+) with those above them", said)[0])
    alone, closed = (tuple(map(float, pair)) for pair in re.findall(r"([\d.]+)% of the tags are true, ([\d.]+)% of what", said))
    assert all_labels > labels and "Phenotypic abnormality < All" in said
    assert closed[1] > 2 * alone[1] and closed[0] > alone[0] > 20


def test_a_night_in_an_iceberg_table(
    trained: Path, fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("URI", "WAREHOUSE"):  # which the example sets
        monkeypatch.setenv(f"PYICEBERG_CATALOG__DEMO__{name}", "")
    given = {"bundle": trained / "bundle", "documents": fruit / "test.parquet", "output": tmp_path / "out"}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    for day in ("2026-11-22", "2026-11-23", "2026-11-23"):
        iceberg.main([*arguments, f"--date={day}", "--k=3", "--pool.threads=1"], InProcess())
    said = capsys.readouterr().out.splitlines()[-5:]
    assert [line.rpartition(" of ")[2] for line in said[:2]] == ["2026-11-22, 48 rows", "2026-11-23, 48 rows"]
    assert said[2].startswith("test-") and "fruit 0." in said[2]


def test_pictures_of_a_run_that_has_figures(tmp_path: Path) -> None:
    """The screenshots are as tests/show/test_browser.py drives the page."""
    run, night = write_run(tmp_path / "run"), write_night(tmp_path / "shop", "2026-11-24", [("d1", "text", {"x": 0.5})])
    assert pictures.draw_curves(run, tmp_path / "curves.svg") and "<svg" in (tmp_path / "curves.svg").read_text()
    assert not pictures.draw_calibration(run, tmp_path / "calibration.svg") and not (tmp_path / "calibration.svg").exists()
    paths = pictures.page_paths({"shop": str(night.parent.parent)}, {"run": str(run)})
    assert paths["why"] == "/why?at=shop&day=2026-11-24&id=d1&label=x" and paths["run"] == "/run?at=run"
