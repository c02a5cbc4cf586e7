"""Tables that are read whole, such as names of labels: Parquet, CSV, TSV or JSON lines, as the name of the file says."""

import csv
import io
import json
import re
from collections.abc import Collection

import pyarrow as pa

from xmc_ray import storage
from xmc_ray.data.delimited import DELIMITERS
from xmc_ray.data.inputs import format_by_name, mark_length
from xmc_ray.data.labels import label_names
from xmc_ray.errors import DataError

_HALVES = re.compile("[\ud800-\udfff]")  # of characters, which JSON may spell
_CELL = 16 << 20  # characters of a cell of CSV, at most

Columns = dict[str, list[object]]


def read_label_names(uri: str | None) -> pa.Table | None:
    """The `labels.label_names` of a file, None without one; DataError for a file that is not such a table."""
    return None if uri is None else label_names(read_table(uri, ("label", "name")), uri)


def read_table(uri: str, columns: Collection[str]) -> pa.Table:
    """All rows, with what they have in ``columns``. Of others only the names count: out of text they come without values.

    Cells of CSV and TSV are strings, null where they are blank. In JSON lines integers may stand among strings, and are decimal
    text there. A file whose name says nothing is taken for Parquet. DataError if it does not exist or is not what it is taken
    for.
    """
    format_ = format_by_name(uri)
    if format_ is None or format_.has_row_numbers:
        return storage.read_parquet(uri)
    data = storage.patiently(storage.read_bytes, uri)
    try:
        if format_.compression is not None:
            data = pa.input_stream(pa.py_buffer(data), compression=format_.compression).read()
        text = data[mark_length(data, uri) :].decode()
        cells = _of_json(text) if format_.kind == "json" else _of_cells(text, DELIMITERS[format_.kind])
        return pa.table({name: _array(part) if name in columns else pa.nulls(len(part)) for name, part in cells.items()})
    except (ValueError, TypeError, OSError, RecursionError, csv.Error, pa.ArrowException) as error:
        what = f"not a table in {'JSON lines' if format_.kind == 'json' else format_.kind.upper()}"
        raise DataError(what, where=uri, found=str(error).partition("\n")[0]) from None


def list_tables(uri: str) -> tuple[list[str], list[str]]:
    """The files of a table, or of all those of a folder, that `read_table` reads, sorted; and those that it does not read."""
    files = [file.uri for file in storage.visible_files(uri, lambda name: format_by_name(name) is not None)]
    if files == [uri]:
        return files, []
    kinds = {file: format_by_name(file) for file in files}
    tables = sorted(file for file, format_ in kinds.items() if format_ is not None and format_.kind != "arrow")
    if not tables:
        expected = "Parquet, CSV, TSV or JSON lines"
        raise DataError("no tables", where=uri, found=", ".join(files[:3]) or "nothing", expected=expected)
    return tables, sorted({*files} - {*tables})


def _of_json(text: str) -> Columns:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"line {number}: {what}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: {str(row)[:40]!r} in place of an object")
        rows.append(row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _of_cells(text: str, delimiter: str) -> Columns:
    before = csv.field_size_limit(_CELL)
    try:
        records = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    finally:
        csv.field_size_limit(before)
    names, *rows = records or [[]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"{len(row)} cells in record {number}, {len(names)} columns")
    if len(set(names)) < len(names):
        raise ValueError(f"columns {', '.join(names)}, some of them twice")
    return {name: [row[place] if row[place].strip() else None for row in rows] for place, name in enumerate(names)}


def _array(values: list[object]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeError, OverflowError):
        return pa.array(list(map(_text, values)))


def _text(value: object) -> object:
    """Integers as decimal text, also those in a list; U+FFFD in place of halves of characters."""
    if isinstance(value, list):
        return list(map(_text, value))
    if isinstance(value, str):
        return _HALVES.sub("\N{REPLACEMENT CHARACTER}", value)
    return str(value) if type(value) is int else value
