"""The values of documents, out of columns of Arrow and out of JSON lines: their types, and why one cannot be used.

The same value gives the same from both.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from xmc_ray.data.labels import lists_from_rows
from xmc_ray.data.rejects import Reject
from xmc_ray.data.strings import as_strings, is_list, is_text, list_values, plain

Columns = Sequence[tuple[str, str]]  # (setting of DocumentsConfig, ``series`` or ``filter``; column that it names)

TYPES = dict.fromkeys(("id", "text", "series", "filter"), pa.string()) | {"labels": pa.list_(pa.string())}
_NUMBERS = ("id", "series", "filter")  # strings, in files integers as well
EXPECTED = {"text": "a string", "labels": "a list of strings or integers"} | dict.fromkeys(_NUMBERS, "a string or an integer")
_EITHER = {
    **dict.fromkeys(_NUMBERS, (pa.string(), pa.int64())),
    "labels": (TYPES["labels"], pa.list_(pa.int64())),
}
_NULL = pa.scalar(None, pa.string())
_TWICE = "{} is given twice"


def misfit(setting: str) -> str:
    """The reason of a row whose value for a setting (``id``, ``text``, ...) has a wrong type."""
    return f"{setting} is not {EXPECTED[setting]}"


def fits(setting: str, kind: pa.DataType, label_separator: str | None) -> bool:
    """Whether columns of type ``kind`` can be read as what the setting names, null columns included."""
    if setting == "labels" and (label_separator is None or not is_text(kind, integers=True)):
        return pa.types.is_null(kind) or (is_list(kind) and is_text(list_values(kind), integers=True))
    return is_text(kind, integers=setting in (*_NUMBERS, "labels"))


def column_values(setting: str, name: str, table: pa.Table, label_separator: str | None) -> tuple[pa.Array, pa.Array, str]:
    """The values of a column in its type of `TYPES`, why some of them cannot be used, and the particulars of that."""
    there = table.schema.get_all_field_indices(name)
    nothing, no_reason = pa.nulls(len(table), TYPES[setting]), pa.nulls(len(table), pa.string())
    if not there:
        return nothing, no_reason, ""
    if len(there) > 1:
        return nothing, pa.repeat(_TWICE.format(setting), len(table)), f"{len(there)} columns {name!r}"
    column = plain(table.column(there[0]))
    if setting == "labels" and label_separator is not None and is_text(column.type, integers=True):
        values, is_wrong = as_strings(column, integers=True)
        values = _split(values, label_separator)
    elif setting == "labels":
        values, is_wrong = _lists(column)
    else:
        values, is_wrong = as_strings(column, integers=setting in _NUMBERS)
    return values, pc.if_else(is_wrong, misfit(setting), _NULL), str(column.type)


def _lists(column: pa.Array) -> tuple[pa.ListArray, pa.BooleanArray]:
    """``column`` as list<string>, and bool[n], true where something is no list, or holds what is neither string nor integer."""
    if pa.types.is_null(column.type) or not is_list(column.type):
        return pa.nulls(len(column), TYPES["labels"]), column.is_valid()
    rows, (values, is_wrong) = pc.list_parent_indices(column).to_numpy(), as_strings(pc.list_flatten(column), integers=True)
    bad = np.zeros(len(column), bool)
    bad[rows[is_wrong.to_numpy(zero_copy_only=False)]] = True
    kept = ~bad[rows]
    return lists_from_rows(rows[kept], values.filter(pa.array(kept)), len(column)), pa.array(bad)


def _split(labels: pa.Array, separator: str | None) -> pa.ListArray:
    """Strings of labels as lists of them; lists stay."""
    return labels if separator is None or is_list(labels.type) else pc.split_pattern(labels, separator)


def line_values(lines: bytes, columns: Columns, label_separator: str | None) -> list[pa.Array]:
    """The values of ``columns`` in JSON lines, at least one, then why some cannot be used, and the particulars of that."""
    how = columns, label_separator
    return _parse_at_once(lines, *how) or _parse_one_by_one(lines, *how)


def _parse_at_once(lines: bytes, columns: Columns, label_separator: str | None = None) -> list[pa.Array] | None:
    """The columns and no rejects, if every line is an object with values of the right types."""
    n_lines = lines.count(b"\n") + 1
    # Arrow takes a line "null" for a row, or crashes on it (apache/arrow#47409); it must see none that is not an object.
    # Nor has it a type for a column that two settings name.
    is_named_twice = len({name for _, name in columns}) < len(columns)
    if is_named_twice or not lines.startswith(b"{") or lines.count(b"\n{") + 1 != n_lines:
        return None
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
    either = _EITHER if label_separator is None else _EITHER | {"labels": (*_EITHER["labels"], pa.string())}
    kinds = [either.get(setting, (TYPES[setting],)) for setting, _ in columns]
    for types in product(*kinds):
        schema = pa.schema([(name, kind) for (_, name), kind in zip(columns, types, strict=True)])
        parsing = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            table = pyarrow.json.read_json(pa.BufferReader(lines), reading, parsing)
            table.validate(full=True)
        except pa.ArrowInvalid:
            continue
        if len(table) == n_lines:
            parts = [(setting, table[name].combine_chunks()) for setting, name in columns]
            parts = [(setting, _split(part, label_separator) if setting == "labels" else part) for setting, part in parts]
            values = [part.cast(TYPES[setting]) for setting, part in parts]
            return [*values, *_no_rejects(n_lines)]
    return None


def _parse_one_by_one(lines: bytes, columns: Columns, label_separator: str | None = None) -> list[pa.Array]:
    """The columns, reasons and details; the slow twin of `_parse_at_once` for lines of any kind."""
    rows = [_parse_line(line, columns, label_separator) for line in lines.split(b"\n") if line.strip()]
    types = [*(TYPES[setting] for setting, _ in columns), pa.string(), pa.string()]
    return [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), types, strict=True)]


def _parse_line(line: bytes, columns: Columns, label_separator: str | None) -> tuple[Any, ...]:
    """The values of ``columns``, null where they do not fit, with reason and detail of the first that does not."""
    loaded = load_object(line)
    if isinstance(loaded, Reject):
        # Arrow passes over more in columns that are not wanted. What becomes of a line must not depend on the lines beside it.
        alone = _parse_at_once(line, columns, label_separator)
        return (*[None] * len(columns), *loaded) if alone is None else tuple(value.to_pylist()[0] for value in alone)
    pairs = [_check_value(setting, name, loaded, label_separator) for setting, name in columns]
    return *(value for value, _ in pairs), *next((reject for _, reject in pairs if reject), (None, None))


def load_object(line: bytes) -> "_Object | Reject":
    """The object in a line, or the reason why there is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_Object)  # of bytes, it would let surrogates pass
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair, which JSON lets pass
    except json.JSONDecodeError as error:
        return Reject("invalid JSON", f"{error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:
        return Reject("invalid JSON", type(error).__name__)
    return value if isinstance(value, _Object) else Reject("not a JSON object", type(value).__name__)


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys it had several times; the last value counts."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(name for name, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = {name for name, count in counts.items() if count > 1}


def _check_value(setting: str, name: str, row: "_Object", label_separator: str | None) -> tuple[Any, Reject | None]:
    """The value of ``name`` as Arrow takes it, or null and why it does not fit."""
    value = row.get(name)
    if name in row.repeated:
        return None, Reject(_TWICE.format(setting), f"keys {name!r}")
    if setting == "labels" and label_separator is not None and isinstance(value, str):
        return value.split(label_separator), None
    if setting == "labels" and isinstance(value, list):
        if all(isinstance(label, str | None) or type(label) is int for label in value):
            return [str(label) if type(label) is int else label for label in value], None
    elif setting in _NUMBERS and type(value) is int:
        return str(value), None
    elif value is None or (setting != "labels" and isinstance(value, str)):
        return value, None
    return None, Reject(misfit(setting), type(value).__name__)


def _no_rejects(rows: int) -> tuple[pa.Array, pa.Array]:
    return pa.nulls(rows, pa.string()), pa.nulls(rows, pa.string())
