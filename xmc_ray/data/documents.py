"""Turns the columns of a file into documents, and says of each row that cannot be used why.

No row is dropped: one that cannot be used is kept with a ``reason``, bypasses the model and ends up among the rejects.
"""

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from xmc_ray import storage
from xmc_ray.data import fields as text_fields
from xmc_ray.data.labels import lists_from_rows, tidy
from xmc_ray.data.rejects import Reject
from xmc_ray.data.strings import as_strings, is_list, is_text, keep_utf8, list_values, plain, trimmed
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import Bounds, PositiveInt, Settings

Columns = Sequence[tuple[str, str]]  # (setting of DocumentsConfig, ``series`` or ``filter``; column that it names)

_NULL = pa.scalar(None, pa.string())
_TYPES = dict.fromkeys(("id", "text", "series", "filter"), pa.string()) | {"labels": pa.list_(pa.string())}
_NUMBERS = ("id", "series", "filter")  # strings, in files integers as well
_EITHER = {
    **dict.fromkeys(_NUMBERS, (pa.string(), pa.int64())),
    "labels": (_TYPES["labels"], pa.list_(pa.int64())),
}
_NULLABLE = {"id": "ids made of file and row", "series": "none"}
_EXPECTED = {"text": "a string", "labels": "a list of strings or integers"} | dict.fromkeys(_NUMBERS, "a string or an integer")
_TOO_LONG, _UNKNOWN_FILTER = "text is too long", "filter is unknown"
_SHOWN = 100  # characters of an unknown filter
_TWICE = "{} is given twice"


class FilterColumn(NamedTuple):
    """The column that names each document's filter (see `filters`), the names there are, and whether it may be null."""

    name: str
    known: tuple[str, ...]
    is_optional: bool


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig(Settings):
    """Where the documents are, and in which columns."""

    uri: storage.Source
    """A file, or a folder with all files below, local or s3://: Parquet (.parquet, .pq, .parq), JSON lines (.jsonl, .json,
    .ndjson), CSV or TSV with a header (.csv, .tsv), these also packed (.gz, .bz2, .zst), or a split that Hugging Face datasets
    has saved (.arrow). Other files in a folder are left out, and counted; so are CSV and TSV beside the others."""
    id: str | None = "id"
    """Column of the ids, strings or integers; null makes an id of the file, relative to ``uri``, and the row."""
    text: Annotated[list[str], Bounds(min_length=1)] = field(default_factory=lambda: ["text"])
    """Columns of the text, joined in this order; null and blank ones are skipped. With text.fields, the names of the fields."""
    separator: str = "\n"
    """Separator of joined texts; fields have their own."""
    labels: str = "labels"
    """Column of the labels, a list of strings or integers per document; read only where labels are needed."""
    label_separator: Annotated[str, Bounds(min_length=1)] | None = None
    """Separator of labels in one string, such as ; or |. CSV and TSV need it; lists of other formats are read as ever."""
    max_bytes: PositiveInt = 1 << 20
    """Maximum length of a text in bytes of UTF-8; longer ones are taken for errors in the file and rejected."""

    def with_fields(self, names: Sequence[str]) -> "DocumentsConfig":
        """Reads the columns of the text as a model's fields of these ``names``, or joined, as they are, if it has none.

        Raises ConfigError for other columns than the fields.
        """
        if not names:
            return self
        if self.text != list(names):
            raise ConfigError(
                "documents.text does not list the model's fields",
                where=self.uri,
                found=", ".join(self.text),
                expected=", ".join(names),
                way_out="set documents.text to the fields in this order; columns of these names hold them",
            )
        return replace(self, separator=text_fields.MARK)


def text_digest(texts: pa.Array) -> pa.Array:
    """string[n]: BLAKE2b of each text's UTF-8, 16 bytes as 32 hex digits; null stays null.

    A loop, because Arrow has no such kernel: 700,000 texts of 300 letters a second, most of it spent on hashing.
    """
    raw = texts.cast(pa.binary()).to_pylist()
    return pa.array([None if text is None else hashlib.blake2b(text, digest_size=16).hexdigest() for text in raw], pa.string())


def misfit(setting: str) -> str:
    """The reason of a row whose value for a setting (``id``, ``text``, ...) has a wrong type."""
    return f"{setting} is not {_EXPECTED[setting]}"


def _fits(setting: str, kind: pa.DataType, label_separator: str | None) -> bool:
    """Whether columns of type ``kind`` can be read as what the setting names, null columns included."""
    if setting == "labels" and (label_separator is None or not is_text(kind, integers=True)):
        return pa.types.is_null(kind) or (is_list(kind) and is_text(list_values(kind), integers=True))
    return is_text(kind, integers=setting in (*_NUMBERS, "labels"))


@dataclass(frozen=True)
class Rules:
    """Turns a file's columns into ``id``, ``text``, ``series``, ``filter`` and ``labels`` (if asked for), ``file``, ``row``,
    ``reason``, ``detail``.

    ``row`` (int64) counts from 0, without blank lines. ``reason`` and ``detail`` are those of `Reject`, null in a good row.
    Parquet and JSON lines give the same for the same values: integers become strings where they are allowed, a column that a
    file lacks is null in all its rows, and labels are as `labels.tidy` leaves them.
    """

    columns: Columns
    separator: str
    max_bytes: int
    root: str  # what made ids leave out of a file's address
    filters: FilterColumn | None = None
    label_separator: str | None = None

    @classmethod
    def of(
        cls, config: DocumentsConfig, *, labelled: bool, series: str | None = None, filters: FilterColumn | None = None
    ) -> "Rules":
        """The rules that a config sets, with labels or without, and with columns of the series and the filters or without."""
        wanted = [("id", config.id), *(("text", name) for name in config.text), ("series", series)]
        wanted += [("filter", None if filters is None else filters.name)]
        wanted += [("labels", config.labels)] if labelled else []
        columns = [(setting, name) for setting, name in wanted if name is not None]
        return cls(columns, config.separator, config.max_bytes, config.uri, filters, config.label_separator)

    @property
    def names(self) -> list[str]:
        """The columns to read, each once."""
        return [*dict.fromkeys(name for _, name in self.columns)]

    @property
    def makes_ids(self) -> bool:
        """Whether files have no column of ids."""
        return self.columns[0][0] != "id"

    def made_ids(self, file: str, rows: pa.Array) -> pa.Array:
        """The ids of rows of a file that has no column for them."""
        return pc.binary_join_element_wise(_below(self.root, file), rows.cast(pa.string()), ":")

    def problems(self, file: str, found: Sequence[tuple[str, pa.DataType | None]]) -> dict[tuple[str, str], DataError]:
        """What is wrong with the columns of a file, by setting and column.

        ``found`` has their names and types, None where each row has its own.
        """
        problems, types = {}, dict(found)
        for setting, name in self.columns:
            name_of_setting = {"series": "validation.series", "filter": "filters.column"}.get(setting, f"documents.{setting}")
            hints = {"where": file, "expected": _EXPECTED[setting], "way_out": f"set {name_of_setting} to the right column"}
            if setting in _NULLABLE:
                hints["way_out"] += f", or to null for {_NULLABLE[setting]}"
            if name not in types:
                problems[setting, name] = DataError(f"no column {name!r}", found=", ".join(types), **hints)
            elif [other for other, _ in found].count(name) > 1:
                problems[setting, name] = DataError(f"several columns {name!r}", **hints)
            elif (kind := types[name]) is not None and not _fits(setting, kind, self.label_separator):
                if setting == "labels" and is_text(kind):
                    hints["way_out"] = "set documents.label_separator, if it has the labels in one string"
                problems[setting, name] = DataError(f"column {name!r} has a wrong type", found=kind, **hints)
        return problems

    def from_parquet(self, table: pa.Table, file: str, row: int, rejects: Sequence[Reject | None] | None = None) -> pa.Table:
        """The rows of ``table``, whose first is number ``row`` of the file; it may lack columns, or have them twice.

        ``rejects``: of each row, if it is known by now that it cannot be used.
        """
        columns = [_taken(setting, name, table, self.label_separator) for setting, name in self.columns]
        details = [pc.if_else(pc.is_valid(reason), detail, _NULL) for _, reason, detail in columns]
        reasons = [reason for _, reason, _ in columns]
        if rejects is not None:
            reasons.insert(0, pa.array([reject and reject.reason for reject in rejects], pa.string()))
            details.insert(0, pa.array([reject and reject.detail for reject in rejects], pa.string()))
        return self._documents([part for part, _, _ in columns], pc.coalesce(*reasons), pc.coalesce(*details), file, row)

    def from_json(self, lines: bytes, file: str, row: int) -> pa.Table:
        """The rows of ``lines``, at least one, without a newline at the end."""
        how = self.columns, self.label_separator
        *values, reasons, details = _parse_at_once(lines, *how) or _parse_one_by_one(lines, *how)
        return self._documents(values, reasons, details, file, row)

    def without_blanks(self, table: pa.Table) -> pa.Table:
        """A table of CSV, which has no null: blank cells of series and filters are null."""
        for setting, name in self.columns:
            place = table.schema.get_field_index(name)
            if setting in ("series", "filter") and place >= 0:
                values = table.column(place)
                blank = pc.equal(values, b"").fill_null(True)
                table = table.set_column(place, name, pc.if_else(blank, pa.scalar(None, values.type), values))
        return table

    def unreadable(self, rows: int, reject: Reject, file: str, row: int) -> pa.Table:
        """Rows whose content is unknown."""
        values = [pa.nulls(rows, _TYPES[setting]) for setting, _ in self.columns]
        reasons, details = (pa.repeat(pa.scalar(part, pa.string()), rows) for part in reject)
        return self._documents(values, reasons, details, file, row, made_ids=False)

    def empty(self) -> pa.Table:
        """No rows, but the columns of all others."""
        return self.unreadable(0, Reject(""), "", 0)

    def _documents(
        self, values: Sequence[pa.Array], reasons: pa.Array, details: pa.Array, file: str, row: int, made_ids: bool = True
    ) -> pa.Table:
        """From the values of ``columns``, in the types of `_TYPES`, and the rejects that are known by now."""
        further, strings, series_is_utf8, labels_are_utf8 = {}, [], *[pa.repeat(True, len(reasons))] * 2
        filter_reasons = pa.nulls(len(reasons), pa.string())
        for (setting, _), value in zip(self.columns, values, strict=True):
            if setting == "labels":
                further["labels"], labels_are_utf8 = _tidy_utf8(value)
            elif setting == "series":
                further["series"], series_is_utf8 = keep_utf8(value)
            elif setting == "filter":
                further["filter"], filter_reasons = self._checked_filters(value)
            else:
                strings.append(value)
        rows = pa.array(np.arange(row, row + len(reasons)))
        if self.makes_ids:
            strings.insert(0, self.made_ids(file, rows) if made_ids else pa.nulls(len(reasons), pa.string()))
        (ids, *parts), (id_is_utf8, *part_is_utf8) = zip(*map(keep_utf8, strings), strict=True)
        text, text_reasons = _join(parts, self.separator)
        too_long = pc.greater(pc.binary_length(text), self.max_bytes).fill_null(False)
        reasons = pc.coalesce(
            reasons,
            _unless(id_is_utf8, "id is not UTF-8"),
            _unless(pc.is_valid(ids), "id is null"),
            _unless(pc.not_equal(ids, ""), "id is empty"),
            _unless(reduce(pc.and_, part_is_utf8), "text is not UTF-8"),
            _unless(series_is_utf8, "series is not UTF-8"),
            _unless(labels_are_utf8, "labels are not UTF-8"),
            text_reasons,
            _unless(pc.invert(too_long), _TOO_LONG),
            filter_reasons,
        )
        details = pc.coalesce(
            details, _unless(pc.not_equal(reasons, _TOO_LONG).fill_null(True), f"more than {self.max_bytes:,} bytes")
        )
        if self.filters is not None:
            shown = pc.utf8_slice_codeunits(further["filter"], 0, _SHOWN)
            details = pc.coalesce(details, pc.if_else(pc.equal(reasons, _UNKNOWN_FILTER).fill_null(False), shown, _NULL))
        text = pc.if_else(too_long, _NULL, text)
        files = pa.repeat(pa.scalar(file), len(reasons))
        return pa.table({"id": ids, "text": text, **further, "file": files, "row": rows, "reason": reasons, "detail": details})

    def _checked_filters(self, values: pa.Array) -> tuple[pa.Array, pa.Array]:
        """The names of filters, null where they are blank, and why a row cannot have the one that it names."""
        assert self.filters is not None
        names, is_utf8 = keep_utf8(values)
        names = trimmed(names)
        is_known = pc.is_in(names, value_set=pa.array(self.filters.known, pa.string()))
        is_given = pc.or_(pc.is_valid(names), pa.scalar(self.filters.is_optional))
        is_known = pc.or_(is_known, pc.invert(pc.is_valid(names)))
        return names, pc.coalesce(
            _unless(is_utf8, "filter is not UTF-8"),
            _unless(is_given, "filter is null"),
            _unless(is_known, _UNKNOWN_FILTER),
        )


def _below(root: str, file: str) -> str:
    """The address of ``file`` without that of the folder that holds it."""
    return posixpath.basename(file) if file == root else posixpath.relpath(file, root)


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
    kinds = [either.get(setting, (_TYPES[setting],)) for setting, _ in columns]
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
            values = [part.cast(_TYPES[setting]) for setting, part in parts]
            return [*values, *_no_rejects(n_lines)]
    return None


def _parse_one_by_one(lines: bytes, columns: Columns, label_separator: str | None = None) -> list[pa.Array]:
    """The columns, reasons and details; the slow twin of `_parse_at_once` for lines of any kind."""
    rows = [_parse_line(line, columns, label_separator) for line in lines.split(b"\n") if line.strip()]
    types = [*(_TYPES[setting] for setting, _ in columns), pa.string(), pa.string()]
    return [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), types, strict=True)]


def _parse_line(line: bytes, columns: Columns, label_separator: str | None) -> tuple[Any, ...]:
    """The values of ``columns``, null where they do not fit, with reason and detail of the first that does not."""
    loaded = load_object(line)
    if isinstance(loaded, Reject):
        return *[None] * len(columns), *loaded
    pairs = [_check_value(setting, name, loaded, label_separator) for setting, name in columns]
    return *(value for value, _ in pairs), *next((reject for _, reject in pairs if reject), (None, None))


def load_object(line: bytes) -> "_Object | Reject":
    """The object in a line, or the reason why there is none."""
    try:
        value = json.loads(line, object_pairs_hook=_Object)
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


def _join(parts: Sequence[pa.Array], separator: str) -> tuple[pa.Array, pa.Array]:
    """The joined text, null where there is none, and the reason for that. Fields keep their places, blank or not."""
    filled = [pc.if_else(pc.or_(pc.utf8_is_space(part), pc.equal(part, "")), _NULL, part) for part in parts]
    # Not by null_handling="skip", which leaves out rows whose parts are all null.
    text = reduce(lambda left, right: pc.coalesce(pc.binary_join_element_wise(left, right, separator), left, right), filled)
    if separator == text_fields.MARK:
        text = pc.if_else(pc.is_valid(text), text_fields.join(filled), _NULL)
    is_null = reduce(pc.and_, map(pc.is_null, parts))
    return text, pc.coalesce(_unless(pc.invert(is_null), "text is null"), _unless(pc.is_valid(text), "text is empty"))


def _no_rejects(rows: int) -> tuple[pa.Array, pa.Array]:
    return pa.nulls(rows, pa.string()), pa.nulls(rows, pa.string())


def _unless(condition: pa.Array, reason: str) -> pa.Array:
    return pc.if_else(condition, _NULL, reason)


def _taken(setting: str, name: str, table: pa.Table, label_separator: str | None) -> tuple[pa.Array, pa.Array, str]:
    """The values of a column in its type of `_TYPES`, why some of them cannot be used, and the particulars of that."""
    there = table.schema.get_all_field_indices(name)
    nothing, no_reason = pa.nulls(len(table), _TYPES[setting]), pa.nulls(len(table), pa.string())
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
    return values, _unless(pc.invert(is_wrong), misfit(setting)), str(column.type)


def _split(labels: pa.Array, separator: str | None) -> pa.ListArray:
    """Strings of labels as lists of them; lists stay."""
    return labels if separator is None or is_list(labels.type) else pc.split_pattern(labels, separator)


def _lists(column: pa.Array) -> tuple[pa.ListArray, pa.BooleanArray]:
    """``column`` as list<string>, and bool[n], true where something is no list, or holds what is neither string nor integer."""
    if pa.types.is_null(column.type) or not is_list(column.type):
        return pa.nulls(len(column), _TYPES["labels"]), column.is_valid()
    rows, (values, is_wrong) = pc.list_parent_indices(column).to_numpy(), as_strings(pc.list_flatten(column), integers=True)
    bad = np.zeros(len(column), bool)
    bad[rows[is_wrong.to_numpy(zero_copy_only=False)]] = True
    kept = ~bad[rows]
    return lists_from_rows(rows[kept], values.filter(pa.array(kept)), len(column)), pa.array(bad)


def _tidy_utf8(lists: pa.ListArray) -> tuple[pa.ListArray, pa.BooleanArray]:
    """``lists`` as `tidy` leaves them, empty where a label is not UTF-8, and bool[n], false there."""
    rows, (values, is_utf8) = pc.list_parent_indices(lists).to_numpy(), keep_utf8(pc.list_flatten(lists))
    good = np.ones(len(lists), bool)
    good[rows[~is_utf8.to_numpy(zero_copy_only=False)]] = False
    kept = good[rows]
    return tidy(lists_from_rows(rows[kept], values.filter(pa.array(kept)), len(lists))), pa.array(good)
