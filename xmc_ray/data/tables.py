"""Tables that are read whole, such as names of labels: Parquet, CSV, TSV or JSON lines, as the name of the file says."""

import csv
import io
import json

import pyarrow as pa

from xmc_ray import storage
from xmc_ray.data.delimited import DELIMITERS
from xmc_ray.data.inputs import format_by_name, mark_length
from xmc_ray.data.labels import label_names
from xmc_ray.errors import DataError

TABLES = (".parquet", ".pq", ".parq", ".jsonl", ".ndjson", ".csv", ".tsv")  # the usual names of such files in a folder

Columns = dict[str, list[object]]


def read_label_names(uri: str | None) -> pa.Table | None:
    """The `labels.label_names` of a file, None without one; DataError for a file that is not such a table."""
    return None if uri is None else label_names(read_table(uri), uri)


def read_table(uri: str) -> pa.Table:
    """All rows and columns. Cells of CSV and TSV are strings, null where they are blank.

    A file whose name says nothing is taken for Parquet. DataError if it does not exist or is not what it is taken for.
    """
    format_ = format_by_name(uri)
    if format_ is None or format_.has_row_numbers:
        return storage.read_parquet(uri)
    data = storage.patiently(storage.read_bytes, uri)
    try:
        if format_.compression is not None:
            data = pa.input_stream(pa.py_buffer(data), compression=format_.compression).read()
        text = data[mark_length(data, uri) :].decode()
        columns = _of_json(text) if format_.kind == "json" else _of_cells(text, DELIMITERS[format_.kind])
        return pa.table({name: pa.array(values) for name, values in columns.items()})
    except (ValueError, TypeError, OSError, csv.Error, pa.ArrowException) as error:
        what = f"not a table in {'JSON lines' if format_.kind == 'json' else format_.kind.upper()}"
        raise DataError(what, where=uri, found=str(error).partition("\n")[0]) from None


def _of_json(text: str) -> Columns:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{str(wrong[0])[:40]!r} in place of an object")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _of_cells(text: str, delimiter: str) -> Columns:
    names, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row] or [[]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"{len(row)} cells in record {number}, {len(names)} columns")
    if len(set(names)) < len(names):
        raise ValueError(f"columns {', '.join(names)}, some of them twice")
    return {name: [row[place] or None for row in rows] for place, name in enumerate(names)}
