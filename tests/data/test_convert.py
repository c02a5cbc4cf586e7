"""The conversion job: Parquet that the other jobs read, whole or not at all."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from seaweed import S3

from xmc_ray import storage
from xmc_ray.command import parse
from xmc_ray.data.convert import ConvertConfig, run
from xmc_ray.errors import ConfigError, DataError

STRINGS = pa.list_(pa.string())


def convert(**options: Any) -> dict[str, int]:
    return run(parse(ConvertConfig, [f"--{name}={value}" for name, value in options.items()]))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The same three documents in each layout; one has no label, another no text."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "texts.txt").write_text("a red apple\n\na pear\n")
    (folder / "labels.txt").write_text("fruit red\nfruit\n\n")
    (folder / "a.tsv").write_text("p\tfruit red\ta red apple\nq\tfruit\t\nr\t\ta pear\n")
    values = [("p", "a red", "apple", [1, 0]), ("q", "", None, [1]), ("r", None, "a pear", [])]
    lines = [dict(zip(["uid", "title", "content", "target_ind"], value, strict=True)) for value in values]
    (folder / "a.json").write_text("\n".join(map(json.dumps, lines)))
    (folder / "labels.json").write_text('{"uid": "red", "title": "Red things"}\n{"uid": "fruit", "title": ""}\n')
    return folder


COUNTS = {"documents": 3, "unlabelled": 1, "without_text": 1, "labels": 2, "occurrences": 3}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_other_jobs_read_what_is_written(place: str, raw: Path, s3: S3) -> None:
    from xmc_ray.data.documents import DocumentsConfig
    from xmc_ray.on_ray.stream import read_documents

    out = s3.uri("conversion") if place == "s3" else str(raw.parent / "out")
    layouts = {
        "lines": {"documents": raw / "texts.txt", "labels": raw / "labels.txt"},
        "tsv": {"documents": raw / "a.tsv"},
        "json": {"documents": raw / "a.json", "names": raw / "labels.json", "names_output": f"{out}/labels.parquet"},
    }
    for layout, options in layouts.items():
        uri = f"{out}/{layout}.parquet"
        assert convert(layout=layout, output=uri, rows=2, **options) == COUNTS
        text = ["title", "content"] if layout == "json" else ["text"]
        documents = read_documents(DocumentsConfig(uri=uri, text=text, separator=" "), labelled=True)
        found = sorted(documents.take_all(), key=lambda row: row["id"])
        assert [row["id"] for row in found] == (["1", "2", "3"] if layout == "lines" else ["p", "q", "r"])
        assert [row["text"] for row in found] == ["a red apple", None, "a pear"]
        assert [sorted(row["labels"]) for row in found] == [["fruit", "red"], ["fruit"], []]
        assert [row["reason"] for row in found] == [None, "text is empty", None]


def test_columns_and_row_groups(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "many.tsv").write_text("x y\ta text\n" * 1000)
    out, names = tmp_path / "out.parquet", tmp_path / "names.parquet"
    convert(layout="tsv", documents=raw / "many.tsv", output=out, rows=64)
    file = pq.ParquetFile(out)
    assert [file.metadata.row_group(place).num_rows for place in range(file.num_row_groups)] == [64] * 15 + [40]
    assert file.schema_arrow == pa.schema({"id": pa.string(), "text": pa.string(), "labels": STRINGS})
    assert capsys.readouterr().out == (f"{out}: 1,000 documents (0 unlabelled, 0 without text), 2 labels, 2,000 times in all\n")
    options = {"documents": raw / "a.json", "names": raw / "labels.json", "names_output": names, "overwrite": "true"}
    convert(layout="json", output=out, **options)
    assert pq.read_schema(out) == pa.schema(
        [(name, pa.string()) for name in ("id", "title", "content")] + [("labels", STRINGS)]
    )
    assert pq.read_table(names).to_pylist() == [{"label": "red", "name": "Red things"}, {"label": "fruit", "name": None}]
    assert capsys.readouterr().out.endswith(f"{names}: 2 labels with names\n")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_file_is_whole_or_not_there(place: str, raw: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = s3.uri("conversion/whole") if place == "s3" else str(raw.parent / "out")
    options = {"layout": "tsv", "documents": raw / "a.tsv", "output": f"{folder}/a.parquet", "rows": 1}
    (raw / "bad.tsv").write_text("x\ta\n" * 10 + "x\n")
    with pytest.raises(DataError, match=r"bad\.tsv:11"):
        convert(**options | {"documents": raw / "bad.tsv"})
    assert storage.is_empty(folder)
    convert(**options)
    before = storage.read_bytes(f"{folder}/a.parquet")
    with pytest.raises(ConfigError, match="the output is there already"):
        convert(**options)
    with pytest.raises(DataError, match=r"bad\.tsv:11"):
        convert(**options | {"documents": raw / "bad.tsv", "overwrite": "true"})
    assert storage.read_bytes(f"{folder}/a.parquet") == before
    convert(**options | {"overwrite": "true", "rows": 3})
    assert storage.read_bytes(f"{folder}/a.parquet") != before
    assert [file.uri for file in storage.list_files(folder)] == [f"{folder}/a.parquet"]


def test_names_that_are_there_already_stop_all(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "names.parquet").touch()
    options = {"documents": raw / "a.json", "names": raw / "labels.json", "names_output": tmp_path / "names.parquet"}
    with pytest.raises(ConfigError, match=r"there already: .*names\.parquet"):
        convert(layout="json", output=tmp_path / "a.parquet", **options)
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize("lines", ["", "\n\n", '{"uid": 1, "text": "under another key", "target_ind": []}\n'])
def test_documents_without_any_text(lines: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(lines)
    with pytest.raises(DataError, match=r"no document has a text: .*a\.json; found [01] documents"):
        convert(layout="json", documents=tmp_path / "a.json", output=tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


BAD = {
    "lines needs a file of labels": {"layout": "lines"},
    "and it alone": {"labels": "x"},
    "separator does not fit": {"separator": ","},
    "names_output lacks its input": {"names_output": "a.parquet"},
    "not the name of a Parquet file": {"output": "folder"},
    "rows does not fit": {"rows": 0},
    "layout": {"layout": "xml"},
}


@pytest.mark.parametrize("told", BAD)
def test_settings_that_do_not_fit(told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        convert(**{"layout": "json", "documents": "x", "output": "o.parquet"} | BAD[told])


def test_the_commands_in_the_documents() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python jobs/convert\.py (.+)$", text, flags=re.MULTILINE)
    assert [parse(ConvertConfig, shlex.split(command)).layout for command in commands] == ["lines", "json", "tsv"]


def test_the_job_as_a_command(raw: Path) -> None:
    command = [sys.executable, ROOT / "jobs/convert.py", "--layout", "tsv", "--documents", "a.tsv", "--output", "a.parquet"]
    assert subprocess.run(command, cwd=raw, check=False).returncode == 0
    failed = subprocess.run(command, cwd=raw, check=False, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: the output is there already: a.parquet;")
    assert pq.read_table(raw / "a.parquet")["id"].to_pylist() == ["p", "q", "r"]
