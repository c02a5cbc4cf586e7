"""Tables that users bring: the same rows out of every format, and one line for what is none."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seaweed import S3

from xmc_ray import storage
from xmc_ray.data.tables import list_tables, read_label_names, read_table
from xmc_ray.errors import DataError

NAMES = {"007": "Bond, James", "b": None, "c": 'a "quote"\nin two lines'}
NAMED = ("label", "name")
ROWS = [{"label": label, "name": name} for label, name in NAMES.items()]
CSV = b'label,name\n007,"Bond, James"\nb,\nc,"a ""quote""\nin two lines"\n'
TSV = b'label\tname\r\n007\tBond, James\r\n\r\nb\t\r\nc\t"a ""quote""\nin two lines"'


def test_every_format_has_the_same_rows(tmp_path: Path, s3: S3) -> None:
    files = {"a.csv": CSV, "marked.CSV": b"\xef\xbb\xbf" + CSV, "packed.csv.gz": gzip.compress(CSV), "a.tsv": TSV}
    files["a.jsonl"] = "\n\n".join(map(json.dumps, ROWS)).encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert read_table(str(tmp_path / name), NAMED).to_pylist() == ROWS, name
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "names")
    assert read_table(str(tmp_path / "names"), NAMED).to_pylist() == ROWS, "whose name says nothing"
    storage.write_bytes(s3.uri("tables/names.csv"), CSV)
    assert read_label_names(s3.uri("tables/names.csv")) == read_label_names(str(tmp_path / "names"))
    assert read_label_names(None) is None


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", "label,name\nx\n", r"not a table in CSV: .*; found 1 cells in record 1, 2 columns"),
        ("a.csv", 'label,name\nx,"y\n', r"not a table in CSV: .*; found unexpected end of data"),
        ("a.tsv", "label\tlabel\nx\ty\n", r"not a table in TSV: .*; found columns label, label, some of them twice"),
        ("a.jsonl", '{"label": "x"}\n[1]\n', r"not a table in JSON lines: .*; found line 2: '\[1\]' in place of an object"),
        ("a.jsonl", '{"label": "x"}\n\n{', r"not a table in JSON lines: .*; found line 3: Expecting property name"),
        ("a.jsonl", "[" * 100_000, r"not a table in JSON lines: .*; found line 1: maximum recursion depth"),
        ("a.jsonl", '{"label": "x"}\n{"label": [1]}\n', r"not a table in JSON lines: "),
        ("a.csv", "", r"label names need one column 'label' and one 'name': .*; found no column"),
        ("a.parquet", "label,name\n", "not a Parquet file"),
        ("a.csv.gz", "label,name\n", r"not a table in CSV: .*a\.csv\.gz; found zlib"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, name: str, data: str, message: str) -> None:
    (tmp_path / name).write_text(data)
    with pytest.raises(DataError, match=message):
        read_label_names(str(tmp_path / name))


def test_what_other_columns_hold_does_not_matter(tmp_path: Path) -> None:
    rows = [{"label": "a", "editor": 3}, {"label": "b", "editor": "bob"}, {"label": "c", "editor": {"x": [1, "y"]}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("label,note\na,short\nb,{}\n".format("long" * 50_000))
    for name, labels in (("a.jsonl", ["a", "b", "c"]), ("a.csv", ["a", "b"])):
        table = read_table(str(tmp_path / name), ["label", "nothing"])
        assert table["label"].to_pylist() == labels and table[1].null_count == len(labels)


def test_integers_among_strings_are_their_digits_and_blank_cells_are_null(tmp_path: Path) -> None:
    """As in documents."""
    (tmp_path / "a.jsonl").write_text(
        '{"a": 12, "b": [1], "c": 1}\n{"a": "x7", "b": ["y", 2], "c": 2}\n{"a": 9999999999999999999999}'
    )
    table = read_table(str(tmp_path / "a.jsonl"), "abc")
    assert table.to_pydict() == {"a": ["12", "x7", "9999999999999999999999"], "b": [["1"], ["y", "2"], None], "c": [1, 2, None]}
    (tmp_path / "half.jsonl").write_text('{"a": "x\\ud800"}')
    assert read_table(str(tmp_path / "half.jsonl"), "a").to_pydict() == {"a": ["x\N{REPLACEMENT CHARACTER}"]}
    (tmp_path / "a.csv").write_text("a,b\n x,  \n")
    assert read_table(str(tmp_path / "a.csv"), "ab").to_pydict() == {"a": [" x"], "b": [None]}


def test_of_a_folder_whatever_is_a_table(tmp_path: Path) -> None:
    names = ["a.csv", "b.csv.gz", "c.CSV", "d.json", "e.jsonlines", "f.parquet"]
    for name in [*names, "notes.txt", "g.arrow", "_old.csv", ".h.csv"]:
        (tmp_path / name).write_bytes(b"")
    tables, others = list_tables(str(tmp_path))
    assert tables == [str(tmp_path / name) for name in names]
    assert others == [str(tmp_path / "g.arrow"), str(tmp_path / "notes.txt")]
    assert list_tables(str(tmp_path / "notes.txt")) == ([str(tmp_path / "notes.txt")], [])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no tables: .*empty; found .*notes\.txt; expected Parquet, CSV, TSV or JSON lines"):
        list_tables(str(tmp_path / "empty"))


def test_bytes_that_are_not_utf_8_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("label,name\nx,é\n".encode("latin1"))
    with pytest.raises(DataError, match=r"not a table in CSV: .*; found 'utf-8' codec can't decode byte 0xe9"):
        read_table(str(tmp_path / "a.csv"), NAMED)
    with pytest.raises(DataError, match="no such file"):
        read_table(str(tmp_path / "b.csv"), NAMED)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("ab"), st.text() | st.none(), max_size=2), max_size=5))
def test_json_lines_are_what_they_say(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str | None]]) -> None:
    file = tmp_path_factory.mktemp("tables") / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    names = {name for row in rows for name in row}
    assert read_table(str(file), "ab").to_pylist() == [{name: row.get(name) for name in names} for row in rows if names]
