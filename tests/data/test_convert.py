"""Conversion: each benchmark layout against plain loops, errors with file and line, and the job that writes Parquet."""

import bz2
import gzip
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import documents_of_json, documents_of_lines, documents_of_tsv
from seaweed import S3

from xmc_ray import storage
from xmc_ray.command import parse
from xmc_ray.data.convert import ConvertConfig, LabelNames, read_json, read_lines, read_tsv, run
from xmc_ray.errors import ConfigError, DataError, XmcError

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
# All that some program takes for a break or a blank, and that must not be one here or must be one everywhere.
TEXTS = st.text(st.sampled_from('ab é,😀"\\\x00\x0b\x1c\x85\xa0\u2028\u3000\r'), max_size=12)
FIELDS = st.tuples(TEXTS, TEXTS, TEXTS)
OBJECTS = st.fixed_dictionaries(
    {"uid": st.integers() | TEXTS, "target_ind": st.lists(st.integers(0, 4), max_size=6)},
    optional={"title": st.none() | TEXTS, "content": st.none() | TEXTS, "target_rel": st.just([1.0])},
)


def rows(tables: Iterable[pa.Table]) -> list[dict[str, Any]]:
    return [row for table in tables for row in table.to_pylist()]


def write(path: Path, lines: str | bytes) -> str:
    data = lines.encode() if isinstance(lines, str) else lines
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress}
    path.write_bytes(compress.get(path.suffix, bytes)(data))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


# -- the same as loops


@QUICK
@given(st.lists(FIELDS, max_size=9), st.integers(1, 4), st.sampled_from([None, ",", " , "]))
def test_lines_equal_a_loop(folder: Path, fields: list[tuple[str, str, str]], n: int, separator: str | None) -> None:
    texts, labels = ("".join(f"{row[place]}\n" for row in fields) for place in (0, 1))
    pair = (write(folder / "texts.txt", texts), write(folder / "labels.txt", labels))
    tables = list(read_lines(*pair, rows=n, separator=separator))
    assert rows(tables) == documents_of_lines(texts, labels, separator)
    assert all(len(table) == n for table in tables[:-1])


@QUICK
@given(st.lists(FIELDS, max_size=9), st.integers(2, 3), st.integers(1, 4), st.sampled_from([None, ","]))
def test_tsv_equals_a_loop(folder: Path, fields: list[Any], width: int, n: int, separator: str | None) -> None:
    lines = "".join("\t".join(row[:width]) + "\n" for row in fields)
    tables = read_tsv(write(folder / "a.tsv", lines), rows=n, separator=separator)
    assert rows(tables) == documents_of_tsv(lines, separator)


@QUICK
@given(st.lists(OBJECTS, max_size=9), st.booleans(), st.booleans(), st.integers(1, 4))
def test_json_equals_a_loop(folder: Path, values: list[Any], escaped: bool, named: bool, n: int) -> None:
    lines = "\n \n".join(json.dumps(value, ensure_ascii=escaped) for value in values)
    labels = "".join(json.dumps({"uid": uid, "title": f"the {uid}"}) + "\n" for uid in ["x", "é", 7, "b", "a"])
    names = LabelNames.read(write(folder / "labels.json", labels), rows=n) if named else None
    tables = read_json(write(folder / "a.json", lines), rows=n, names=names)
    assert rows(tables) == documents_of_json(lines, ["x", "é", "7", "b", "a"] if named else None)


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_files_may_be_compressed_and_lie_anywhere(place: str, ending: str, tmp_path: Path, s3: S3) -> None:
    def put(name: str, lines: str) -> str:
        local = write(tmp_path / f"{name}{ending}", lines)
        if place == "local":
            return local
        uri = s3.uri(f"layouts/{name}{ending}")
        storage.write_bytes(uri, Path(local).read_bytes())
        return uri

    expected = [{"id": "1", "text": "a b", "labels": ["x", "y"]}, {"id": "2", "text": "c", "labels": []}]
    assert rows(read_lines(put("texts.txt", "a b\r\nc\r\n"), put("labels.txt", "x y\r\n\r\n"), rows=9)) == expected
    assert rows(read_tsv(put("a.txt", "x y\ta b\n\tc"), rows=9)) == expected
    labels = put("lbl.json", '{"uid": "x", "title": "the x"}\n{"uid": "y"}\n')
    names = LabelNames.read(labels, rows=1)
    documents = put("a.jsonl", '{"uid": 1, "title": "a b", "target_ind": [1, 0]}\n')
    assert rows(read_json(documents, rows=9, names=names)) == [
        {"id": "1", "title": "a b", "content": None, "labels": ["y", "x"]}
    ]
    assert names.names.to_pylist() == ["the x", None]


def test_several_archives_in_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x\ta\n") + gzip.compress(b"y\tb\n"))
    assert [row["text"] for row in rows(read_tsv(str(tmp_path / "a.gz"), rows=9))] == ["a", "b"]


def test_only_the_lines_of_a_chunk_are_read(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.tsv", b"x\ta\n" * 500_000 + b"\xff\n")
    tables = read_tsv(uri, rows=10)
    assert [len(next(tables)) for _ in range(3)] == [10] * 3
    with pytest.raises(DataError, match=r"a\.tsv:500001"):
        list(read_tsv(uri, rows=100_000))


# -- label names


def test_names_by_place(tmp_path: Path) -> None:
    names = LabelNames.read(write(tmp_path / "names.txt", "zero\n\n two \n"), rows=2)
    assert names.labels.to_pylist() == ["0", "1", "2"]
    assert names.names.to_pylist() == ["zero", None, "two"]
    uri = write(tmp_path / "labels.txt", "2 0\n1\n")
    assert [row["labels"] for row in rows(read_lines(uri, uri, rows=2, names=names))] == [["2", "0"], ["1"]]


def test_a_label_that_stands_twice(tmp_path: Path) -> None:
    uri = write(tmp_path / "labels.json.gz", '{"uid": "a"}\n{"uid": "b"}\n{"uid": "c"}\n{"uid": "b"}\n')
    with pytest.raises(DataError, match=r"the same uid: .*labels\.json\.gz; found b"):
        LabelNames.read(uri, rows=2)


# -- what does not fit


def good(number: int) -> str:
    return json.dumps({"uid": number, "title": "a", "target_ind": [0]})


BAD_JSON = {
    "{broken": "invalid JSON; found Expecting property name",
    "[" * 100_000: "invalid JSON; found RecursionError",
    '{"uid": 1, "title": "\\ud800", "target_ind": []}': "invalid JSON; found UnicodeEncodeError",
    "null": "not a JSON object; found NoneType",
    '{"title": "a", "target_ind": [0]}': "uid does not fit; found None; expected a string or an integer",
    '{"uid": true, "target_ind": [0]}': "uid does not fit; found True",
    '{"uid": 1, "title": 7, "target_ind": [0]}': "title does not fit; found 7; expected a string or null",
    '{"uid": 1, "title": "a"}': "target_ind does not fit; found None; expected a list of integers from 0 on",
    '{"uid": 1, "target_ind": [0, 1.0]}': "target_ind does not fit; found [0, 1.0]",
    '{"uid": 1, "target_ind": [-1]}': "target_ind does not fit; found [-1]",
    '{"uid": 1, "target_ind": [9223372036854775808]}': "target_ind does not fit",
    '{"uid": 1, "target_ind": [1, 2, 3]}': "target_ind is out of range; found 2; expected less than 2, the labels in ",
}


@pytest.mark.parametrize("line", BAD_JSON)
def test_bad_json(line: str, tmp_path: Path) -> None:
    lines = [good(1), "", *map(good, range(2, 5)), line, good(5)]
    uri = write(tmp_path / "a.json.gz", "\n".join(lines))
    names = LabelNames.read(write(tmp_path / "names.txt", "a\nb\n"), rows=9)
    assert told(read_json(uri, rows=2, names=names)).replace(f": {uri}:6;", ";").startswith(BAD_JSON[line])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("x\ta\nx\n", ":2; found 1; expected 2 (labels, text) or 3 (id, labels, text), the same in every line"),
        ("x\ta\nx\ta\n\n", ":3; found 1"),
        ("x\ta\nx\ta\nx\ta\n1\tx\ta\n", ":4; found 3"),
        ("1\tx\ta\tb\n", ":1; found 4"),
    ],
)
def test_bad_columns(lines: str, message: str, tmp_path: Path) -> None:
    uri = write(tmp_path / "a.tsv", lines)
    assert told(read_tsv(uri, rows=2)).startswith(f"wrong number of columns: {uri}{message}")


@pytest.mark.parametrize(("texts", "labels"), [(5, 4), (4, 5), (3, 0), (0, 3), (2, 8)])
def test_unequal_numbers_of_lines(texts: int, labels: int, tmp_path: Path) -> None:
    pair = (write(tmp_path / "texts.txt", "a\n" * texts), write(tmp_path / "labels.txt", "x\n" * labels))
    message = f"differ in number: {pair[0]}; found {texts} lines, and {labels} in {pair[1]}"
    assert message in told(read_lines(*pair, rows=2))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.txt", b"a\nb\nc\n\xe4\n")
    good = write(tmp_path / "b.txt", "a\nb\nc\nd\n")
    for tables in (read_lines(uri, good, rows=3), read_lines(good, uri, rows=3), read_tsv(uri, rows=9), read_json(uri, rows=9)):
        assert told(tables).startswith(f"not UTF-8: {uri}:4; found b'\\xe4\\n'; convert")


def test_labels_without_a_name(tmp_path: Path) -> None:
    names = LabelNames.read(write(tmp_path / "names.txt", "a\nb\n"), rows=9)
    labels = write(tmp_path / "labels.txt", "0\n1\n0\n1 2 0 3\n")
    expected = f"a label without a name: {labels}:4; found 2; expected one in {names.uri}"
    assert told(read_lines(labels, labels, rows=3, names=names)) == expected


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert told(read_tsv("/nowhere/a.tsv", rows=9)).startswith("no such file, folder or bucket: /nowhere/a.tsv")
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"x\ta\n" * 1000)[:-12])
    (tmp_path / "no.gz").write_bytes(b"x\ta\n")
    for name in ("short.gz", "no.gz"):
        with pytest.raises(ConfigError, match=rf"cannot be read.*{name}"):
            list(read_tsv(str(tmp_path / name), rows=9))


def told(tables: Iterator[pa.Table]) -> str:
    """The one line of the error that reading ends with."""
    with pytest.raises(XmcError) as caught:
        list(tables)
    assert type(caught.value) is DataError
    return str(caught.value)


# -- the job

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
    with pytest.raises(ConfigError, match="the output exists"):
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
    with pytest.raises(ConfigError, match=r"the output exists: .*names\.parquet"):
        convert(layout="json", output=tmp_path / "a.parquet", **options)
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize("lines", ["", "\n\n", '{"uid": 1, "text": "under another key", "target_ind": []}\n'])
def test_documents_without_any_text(lines: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(lines)
    with pytest.raises(DataError, match=r"no document has a text: .*a\.json; found [01] documents"):
        convert(layout="json", documents=tmp_path / "a.json", output=tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


BAD = {
    "labels are required with layout lines": {"layout": "lines"},
    "only allowed there": {"labels": "x"},
    "invalid value of separator": {"separator": ","},
    "names_output requires names": {"names_output": "a.parquet"},
    "not the name of a Parquet file": {"output": "folder"},
    "invalid value of rows": {"rows": 0},
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
    assert failed.returncode == 2 and failed.stderr.startswith(f"error: the output exists: {raw}/a.parquet;")
    assert pq.read_table(raw / "a.parquet")["id"].to_pylist() == ["p", "q", "r"]


# -- one opinion about text (kind of fault: several readers of text, each with its own; sample byte-order-mark-names)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_byte_order_mark_is_no_text_in_any_layout(end: str, last: bool, suffix: str, tmp_path: Path) -> None:
    def made(name: str, *lines: str) -> str:
        return write(tmp_path / f"{name}{suffix}", "\ufeff" + end.join(lines) + (end if last else ""))

    texts, labels = made("texts.txt", "one", "two"), made("labels.txt", "a b", "c")
    assert rows(read_lines(texts, labels, rows=9)) == [
        {"id": "1", "text": "one", "labels": ["a", "b"]},
        {"id": "2", "text": "two", "labels": ["c"]},
    ]
    assert rows(read_tsv(made("x.tsv", "a\tone", "b\ttwo"), rows=1))[0] == {"id": "1", "text": "one", "labels": ["a"]}
    line = json.dumps({"uid": "u", "title": "t", "target_ind": [0]})
    names = LabelNames.read(made("names.txt", "apple", "pear"), rows=9)
    assert names.names.to_pylist() == ["apple", "pear"]
    assert rows(read_json(made("x.json", line), rows=9, names=names))[0]["labels"] == ["0"]
    for name in ("n.json", "n.NDJSON", "n.jsonl"):
        assert LabelNames.read(made(name, line, ""), rows=9).labels.to_pylist() == ["u"]


def test_other_encodings_are_one_line_in_any_layout(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.txt", "a\tb\n".encode("utf-16"))
    for tables in (read_lines(uri, uri, rows=3), read_tsv(uri, rows=9), read_json(uri, rows=9)):
        assert told(tables).startswith(f"not UTF-8: {uri}; found a byte order mark of UTF-16; convert the file")
    with pytest.raises(DataError, match="found a byte order mark of UTF-16"):
        LabelNames.read(uri, rows=9)
