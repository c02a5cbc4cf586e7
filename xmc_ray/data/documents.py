"""Turns the columns of a file into documents, and says of each row that cannot be used why.

No row is dropped: one that cannot be used is kept with a ``reason``, bypasses the model and ends up among the rejects.
"""

import hashlib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data import fields as text_fields
from xmc_ray.data.labels import lists_from_rows, tidy
from xmc_ray.data.rejects import Reject
from xmc_ray.data.strings import is_text, keep_utf8, trimmed
from xmc_ray.data.values import EXPECTED, TYPES, Columns, column_values, fits, line_values
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import Bounds, PositiveInt, Settings

_NULL = pa.scalar(None, pa.string())
_OTHER_DELIMITERS = ";|\t"  # that some programs write in files called .csv
_NULLABLE = {"id": "ids made of file and row", "series": "none"}
_TOO_LONG, _UNKNOWN_FILTER = "text is too long", "filter is unknown"
_SHOWN = 100  # characters of an unknown filter


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
            hints = {"where": file, "expected": EXPECTED[setting], "way_out": f"set {name_of_setting} to the right column"}
            if setting in _NULLABLE:
                hints["way_out"] += f", or to null for {_NULLABLE[setting]}"
            if name not in types:
                if len(types) == 1 and any(mark in next(iter(types)) for mark in _OTHER_DELIMITERS):
                    hints["way_out"] = "put commas between columns, or tabs in a file called .tsv"
                problems[setting, name] = DataError(f"no column {name!r}", found=", ".join(types), **hints)
            elif [other for other, _ in found].count(name) > 1:
                problems[setting, name] = DataError(f"several columns {name!r}", **hints)
            elif (kind := types[name]) is not None and not fits(setting, kind, self.label_separator):
                if setting == "labels" and is_text(kind):
                    hints["way_out"] = "set documents.label_separator, if it has the labels in one string"
                problems[setting, name] = DataError(f"column {name!r} has a wrong type", found=kind, **hints)
        return problems

    def from_parquet(self, table: pa.Table, file: str, row: int, rejects: Sequence[Reject | None] | None = None) -> pa.Table:
        """The rows of ``table``, whose first is number ``row`` of the file; it may lack columns, or have them twice.

        ``rejects``: of each row, if it is known by now that it cannot be used.
        """
        columns = [column_values(setting, name, table, self.label_separator) for setting, name in self.columns]
        details = [pc.if_else(pc.is_valid(reason), detail, _NULL) for _, reason, detail in columns]
        reasons = [reason for _, reason, _ in columns]
        if rejects is not None:
            reasons.insert(0, pa.array([reject and reject.reason for reject in rejects], pa.string()))
            details.insert(0, pa.array([reject and reject.detail for reject in rejects], pa.string()))
        return self._documents([part for part, _, _ in columns], pc.coalesce(*reasons), pc.coalesce(*details), file, row)

    def from_json(self, lines: bytes, file: str, row: int) -> pa.Table:
        """The rows of ``lines``, at least one, without a newline at the end."""
        *values, reasons, details = line_values(lines, self.columns, self.label_separator)
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
        values = [pa.nulls(rows, TYPES[setting]) for setting, _ in self.columns]
        reasons, details = (pa.repeat(pa.scalar(part, pa.string()), rows) for part in reject)
        return self._documents(values, reasons, details, file, row, made_ids=False)

    def empty(self) -> pa.Table:
        """No rows, but the columns of all others."""
        return self.unreadable(0, Reject(""), "", 0)

    def _documents(
        self, values: Sequence[pa.Array], reasons: pa.Array, details: pa.Array, file: str, row: int, made_ids: bool = True
    ) -> pa.Table:
        """From the values of ``columns``, in the types of `TYPES`, and the rejects that are known by now."""
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


def _join(parts: Sequence[pa.Array], separator: str) -> tuple[pa.Array, pa.Array]:
    """The joined text, null where there is none, and the reason for that. Fields keep their places, blank or not."""
    filled = [pc.if_else(pc.or_(pc.utf8_is_space(part), pc.equal(part, "")), _NULL, part) for part in parts]
    # Not by null_handling="skip", which leaves out rows whose parts are all null.
    text = reduce(lambda left, right: pc.coalesce(pc.binary_join_element_wise(left, right, separator), left, right), filled)
    if separator == text_fields.MARK:
        text = pc.if_else(pc.is_valid(text), text_fields.join(filled), _NULL)
    is_null = reduce(pc.and_, map(pc.is_null, parts))
    return text, pc.coalesce(_unless(pc.invert(is_null), "text is null"), _unless(pc.is_valid(text), "text is empty"))


def _unless(condition: pa.Array, reason: str) -> pa.Array:
    return pc.if_else(condition, _NULL, reason)


def _tidy_utf8(lists: pa.ListArray) -> tuple[pa.ListArray, pa.BooleanArray]:
    """``lists`` as `tidy` leaves them, empty where a label is not UTF-8, and bool[n], false there."""
    rows, (values, is_utf8) = pc.list_parent_indices(lists).to_numpy(), keep_utf8(pc.list_flatten(lists))
    good = np.ones(len(lists), bool)
    good[rows[~is_utf8.to_numpy(zero_copy_only=False)]] = False
    kept = good[rows]
    return tidy(lists_from_rows(rows[kept], values.filter(pa.array(kept)), len(lists))), pa.array(good)
