"""Files of documents: which are read, what is wrong with them, and the stream of their rows, local and on a real S3 server."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from seaweed import S3

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.inputs import list_inputs
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.on_ray import stream
from xmc_ray.on_ray.stream import read_documents
from xmc_ray.storage.files import join


def write_parquet(uri: str, columns: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(uri, buffer.getvalue())
    return uri


# --- files


GOOD = {"id": ["a"], "text": ["b"], "labels": [["c"]]}
BAD_FILES: dict[str, tuple[Any, str]] = {
    "missing column": (
        {"sku": ["a"], "text": ["b"], "labels": [["c"]]},
        "no column 'id'.*found sku, text, labels.*documents.id",
    ),
    "text is a number": (GOOD | {"text": [1]}, "'text' has a wrong type.*int64; expected a string; set documents.text"),
    "text is a date": (GOOD | {"text": pa.array([1], pa.date32())}, "found date32"),
    "id is a float": (GOOD | {"id": [1.5]}, "found double; expected a string or an integer"),
    "labels are a string": (GOOD | {"labels": ["c"]}, "found string; expected a list of strings or integers"),
    "labels are fractions": (GOOD | {"labels": [[1.5]]}, "list<.*double>; expected a list of strings or integers"),
    "no rows": ({name: pa.array([], pa.string()) for name in GOOD}, "no documents.*1 files without rows"),
    "missing key": ('{"id": 1, "labels": []}\n', "no column 'text'.*found id, labels"),
    "a JSON array": ('[\n  {"id": 1,\n  "text": "a"}\n]', r"not JSON lines.*found '\['"),
    "no lines": ("\n \n", "no documents"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_cannot_be_used_are_named_before_anything_runs(case: str, tmp_path: Path) -> None:
    content, told = BAD_FILES[case]
    path = tmp_path / ("x.jsonl" if isinstance(content, str) else "x.parquet")
    _ = path.write_text(content) if isinstance(content, str) else write_parquet(str(path), content)
    with pytest.raises(DataError, match=rf"{tmp_path}.*") as caught:
        read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=True)
    assert caught.match(told)


def test_further_files_that_cannot_be_used(tmp_path: Path) -> None:
    documents = DocumentsConfig(uri=str(tmp_path))
    with pytest.raises(DataError, match=r"no input.*found nothing; expected one of \*\.parquet, \*\.jsonl"):
        list_inputs(documents)
    (tmp_path / "a.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match=r"cannot be read.*a\.parquet.*Parquet magic bytes"):
        read_documents(documents, labelled=False)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(DataError, match=r"different kinds.*\*\.json and \*\.parquet.*one of \*\.parquet, \*\.jsonl"):
        list_inputs(documents)
    with pytest.raises(DataError, match=r"nowhere; found nothing"):
        list_inputs(DocumentsConfig(uri=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"DocumentsConfig\.text; found \[\]; expected 1 or more items"):
        DocumentsConfig(uri="x", text=[])


def test_a_file_cut_short_is_a_reject_with_its_bytes(tmp_path: Path, ray_session: None) -> None:
    """Kind of fault: one odd file takes the whole job down; alone, it is told before anything runs."""
    line = json.dumps({"id": "a", "text": "b", "labels": []}) + "\n"
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((line * 5).encode())[:-20])
    with pytest.raises(DataError, match=r"cannot be read.*a\.jsonl\.gz"):
        read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    write_json(f"{tmp_path}/0.jsonl", {"id": ["a"], "text": ["b"]})
    rows = read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=False).take_all()
    assert {(row["id"], row["reason"], row["lost_bytes"]) for row in rows} == {
        ("a", None, 0),
        (None, "cannot be read", path.stat().st_size),
    }


def test_one_odd_file_is_not_a_wrong_setting(tmp_path: Path, ray_session: None) -> None:
    write_parquet(f"{tmp_path}/0.parquet", {"id": pa.array([], pa.string())})  # no rows, no say
    write_parquet(f"{tmp_path}/1.parquet", {"id": ["a"], "text": [1]})
    (tmp_path / "2.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match=r"'text' has a wrong type.*1\.parquet.*found int64"):
        read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    write_parquet(f"{tmp_path}/3.parquet", {"id": ["a"], "text": ["b"]})
    rows = read_documents(DocumentsConfig(uri=str(tmp_path)), labelled=False).take_all()
    assert {row["reason"] for row in rows} == {"text is not a string", "cannot be read", None}


# --- streams


def write_json(uri: str, columns: dict[str, Any]) -> str:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    storage.write_bytes(uri, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return uri


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_documents_are_the_same_from_everywhere(place: str, suffix: str, tmp_path: Path, s3: S3, ray_session: None) -> None:
    folder = join(str(tmp_path) if place == "local" else s3.uri("corpus"), suffix)
    write = write_parquet if suffix == "parquet" else write_json
    columns = {"sku": [3, 4, 5, None], "title": ["t", None, None, "t"], "body": ["b", " ", None, "b"]}
    columns |= {"topics": [["x", "x"], None, [], ["y"]], "path": [1, 2, 3, 4], "file": [5, 6, 7, 8]}
    write(join(folder, f"dt=1/a.{suffix}"), {name: pa.array(values).slice(0, 0) for name, values in columns.items()})
    uri = write(join(folder, f"dt=2/b c#?%20ü.{suffix}"), columns)
    write(join(folder, f"_old/c.{suffix}"), columns)
    documents = DocumentsConfig(uri=folder, id="sku", text=["title", "body"], separator=" - ", labels="topics")

    assert [Path(file.uri).name for file in list_inputs(documents).files] == [f"a.{suffix}", f"b c#?%20ü.{suffix}"]
    rows = sorted(read_documents(documents, labelled=True).take_all(), key=lambda row: str(row["id"]))
    assert [row.pop("lost_bytes") for row in rows] == [0] * 4
    assert [{**row, "labels": list(row["labels"])} for row in rows] == [
        {"id": "3", "text": "t - b", "labels": ["x"], "file": uri, "row": 0, "reason": None, "detail": None},
        {"id": "4", "text": None, "labels": [], "file": uri, "row": 1, "reason": "text is empty", "detail": None},
        {"id": "5", "text": None, "labels": [], "file": uri, "row": 2, "reason": "text is null", "detail": None},
        {"id": None, "text": "t - b", "labels": ["y"], "file": uri, "row": 3, "reason": "id is null", "detail": None},
    ]


def test_a_single_file_of_some_megabytes_keeps_all_cores_busy(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task reads row groups, and numbers rows as they are in the file."""
    monkeypatch.setattr(stream, "_SMALLEST", 1000)
    texts = pa.array([f"text number {number} " + "x" * 20 for number in range(1000)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    rows = read_documents(DocumentsConfig(uri=str(tmp_path), id=None), labelled=False)
    assert rows.materialize().num_blocks() == 10
    assert {row["row"]: row["text"] for row in rows.take_all()} == dict(enumerate(texts.to_pylist()))
