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
from xmc_ray.data.tables import read_label_names, read_table
from xmc_ray.errors import DataError

NAMES = {"007": "Bond, James", "b": None, "c": 'a "quote"\nin two lines'}
ROWS = [{"label": label, "name": name} for label, name in NAMES.items()]
CSV = b'label,name\n007,"Bond, James"\nb,\nc,"a ""quote""\nin two lines"\n'
TSV = b'label\tname\r\n007\tBond, James\r\n\r\nb\t\r\nc\t"a ""quote""\nin two lines"'


def test_every_format_has_the_same_rows(tmp_path: Path, s3: S3) -> None:
    files = {"a.csv": CSV, "marked.CSV": b"\xef\xbb\xbf" + CSV, "packed.csv.gz": gzip.compress(CSV), "a.tsv": TSV}
    files["a.jsonl"] = "\n\n".join(map(json.dumps, ROWS)).encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert read_table(str(tmp_path / name)).to_pylist() == ROWS, name
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "names")
    assert read_table(str(tmp_path / "names")).to_pylist() == ROWS, "whose name says nothing"
    storage.write_bytes(s3.uri("tables/names.csv"), CSV)
    assert read_label_names(s3.uri("tables/names.csv")) == read_label_names(str(tmp_path / "names"))
    assert read_label_names(None) is None


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", "label,name\nx\n", r"not a table in CSV: .*; found 1 cells in record 1, 2 columns"),
        ("a.csv", 'label,name\nx,"y\n', r"not a table in CSV: .*; found unexpected end of data"),
        ("a.tsv", "label\tlabel\nx\ty\n", r"not a table in TSV: .*; found columns label, label, some of them twice"),
        ("a.jsonl", '{"label": "x"}\n[1]\n', r"not a table in JSON lines: .*; found '\[1\]' in place of an object"),
        ("a.jsonl", "{", r"not a table in JSON lines: "),
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


def test_bytes_that_are_not_utf_8_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("label,name\nx,é\n".encode("latin1"))
    with pytest.raises(DataError, match=r"not a table in CSV: .*; found 'utf-8' codec can't decode byte 0xe9"):
        read_table(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="no such file"):
        read_table(str(tmp_path / "b.csv"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("ab"), st.text() | st.none(), max_size=2), max_size=5))
def test_json_lines_are_what_they_say(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str | None]]) -> None:
    file = tmp_path_factory.mktemp("tables") / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    names = {name for row in rows for name in row}
    assert read_table(str(file)).to_pylist() == [{name: row.get(name) for name in names} for row in rows if names]
