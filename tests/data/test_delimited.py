"""CSV and TSV: whatever is quoted and wherever reading stops, every record comes once, as a document or as a reject."""

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xmc_ray import storage
from xmc_ray.data import delimited, line_ranges
from xmc_ray.data.delimited import Delimited
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.input_columns import check_columns
from xmc_ray.data.inputs import format_of, list_inputs
from xmc_ray.data.line_ranges import packed_notice
from xmc_ray.data.reader import Segment, file_parts, read_file, read_rows
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage.listing import FileInfo

CELLS = st.text(st.sampled_from('aé€,;\t"\n \r'), max_size=8)
DIALECTS = st.sampled_from([(",", "csv"), ("\t", "tsv")])


def documents(
    path: Path, chunk: int = 1024, segment: tuple[int, int, int] | None = None, **further: Any
) -> list[dict[str, Any]]:
    config = DocumentsConfig(uri=str(path), label_separator=";", **further)
    rules = Rules.of(config, labelled=True)
    chunks = read_file(Segment(storage.stat(path), *segment or ()), rules, chunk)
    return [row for part in chunks for row in part.table.to_pylist()]


def written(rows: list[list[str]], delimiter: str, newline: str = "\n") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, lineterminator=newline).writerows(rows)
    return stream.getvalue().encode()


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=12), DIALECTS, st.sampled_from(["\n", "\r\n"]), st.data())
@settings(deadline=None, max_examples=60)
def test_what_csv_writes_is_read_from_any_chunk(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], dialect: Any, newline: str, data: st.DataObject
) -> None:
    """The oracle is Python's csv, on the writing side."""
    delimiter, ending = dialect
    path = tmp_path_factory.mktemp("file") / f"x.{ending}"
    rows = [[f"{number}", text, labels] for number, (text, labels) in enumerate(cells)]
    path.write_bytes(
        b"\xef\xbb\xbf" * data.draw(st.booleans()) + written([["id", "text", "labels"], *rows], delimiter, newline)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "_BYTES", data.draw(st.integers(1, 40)))
        found = documents(path, chunk=3)
        chunks = list(read_file(Segment(storage.stat(path)), Rules.of(DocumentsConfig(uri="/x"), labelled=False), 3))
        assert [row["id"] for row in found] == [row[0] for row in rows]
        for row, (_, text, labels) in zip(found, rows, strict=True):
            assert row["text"] == (text if text.strip() else None) and row["row"] == int(row["id"])
            assert row["labels"] == list(dict.fromkeys(filter(None, map(str.strip, labels.split(";")))))
        part = data.draw(st.sampled_from(chunks))
        first = part.table["row"][0].as_py()
        assert documents(path, 2, (part.start, first, len(rows) - first)) == found[first:]


@given(
    st.lists(st.sampled_from([b"a", b",", b'"', b'""', b"\n", b"\r\n", b"\r", b"x,y", b'"x",']), max_size=30), st.integers(1, 9)
)
@settings(deadline=None, max_examples=300)
def test_the_fast_ways_are_the_slow_ones(parts: list[bytes], size: int) -> None:
    """Of any bytes: where records end, what is in them, and that none of the bytes is lost in any cut of the stream."""
    known, data = Delimited(","), b"".join(parts)
    fast, slow = known._ends_at_once(data, True), known._ends_one_by_one(data, True)
    if fast is not None:
        assert fast.tolist() == slow[0].tolist() and not any(slow[1])
    blocks = [(place, data[place : place + size]) for place in range(0, len(data), size)]
    records = list(known.records(iter([*blocks, (len(data), b"")]), 2))
    assert b"".join(part.data for part in records) == data
    assert [end + part.start for part in records for end in part.ends.tolist()] == slow[0].tolist()
    assert [is_damaged for part in records for is_damaged in part.is_damaged] == slow[1]
    header = delimited.Header(["p", "q"], 0)
    for part in records:
        at_once = known._table_at_once(part, header, [1])
        if at_once is not None:
            one_by_one = known._table_one_by_one(part, header, [1])
            assert at_once[0].to_pydict() == {"1": one_by_one[0]["1"].to_pylist()} and at_once[1] == one_by_one[1]


def test_a_malformed_record_is_one_reject_and_nothing_else_is_lost(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(
        b'id,text,labels\n1,good,a\n2,"never closed,b\n3,good,"c;c; d"\n4,"two\nlines",\n\n'
        b'5,good\n6,"x"y,b\n7,g\xff,b\n8,5" pipe,b\n'
    )
    found = [(row["id"], row["text"], row["labels"], row["reason"], row["detail"]) for row in documents(tmp_path / "x.csv")]
    quotes = ("invalid quotes", "a quote that is not closed, or text behind one that is")
    assert found == [
        ("1", "good", ["a"], None, None),
        (None, None, [], *quotes),
        ("3", "good", ["c", "d"], None, None),
        ("4", "two\nlines", [], None, None),
        (None, None, [], "wrong number of columns", "2, and 3 in the header"),
        (None, None, [], *quotes),
        ("7", None, ["b"], "text is not UTF-8", None),
        ("8", '5" pipe', ["b"], None, None),
    ]


def test_a_quote_that_is_never_closed_costs_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_BYTES", 50)
    monkeypatch.setattr(delimited, "_RECORD", 200)
    (tmp_path / "x.tsv").write_text('id\ttext\tlabels\n0\t"open\t\n' + "".join(f"{n}\tgood\ta\n" for n in range(1, 99)))
    found = documents(tmp_path / "x.tsv")
    assert [row["id"] for row in found] == [None, *map(str, range(1, 99))]
    assert [row["row"] for row in found] == [*range(99)] and found[0]["reason"] == "invalid quotes"
    (tmp_path / "y.csv").write_text("id,text,labels\n1,a,b\n" + "x" * 1000)
    assert [row["reason"] for row in documents(tmp_path / "y.csv")] == [None, "a record of more than 0 MiB"]


def test_packed_files_and_the_columns_of_a_header(tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"text,more,labels\nhello,x,a|b\n"))
    config = DocumentsConfig(uri=str(tmp_path), id=None, label_separator="|")
    (table,) = read_rows(config, labelled=True)
    assert table.select(["id", "text", "labels"]).to_pylist() == [{"id": "x.csv.gz:0", "text": "hello", "labels": ["a", "b"]}]
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path), id=None), labelled=True)
    with pytest.raises(DataError, match=r"column 'labels' has a wrong type.*found string.*set documents\.label_separator"):
        check_columns(list_inputs(config).files, rules)
    with pytest.raises(
        DataError, match=r"no column 'body'; found text, more, labels|no column 'body'.*found text, more, labels"
    ):
        list(read_rows(DocumentsConfig(uri=str(tmp_path), id=None, text=["body"]), labelled=False))
    with pytest.raises(ConfigError, match="label_separator; found ''"):
        DocumentsConfig(uri="x", label_separator="")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("id,text\n1,a\n".encode("utf-16"), "not UTF-8"),
        (b"id,te\xfft\n1,a\n", "the header is not UTF-8"),
        (b'id,"text\n1,a\n', "invalid quotes in the header"),
        (b"id,text\r1,a\r2,b\r", "lines end in carriage returns"),
    ],
)
def test_a_file_that_is_none_is_refused_and_a_later_one_a_reject(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False)
    with pytest.raises(DataError, match=f"cannot be read: .*x.csv; found {reason}"):
        check_columns([storage.stat(path)], rules)
    ((chunk,),) = [list(read_file(Segment(storage.stat(path)), rules))]
    assert chunk.reject is not None and chunk.reject.reason == reason


def test_another_delimiter_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id;text;labels\n1;a;b\n")
    with pytest.raises(
        DataError, match=r"no column 'id'.*found id;text;labels.*; put commas between columns, or tabs in a file"
    ):
        list(read_rows(DocumentsConfig(uri=str(tmp_path)), labelled=True))


def test_blank_cells_of_series_are_none_and_those_of_ids_rejects(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,text,of\n1,a,\n,b,s\n")
    rules = Rules.of(DocumentsConfig(uri=str(tmp_path)), labelled=False, series="of")
    rows = [row for part in read_file(Segment(storage.stat(tmp_path / "x.csv")), rules) for row in part.table.to_pylist()]
    assert [(row["series"], row["reason"]) for row in rows] == [(None, None), ("s", "id is empty")]


def test_a_large_file_is_one_part_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_ranges, "LARGE", 100)
    path = tmp_path / "x.csv"
    path.write_bytes(written([["id", "text"], *([f"{n}", "a"] for n in range(99))], ","))
    assert len(file_parts([storage.stat(path)])) == 1
    notice = packed_notice([storage.stat(path), FileInfo(uri="y.csv.gz", size=200, version="")])
    assert notice is not None and "since packed: 1 files" in notice
    assert f"may have newlines: 1 files of more than 0 MiB, the largest {path}" in notice


def test_tables_beside_documents_are_left_out_and_two_kinds_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "labels.csv"):
        (tmp_path / name).write_text("{}\n")
    inputs = list_inputs(DocumentsConfig(uri=str(tmp_path)))
    assert [file.uri for file in inputs.files] == [f"{tmp_path}/a.jsonl"] and inputs.left_out[".csv"].files == 1
    (tmp_path / "a.jsonl").rename(tmp_path / "a.tsv")
    with pytest.raises(DataError, match=r"documents of different kinds.*\*\.csv and \*\.tsv"):
        list_inputs(DocumentsConfig(uri=str(tmp_path)))
    assert format_of("x.CSV.zst") == ("csv", "zstd")
