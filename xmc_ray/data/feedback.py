"""Feedback: what editors have said of tags, read as truth in training and as live precision afterwards.

A verdict says that a label is right for a document, or that it is wrong: ``id``, ``label``, ``verdict`` (accepted or rejected).
The latest one of a document and a label counts.

Letters: D documents, U of them with verdicts, V verdicts, M distinct labels of verdicts, J judged (document, label) pairs of
documents, P true ones, N rows of files, L labels of an index.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.labels import IntArray, list_lengths, lists_from_rows
from xmc_ray.data.strings import as_strings, keep_utf8, plain, trimmed
from xmc_ray.data.tables import list_tables, read_table
from xmc_ray.errors import DataError, one_line
from xmc_ray.settings import PositiveFloat, Settings

Mask = npt.NDArray[np.bool_]

ACCEPTED, REJECTED = "accepted", "rejected"
COLUMNS = ("id", "label", "verdict")
INCOMPLETE, OTHER_WORDS, OVERRULED = "incomplete rows", "rows with another verdict", "overruled by later ones"
_EXPECTED = "columns id, label, verdict (accepted or rejected) and, if there is one, at (a time)"


@dataclass(frozen=True, kw_only=True)
class FeedbackConfig(Settings):
    """What editors have said of tags."""

    uri: storage.Source | None = None
    """Table (Parquet, CSV, TSV or JSON lines), or folder of them, with columns id, label, verdict (accepted or rejected) and
    perhaps at, a time."""
    weight: PositiveFloat = 4.0
    """How much more than any other a judged pair of document and label counts in training."""

    @property
    def judged_weight(self) -> float | None:
        """The weight if there is feedback."""
        return None if self.uri is None else self.weight


@dataclass(frozen=True, eq=False)
class Feedback:
    """Verdicts, one for each document and label, sorted by both.

    ``ids``: string[U], distinct; those of document u are the verdicts from ``start_U1[u]`` to ``start_U1[u + 1]``. ``labels``:
    string[M], distinct; ``label_V``: int64, their numbers; ``accepted_V``: bool. ``left_out``: rows that do not count, by
    reason; ``where``: the address.
    """

    ids: pa.StringArray
    start_U1: IntArray
    labels: pa.StringArray
    label_V: IntArray
    accepted_V: Mask
    left_out: Mapping[str, int] = field(default_factory=dict)
    where: str | None = None

    @classmethod
    def of(cls, table: pa.Table, where: str | None = None) -> "Feedback":
        """The verdicts of a table with columns ``id``, ``label`` and ``verdict``; integers are decimal text.

        The latest of a document and a label counts: by ``at`` (times or dates, no time comes first) if there is such a column,
        and then by row. Rows in which one of the three is missing, blank or not UTF-8 are left out, and so are those with other
        words than accepted and rejected, whose case does not matter. Further columns are ignored. DataError for columns that
        are missing, doubled or of another type, and if there are rows but no verdict among them.
        """
        ids, labels, words = (_strings(table, name, where) for name in COLUMNS)
        labels, words = trimmed(labels), pc.utf8_lower(trimmed(words))
        is_whole = pc.and_(pc.and_(trimmed(ids).is_valid(), labels.is_valid()), words.is_valid())
        is_verdict = pc.and_(is_whole, pc.is_in(words, value_set=pa.array([ACCEPTED, REJECTED])))
        left_out = {INCOMPLETE: len(table) - is_whole.true_count, OTHER_WORDS: is_whole.true_count - is_verdict.true_count}
        if len(table) and not is_verdict.true_count:
            shown = ", ".join(map(repr, words.drop_null().unique().to_pylist()[:3])) or "empty cells"
            what, expected = "the feedback has no verdict", f"{ACCEPTED} or {REJECTED} in column verdict"
            raise DataError(what, where=where, found=f"{len(table):,} rows with {shown}", expected=expected)
        at = _times(table, where).cast(pa.int64()).fill_null(np.iinfo(np.int64).min)
        ids, labels, words, at = (part.filter(is_verdict) for part in (ids, labels, words, at))
        (ids, id_N), (labels, label_N) = _numbered(ids), _numbered(labels)
        pair_N = id_N * max(1, len(labels)) + label_N
        order_N = np.lexsort((np.asarray(at), pair_N))  # stable: rows of one time stay in order
        is_last_N = np.append(np.diff(pair_N[order_N]) != 0, True)[: len(order_N)]
        latest_V = order_N[is_last_N]
        left_out[OVERRULED] = len(order_N) - len(latest_V)
        start_U1 = np.searchsorted(id_N[latest_V], np.arange(len(ids) + 1))
        accepted_V = np.asarray(pc.equal(words, ACCEPTED), bool)[latest_V]
        return cls(ids, start_U1, labels, label_N[latest_V], accepted_V, left_out, where)

    @classmethod
    def read(cls, uri: str) -> "Feedback":
        """The verdicts of a table, or of all those of a folder, as `of`; later files are later rows."""
        files, others = list_tables(uri)
        tables = [_comparable(read_table(file, (*COLUMNS, "at")), file) for file in files]
        feedback = cls.of(pa.concat_tables(tables), uri)
        if not others:
            return feedback
        return replace(feedback, left_out={**feedback.left_out, f"files that are no tables, such as {others[0]}": len(others)})

    def __len__(self) -> int:
        return len(self.label_V)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the verdicts that count, however their rows are ordered and divided among files."""
        digest = hashlib.sha256()
        columns = {"id": self.ids, "label": self.labels, "start": self.start_U1, "number": self.label_V}
        for name, values in (columns | {"accepted": self.accepted_V}).items():
            batch = pa.record_batch({name: values})
            digest.update(batch.serialize())
        return digest.hexdigest()[:16]

    def of_documents(self, ids: pa.StringArray | pa.ChunkedArray) -> pa.ListArray:
        """list<int64>[D]: the numbers of the verdicts of each document, rising; none where an id is null."""
        distinct = plain(ids).dictionary_encode()
        # Which of the verdicts' documents are here, and not the reverse: the table of hashes is that of the smaller side.
        code_U = pc.index_in(self.ids, value_set=distinct.dictionary)
        is_here_U = np.asarray(code_U.is_valid())
        first_C, n_C = np.zeros((2, len(distinct.dictionary) + 1), np.int64)  # the last is for no id
        here = np.asarray(code_U.drop_null(), np.int64)
        first_C[here], n_C[here] = self.start_U1[:-1][is_here_U], np.diff(self.start_U1)[is_here_U]
        code_D = np.asarray(distinct.indices.fill_null(len(distinct.dictionary)), np.int64)
        n_D = n_C[code_D]
        ends_D = np.cumsum(n_D)
        numbers = np.arange(n_D.sum()) + np.repeat(first_C[code_D] - (ends_D - n_D), n_D)
        return pa.ListArray.from_arrays(pa.array(np.append(0, ends_D), pa.int32()), pa.array(numbers))

    def label_ids(self, labels: pa.StringArray) -> IntArray:
        """int64[M]: the row of each label in ``labels`` (string[L]), -1 where they lack it."""
        return np.asarray(pc.index_in(self.labels, value_set=labels).fill_null(-1), np.int64)

    def ids_of(self, labels: pa.StringArray) -> IntArray:
        """int64[n]: the number of each of ``labels`` among those of the verdicts, -1 where it is none."""
        return np.asarray(pc.index_in(labels, value_set=self.labels).fill_null(-1), np.int64)

    def corrected(
        self, truth: pa.ListArray, verdicts: pa.ListArray, labels: pa.StringArray
    ) -> tuple[pa.ListArray, pa.ListArray]:
        """The ``truth`` (list<int32>[D], ids of ``labels``) with accepted labels and without rejected ones; and the judged
        labels (list<int32>[D]), each once a document: those in the new truth are the accepted ones.

        ``verdicts`` as `of_documents` returns them. Those of labels that ``labels`` lacks change nothing.
        """
        n_rows, n_labels = len(truth), max(1, len(labels))
        number_J, row_J = np.asarray(verdicts.flatten(), np.int64), np.repeat(np.arange(n_rows), list_lengths(verdicts))
        id_J = self.label_ids(labels)[self.label_V[number_J]]
        known_J, accepted_J = id_J >= 0, self.accepted_V[number_J]
        key_P = np.repeat(np.arange(n_rows), list_lengths(truth)) * n_labels + np.asarray(truth.flatten(), np.int64)
        key_J = row_J * n_labels + id_J
        accepted, rejected = key_J[known_J & accepted_J], key_J[known_J & ~accepted_J]
        key = np.concatenate([key_P[~np.isin(key_P, rejected)], accepted[~np.isin(accepted, key_P)]])
        return _lists(key[np.argsort(key // n_labels, kind="stable")], n_labels, n_rows), _lists(
            key_J[known_J], n_labels, n_rows
        )

    def tally(self, found_V: Mask, labels: pa.StringArray) -> "Tally":
        """What counts, and what does not.

        ``found_V``: verdicts whose documents there are; ``labels``: those of these documents. DataError if the feedback is of
        another label set: if most of its labels are not among them.
        """
        known_M = self.label_ids(labels) >= 0
        n_unknown = int((~known_M).sum())
        if 2 * n_unknown > len(known_M):
            example = self.labels[int(np.argmin(known_M))].as_py()
            raise DataError(
                "the feedback is of another label set",
                where=self.where,
                found=f"{n_unknown:,} of {len(known_M):,} labels unknown, such as {example}",
                expected=f"labels of these documents, such as {labels[0]}",
                way_out="give verdicts on tags of a model of these labels",
            )
        used_V = found_V & known_M[self.label_V]
        accepted = int((used_V & self.accepted_V).sum())
        unknown = {"of unknown documents": int((~found_V).sum()), "of unknown labels": int((found_V & ~used_V).sum())}
        left_out = {reason: n for reason, n in {**self.left_out, **unknown}.items() if n}
        return Tally(accepted, int(used_V.sum()) - accepted, left_out)


class Tally(NamedTuple):
    """How many verdicts count, and how many rows and verdicts do not, by reason."""

    accepted: int
    rejected: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in self.left_out.items())
        used = f"feedback: {self.accepted:,} accepted and {self.rejected:,} rejected labels of documents"
        return one_line(f"{used}; left out: {left_out}") if left_out else used


def _strings(table: pa.Table, name: str, where: str | None) -> pa.StringArray:
    """A column as text, null where it is not UTF-8."""
    there = table.column_names.count(name)
    if there != 1:
        found = ", ".join(table.column_names) or "no column"
        what = f"the feedback has {'several columns' if there else 'no column'} {name!r}"
        raise DataError(what, where=where, found=found, expected=_EXPECTED)
    values, is_wrong = as_strings(table[name], integers=name != "verdict")
    if pc.any(is_wrong).as_py():
        what = f"column {name!r} of the feedback has a wrong type"
        raise DataError(what, where=where, found=table[name].type, expected="strings" + " or integers" * (name != "verdict"))
    return keep_utf8(values)[0]


def _times(table: pa.Table, where: str | None) -> pa.Array:
    """timestamp[us] of ``at``, in UTC, null where there is none."""
    there = table.schema.get_all_field_indices("at")
    if not there:
        return pa.nulls(len(table), pa.timestamp("us"))
    values = plain(table.column(there[0]))
    if pa.types.is_string(values.type):  # of formats that have no times
        texts = trimmed(values)
        values = _parsed(texts)
        if values is None:
            numbered = enumerate(texts.to_pylist())
            wrong = (f"{text!r} in row {row}" for row, text in numbered if _parsed(pa.array([text])) is None)
            found, expected = next(wrong, "times with an offset from UTC and others without"), "as 2026-11-30T12:00:00"
            raise DataError("column 'at' of the feedback is no time", where=where, found=found, expected=expected)
    kind = values.type
    if len(there) > 1 or not (pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_null(kind)):
        found = kind if len(there) == 1 else "several such columns"
        raise DataError("column 'at' of the feedback is no time", where=where, found=found, expected="timestamps")
    zone = kind.tz if pa.types.is_timestamp(kind) else None
    return values.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64()).cast(pa.timestamp("us"))


def _parsed(texts: pa.StringArray) -> pa.TimestampArray | None:
    """Times of ISO 8601, all without an offset from UTC or all with one; None if they are not."""
    for zone in (None, "UTC"):
        with suppress(pa.ArrowInvalid):
            return texts.cast(pa.timestamp("us", zone))
    return None


def _comparable(table: pa.Table, uri: str) -> pa.Table:
    """The columns that count, in types that all files of a folder share."""
    return pa.table({name: _strings(table, name, uri) for name in COLUMNS} | {"at": _times(table, uri)})


def _numbered(texts: pa.StringArray) -> tuple[pa.StringArray, IntArray]:
    """The distinct texts, sorted, and the number of each one among them."""
    encoded = texts.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank = np.empty(len(order), np.int64)
    rank[np.asarray(order)] = np.arange(len(order))
    return encoded.dictionary.take(order), rank[np.asarray(encoded.indices, np.int64)]


def _lists(key: IntArray, n_labels: int, n_rows: int) -> pa.ListArray:
    """list<int32>[n_rows] of the label ids in keys = row * n_labels + id, whose rows rise."""
    rows, ids = np.divmod(key, n_labels)
    return lists_from_rows(rows, pa.array(ids, pa.int32()), n_rows)
