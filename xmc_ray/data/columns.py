"""Lists that a caller gives in Python, as Arrow columns of documents.

The rules are those of files (`documents`): labels are strings or integers, trimmed, none blank. What a file's reader would
reject is an error here, since the caller can mend it; a blank text is taken, since every text of a list has an answer.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa

from xmc_ray.data.fields import join
from xmc_ray.data.labels import label_names, tidy
from xmc_ray.errors import DataError

_EXPECTED = "a list of strings or integers for each document"


Texts = Iterable[str] | Iterable[Mapping[str, str | None]] | Mapping[str, Iterable[str | None]]
"""A list of strings; of texts with fields a list of mappings from field to text, or a table of one column a field."""


def text_column(texts: Texts, name: str = "texts", fields: Sequence[str] = ()) -> pa.StringArray:
    """string[n], with ``fields`` as `fields.join` makes it of them; a field that a text lacks, or that is missing, is empty.

    DataError for anything but a list of strings, such as one string, a missing value or bytes; with ``fields`` for anything
    but a list of mappings or a table (a mapping of columns, of pandas or of pyarrow), and for a field that is unknown.
    """
    if fields:
        return _text_of_fields(texts, name, fields)
    rows = listed(texts, name, "a list of strings")
    for row, text in enumerate(rows):
        _check_text(text, f"{name}[{row}]", "a string")
    return pa.array(rows, pa.string())


def _text_of_fields(texts: Any, name: str, fields: Sequence[str]) -> pa.StringArray:
    known = ", ".join(fields)
    if _is_table(texts):
        table = dict(zip(texts.column_names, texts.columns, strict=True) if isinstance(texts, pa.Table) else texts.items())
        missing = [field for field in fields if field not in table]
        if missing:
            raise DataError(f"{name} lack a field", found=", ".join(map(str, table)), expected=known)
        _check_known(table, name, fields)
        columns = {field: listed(table[field], f"{name}[{field!r}]", "a list of strings") for field in fields}
        if len(lengths := {len(column) for column in columns.values()}) > 1:
            raise DataError(f"the fields of {name} differ in length", found=", ".join(map(str, sorted(lengths))))
    else:
        rows = listed(texts, name, f"a list of mappings, or a table, of the fields {known}")
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                expected = f"a mapping of the fields {known}"
                raise DataError("a text without fields", where=f"{name}[{number}]", found=_shown(row), expected=expected)
            _check_known(row, f"{name}[{number}]", fields)
        columns = {field: [row.get(field) for row in rows] for field in fields}
    for field, values in columns.items():
        for number, value in enumerate(values):
            if not _is_missing(value):
                _check_text(value, f"{name}[{number}], {field}", "a string")
    return join(
        [pa.array([None if _is_missing(value) else value for value in values], pa.string()) for values in columns.values()]
    )


def _is_table(texts: Any) -> bool:
    return isinstance(texts, Mapping | pa.Table) or (getattr(texts, "ndim", 1) == 2 and hasattr(texts, "items"))


def _check_known(names: Iterable[Any], where: str, fields: Sequence[str]) -> None:
    for name in names:
        if name not in fields:
            raise DataError("unknown field", where=where, found=repr(name), expected=", ".join(fields))


def label_column(labels: Iterable[Iterable[str | int] | None], name: str = "labels") -> pa.ListArray:
    """list<string>[n], as `labels.tidy` leaves them; no labels where a document's are None, or missing as pandas says it.

    DataError for a document whose labels are no list, and for labels that are neither strings nor integers.
    """
    rows = [_labels(value, f"{name}[{row}]") for row, value in enumerate(listed(labels, name, _EXPECTED))]
    return tidy(pa.array(rows, pa.list_(pa.string())))


def document_columns(
    texts: Texts, labels: Iterable[Iterable[str | int] | None], fields: Sequence[str] = ()
) -> tuple[pa.StringArray, pa.ListArray]:
    """The columns of labelled documents; DataError as `text_column` and `label_column`, and if they differ in length."""
    text, lists = text_column(texts, fields=fields), label_column(labels)
    if len(text) != len(lists):
        raise DataError("texts and labels differ in length", found=f"{len(text)} texts, {len(lists)} label lists")
    return text, lists


def name_table(names: Mapping[str | int, str | None] | None) -> pa.Table | None:
    """`labels.label_names` of a mapping from labels to their names; None for None. DataError for anything else."""
    if names is None:
        return None
    if not isinstance(names, Mapping):
        raise DataError("names are no mapping", found=_shown(names), expected="a dictionary from labels to names")
    labels = [_label(label, "names") for label in names]
    values = [None if _is_missing(name) else _label(name, f"names[{label!r}]") for label, name in names.items()]
    return label_names(pa.table({"label": pa.array(labels, pa.string()), "name": pa.array(values, pa.string())}))


def id_column(ids: Any, n_texts: int) -> pa.StringArray:
    """string[D]: the ids of so many texts, integers as decimal text; DataError for others than one string or integer each."""
    values = listed(ids, "ids", "strings or integers")
    if len(values) != n_texts:
        raise DataError("ids are not one for each text", found=f"{len(values):,} ids, {n_texts:,} texts")
    return pa.array([_label(value, f"id {number}") for number, value in enumerate(values)], pa.string())


def listed(values: Any, name: str, expected: str) -> list[Any]:
    """The values of a list, an array, a column or a generator; DataError for what has no order, no rows, or several columns."""
    is_list = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)
    if not is_list or getattr(values, "ndim", 1) != 1 or isinstance(values, pa.Table):
        way_out = f"for one of them, write [{name}]" if isinstance(values, str) else None
        raise DataError(f"{name} are no list", found=_shown(values), expected=expected, way_out=way_out)
    return list(values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else values)


def _labels(value: Any, where: str) -> list[str | None]:
    if _is_missing(value):
        return []
    if isinstance(value, Set):
        value = sorted(value, key=str)
    if not isinstance(value, list | tuple | np.ndarray):
        way_out = "for one label, write it as a list" if isinstance(value, str) else None
        raise DataError(
            "labels of a document are no list", where=where, found=_shown(value), expected=_EXPECTED, way_out=way_out
        )
    return [None if _is_missing(label) else _label(label, where) for label in value]


def _is_missing(value: Any) -> bool:
    """Whether it is None, or how NumPy and pandas say it: NaN, NaT, NA."""
    is_nan = isinstance(value, float | np.floating) and bool(np.isnan(value))
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def _label(value: Any, where: str) -> str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        try:
            return str(int(value))
        except ValueError as error:  # of more than 4,300 digits
            raise DataError("not a label", where=where, found=error, expected="strings or integers") from None
    return _check_text(value, where, "strings or integers")


def _check_text(value: Any, where: str, expected: str) -> str:
    if not isinstance(value, str):
        raise DataError("not a string", where=where, found=_shown(value), expected=expected)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError("not UTF-8", where=where, found="half a surrogate pair", expected="text") from None
    return value


def _shown(value: object) -> str:
    if isinstance(value, str | bytes | int | float):
        return f"{type(value).__name__} {value!r:.60}"
    shape = getattr(value, "shape", ())
    return type(value).__name__ + (f" of shape {tuple(shape)}" if shape else "")
