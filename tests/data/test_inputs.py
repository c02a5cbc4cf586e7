"""Kind of fault: what counts as input was decided in two places, and what was passed over was not told."""

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.input_columns import check_columns
from xmc_ray.data.inputs import format_of, list_inputs, mark_length
from xmc_ray.data.reader import Segment, read_file, read_rows
from xmc_ray.errors import DataError

LINE = json.dumps({"id": "1", "text": "a"}).encode() + b"\n"
PACKED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
JSON_NAMES = [f"x{ending}{packed}" for ending in (".json", ".jsonl", ".ndjson", ".JSON") for packed in PACKED]


def ids(uri: Path) -> list[str]:
    return [name for table in read_rows(DocumentsConfig(uri=str(uri)), labelled=False) for name in table["id"].to_pylist()]


@pytest.mark.parametrize("name", [*JSON_NAMES, "x.JSONL.GZ", "x.json.Bz2"])
def test_all_spellings_of_json_lines_are_known_in_a_folder_and_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACKED[next((end for end in PACKED if end and name.lower().endswith(end)), "")](LINE))
    assert ids(tmp_path) == ids(tmp_path / name) == ["1"]


@pytest.mark.parametrize("name", ["x.parquet", "x.snappy.parquet", "x.gz.parquet", "x.PARQUET", "x.pq", "x.parq"])
def test_all_spellings_of_parquet_are_known_in_a_folder_and_alone(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"], "text": ["a"]}), tmp_path / name)
    assert ids(tmp_path) == ids(tmp_path / name) == ["1"]


@pytest.mark.parametrize("packing", PACKED)
def test_a_file_given_by_name_is_known_by_its_first_bytes(packing: str, tmp_path: Path) -> None:
    path = tmp_path / "export.dat"
    path.write_bytes(PACKED[packing](b"\xef\xbb\xbf\n " + LINE if not packing else LINE))
    assert ids(path) == ["1"]
    pq.write_table(pa.table({"id": ["2"], "text": ["a"]}), path)
    assert ids(path) == ["2"]
    path.write_text("id;text\n1;a\n")
    with pytest.raises(DataError, match=r"neither Parquet nor JSON lines: .*export\.dat; found b'id;text"):
        list_inputs(DocumentsConfig(uri=str(path)))


def test_what_is_left_out_of_a_folder_is_counted_by_ending_with_an_example(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.csv", "d.json.xz", "README", "_SUCCESS", ".a.jsonl.crc", "_old/e.csv", ".git/f.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINE)
    inputs = list_inputs(DocumentsConfig(uri=str(tmp_path)))
    assert [file.uri for file in inputs.files] == [f"{tmp_path}/a.jsonl"]
    assert {kind: part.files for kind, part in inputs.left_out.items()} == {
        ".csv": 2,
        ".json.xz": 1,
        "no ending": 1,
    }
    assert str(inputs).startswith(f"left out: 2 *.csv, such as {tmp_path}/b.csv; 1 *.json.xz, such as ")
    assert f"; 1 (no ending), such as {tmp_path}/README" in str(inputs)


def test_the_name_of_a_file_that_is_left_out_cannot_pass_for_a_line(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b\nfinished \x1b[2J"):
        (tmp_path / name).write_bytes(LINE)
    told = str(list_inputs(DocumentsConfig(uri=str(tmp_path))))
    assert told.endswith(f"{tmp_path}/b finished \N{REPLACEMENT CHARACTER}[2J")


def test_a_folder_without_input_says_what_it_has(tmp_path: Path) -> None:
    for name in ("b.doc", "c.doc", "d.odt", "_x.csv"):
        (tmp_path / name).write_bytes(LINE)
    found = r"found 2 \*\.doc, such as .*b\.doc; 1 \*\.odt, such as .*d\.odt; expected"
    with pytest.raises(DataError, match=rf"no input: {tmp_path}; {found}"):
        list_inputs(DocumentsConfig(uri=str(tmp_path)))


def test_a_name_that_is_no_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "\udcff.jsonl"
    path.write_bytes(LINE)
    for uri in (tmp_path, path):
        with pytest.raises(DataError, match="a file name is not UTF-8"):
            list_inputs(DocumentsConfig(uri=str(uri)))


# --- one opinion about text: byte order marks, blank lines, ends of lines


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_marks_blank_lines_and_ends_of_lines_are_no_rows(newline: bytes, packing: str, tmp_path: Path) -> None:
    """Kind of fault: several readers of text, each with an opinion of its own."""
    lines = [b"\xef\xbb\xbf", b"", *(json.dumps({"id": f"{n}", "text": "a"}).encode() for n in range(3)), b"  ", b""]
    path = tmp_path / f"x.jsonl{packing}"
    for last in (b"", newline):
        path.write_bytes(PACKED[packing](newline.join(lines).rstrip() + last))
        assert ids(path) == ["0", "1", "2"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_one_line_or_one_reject(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(LINE.decode().encode(encoding))
    config = DocumentsConfig(uri=str(tmp_path))
    with pytest.raises(DataError, match=r"cannot be read.*b\.jsonl.*byte order mark of UTF-"):
        check_columns(list_inputs(config).files, Rules.of(config, labelled=False))
    (part,) = read_file(Segment(storage.stat(path)), Rules.of(config, labelled=False))
    assert part.table["reason"].to_pylist() == ["not UTF-8"] and part.start == part.end


def test_mark_length() -> None:
    assert [mark_length(head) for head in (b"", b"\xef\xbb", b"\xef\xbb\xbf{", b"{")] == [0, 0, 3, 0]


def test_an_array_of_documents_is_a_file_that_cannot_be_read_and_not_one_row(tmp_path: Path) -> None:
    config = DocumentsConfig(uri=str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(LINE)
    for number, text in enumerate(('[{"id": "1", "text": "a"}, {"id": "2", "text": "b"}]', '[\n {"id": "1",\n "text": "a"}]')):
        path = tmp_path / f"b{number}.json"
        path.write_text(text)
        (part,) = read_file(Segment(storage.stat(path)), Rules.of(config, labelled=False))
        assert part.table["reason"].to_pylist() == ["not JSON lines"] and part.start == part.end
    path = tmp_path / "d.json"
    path.write_bytes(b'{"id": "1", "text": "a"}\r{"id": "2", "text": "b"}\r')
    (part,) = read_file(Segment(storage.stat(path)), Rules.of(config, labelled=False))
    assert part.table["reason"].to_pylist() == ["lines end in carriage returns"] and part.start == part.end
    path.write_bytes(b'{\r"id": "1", "text": "a", "more":\r{}}\r\n')  # one object
    (part,) = read_file(Segment(storage.stat(path)), Rules.of(config, labelled=False))
    assert part.table["reason"].to_pylist() == [None]
    path = tmp_path / "c.json"
    path.write_text('["no document"]\n' + LINE.decode())
    rows = [
        part.table["reason"].to_pylist() for part in read_file(Segment(storage.stat(path)), Rules.of(config, labelled=False))
    ]
    assert rows == [["not a JSON object", None]]


def test_format_of_asks_the_name_first(tmp_path: Path) -> None:
    assert format_of(str(tmp_path / "nowhere.jsonl.gz")) == ("json", "gzip")
    with pytest.raises(FileNotFoundError):
        format_of(str(tmp_path / "nowhere"))
