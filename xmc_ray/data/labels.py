"""The label index: each label's name, frequency and id.

A label's *id* is its row in the index, 0 to L-1, most frequent first. Documents' labels are Arrow lists, of strings in files
and of int32 ids inside, so that one call encodes a million rows.
"""

import difflib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray.data.strings import as_strings, keep_utf8, trimmed
from xmc_ray.errors import ConfigError, DataError

IntArray = npt.NDArray[np.int64]

_TABLES = 64  # chunks whose counts are kept before they are added up
_N_DOCUMENTS = b"xmc_ray.documents"


@dataclass(frozen=True, eq=False)
class LabelIndex:
    """The labels of a training split.

    ``labels``: string[L], unique; ``counts``: int64[L], training documents of each; ``names``: string[L], null where a
    label has no name; ``n_documents``: training documents in all, labelled or not.
    """

    labels: pa.StringArray
    counts: IntArray
    names: pa.StringArray
    n_documents: int

    @classmethod
    def count(cls, documents: Iterable[pa.ListArray]) -> "LabelIndex":
        """Index of the labels in ``documents`` (chunks of list<string>), each counted once a document.

        Ordered by falling count, then by label, so that ids do not depend on the order of reading. DataError when there is
        no label at all.
        """
        n_documents, tables = 0, [pa.table({"label": pa.array([], pa.string()), "count": pa.array([], pa.int64())})]
        for lists in documents:
            n_documents += len(lists)
            labels, counts = pc.value_counts(pc.list_flatten(unique_in_rows(lists))).flatten()
            tables.append(pa.table({"label": labels.cast(pa.string()), "count": counts}))
            if len(tables) > _TABLES:
                tables = [_summed(tables)]
        totals = _summed(tables).sort_by([("count", "descending"), ("label", "ascending")])
        if not len(totals):
            found, way_out = f"{n_documents} documents", "set documents.labels to the column of label lists"
            raise DataError("no document has a label", found=found, expected="at least one label to learn", way_out=way_out)
        labels = totals["label"].combine_chunks()
        return cls(labels, totals["count"].to_numpy(), pa.nulls(len(labels), pa.string()), n_documents)

    def __len__(self) -> int:
        return len(self.labels)

    def with_names(self, table: pa.Table) -> "LabelIndex":
        """The same index with the names of ``table``, null for all other labels; DataError as `label_names`."""
        named = label_names(table)
        rows = pc.index_in(self.labels, value_set=named["label"].combine_chunks())
        return replace(self, names=named["name"].combine_chunks().take(rows))

    def encode(self, lists: pa.ListArray) -> pa.ListArray:
        """list<string> to list<int32> of ids, each once a row; labels that are not in the index are left out."""
        lists = unique_in_rows(lists)
        ids = pc.index_in(pc.list_flatten(lists), value_set=self.labels)
        rows = pc.list_parent_indices(lists).to_numpy()
        known = ids.is_valid().to_numpy(zero_copy_only=False)
        return lists_from_rows(rows[known], pc.drop_null(ids).cast(pa.int32()), len(lists))

    def recounted(self, counts: IntArray) -> "LabelIndex":
        """The same labels by new ``counts`` (int64[L]), in the order that `count` gives, without those of no document.

        DataError if none is left.
        """
        table = pa.table({"label": self.labels, "name": self.names, "count": counts}).filter(pa.array(counts > 0))
        table = table.sort_by([("count", "descending"), ("label", "ascending")])
        if not len(table):
            raise DataError("no document has a label any more", found=f"{self.n_documents:,} documents")
        label, name, count = (column.combine_chunks() for column in table.columns)
        return LabelIndex(label, count.to_numpy(), name, self.n_documents)

    def find(self, label: str) -> int:
        """The id of a label; ConfigError, with the labels of the most similar spelling, if it is not in the index."""
        index = int(pc.index(self.labels, label).as_py())
        if index < 0:
            near = difflib.get_close_matches(label, self.labels.to_pylist(), n=3, cutoff=0.4)
            hint = f"perhaps one of: {', '.join(near)}" if near else "no label is spelt like it"
            raise ConfigError("the bundle does not know this label", found=label, way_out=hint)
        return index

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of the labels in their order, without names and counts."""
        digest = hashlib.sha256()
        for label in self.labels.to_pylist():
            digest.update(label.encode() + b"\0")
        return digest.hexdigest()[:32]

    def to_table(self) -> pa.Table:
        """Columns ``label``, ``name``, ``count``; the row is the id, and the schema's metadata has the number of documents."""
        table = pa.table({"label": self.labels, "name": self.names, "count": self.counts})
        return table.replace_schema_metadata({_N_DOCUMENTS: str(self.n_documents)})

    @classmethod
    def from_table(cls, table: pa.Table) -> "LabelIndex":
        """The inverse of `to_table`; further columns are ignored."""
        columns = {name: table[name].combine_chunks() for name in ("label", "name", "count")}
        return cls(columns["label"], columns["count"].to_numpy(), columns["name"], int(table.schema.metadata[_N_DOCUMENTS]))

    def save(self, path: Path) -> None:
        """Write to a Parquet file."""
        pq.write_table(self.to_table(), path)

    @classmethod
    def load(cls, path: Path) -> "LabelIndex":
        """Read what `save` has written."""
        return cls.from_table(pq.read_table(path))


def label_names(table: pa.Table, where: str | None = None) -> pa.Table:
    """``label`` (each once, none null or blank) and ``name`` (null where there is none), trimmed, integers as decimal text.

    DataError for a column that is missing, doubled or of another type, for bytes that are not UTF-8, and for a label with two
    different names; ``where`` is the address to tell.
    """
    columns = []
    for name in ("label", "name"):
        if table.column_names.count(name) != 1:
            found = ", ".join(table.column_names)
            raise DataError("label names need one column 'label' and one 'name'", where=where, found=found or "no column")
        values, is_wrong = as_strings(table[name], integers=True)
        if pc.any(is_wrong).as_py():
            what = f"column {name!r} of the label names has a wrong type"
            raise DataError(what, where=where, found=table[name].type, expected="strings or integers")
        texts, is_utf8 = keep_utf8(values)
        if pc.all(is_utf8).as_py() not in (True, None):
            row = pc.index(is_utf8, False).as_py()
            raise DataError("label names are not UTF-8", where=where, found=f"column {name!r}, row {row}")
        columns.append(trimmed(texts))
    pairs = pa.table(columns, ["label", "name"])
    named = pairs.filter(pc.and_(columns[0].is_valid(), columns[1].is_valid()))
    named = named.group_by(["label", "name"], use_threads=False).aggregate([])
    labels, counts = pc.value_counts(named["label"]).flatten()
    if len(labels) < len(named):
        label = labels.filter(pc.greater(counts, 1))[0]
        found = " and ".join(map(repr, named.filter(pc.equal(named["label"], label))["name"].to_pylist()[:2]))
        raise DataError(f"label {label.as_py()!r} has several names", where=where, found=found, way_out="keep one name a label")
    labels = columns[0].drop_null().unique()
    rows = pc.index_in(labels, value_set=named["label"].combine_chunks())
    return pa.table({"label": labels, "name": named["name"].combine_chunks().take(rows)})


def _summed(tables: list[pa.Table]) -> pa.Table:
    """The tables' ``label`` and ``count``, each label once."""
    return pa.concat_tables(tables).group_by("label").aggregate([("count", "sum")]).rename_columns(["label", "count"])


def lists_from_rows(rows: IntArray, values: pa.Array, n_rows: int) -> pa.ListArray:
    """Lists from (row, value) pairs whose ``rows`` rise; a row without pairs is an empty list."""
    offsets = np.searchsorted(rows, np.arange(n_rows + 1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def unique_in_rows(lists: pa.ListArray) -> pa.ListArray:
    """Lists of distinct values, in order of first occurrence; nulls are left out, a null row becomes an empty list."""
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.combine_chunks()
    values, rows = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
    codes = values.dictionary_encode().indices
    valid = codes.is_valid().to_numpy(zero_copy_only=False)
    keys = rows * (len(values) + 1) + codes.fill_null(-1).to_numpy()
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    keep = first & valid
    return lists_from_rows(rows[keep], values.filter(pa.array(keep)), len(lists))


def tidy(lists: pa.ListArray) -> pa.ListArray:
    """Labels as they count: without surrounding white space, none null or blank, each once a row; a null row is empty."""
    rows, values = pc.list_parent_indices(lists).to_numpy(), pc.list_flatten(lists)
    return unique_in_rows(lists_from_rows(rows, trimmed(values), len(lists)))


def list_lengths(lists: pa.ListArray) -> IntArray:
    """int64[n]: the number of values in each row."""
    return np.asarray(pc.list_value_length(lists).fill_null(0), np.int64)
