"""Filters: which labels a document may get.

A filter allows labels by themselves, by how they begin, and by columns of a table of labels, and denies some again. One filter
holds for the whole run. A column of the documents may name a further one for each of them; then both have to allow a label.

Letters: D documents, E exceptions, F filters, L labels.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.documents import FilterColumn
from xmc_ray.data.labels import IntArray
from xmc_ray.data.strings import as_strings, is_list, keep_utf8, plain, trimmed
from xmc_ray.data.tables import read_table
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import Settings

Mask = npt.NDArray[np.bool_]

_SHOWN = 5  # of what is not known
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class FilterConfig(Settings):
    """A label is allowed if one of the `allow` settings has it, or none is given, and no `deny` setting has it."""

    allow: list[str] | None = None
    """Labels."""
    allow_prefixes: list[str] | None = None
    """Beginnings of labels."""
    allow_where: dict[str, list[str]] | None = None
    """Columns of the label table, and values: labels that have one of the values in each of the columns."""
    deny: list[str] = field(default_factory=list)
    """Labels."""
    deny_prefixes: list[str] = field(default_factory=list)
    """Beginnings of labels."""
    deny_where: dict[str, list[str]] = field(default_factory=dict)
    """Columns of the label table, and values, as in `allow_where`."""


@dataclass(frozen=True, kw_only=True)
class FiltersConfig(FilterConfig):
    """The labels that documents may get: `allow` and `deny` settings for all of them, and a filter that each names."""

    column: str | None = None
    """Column of the documents, strings or integers, that names each one's filter; an unknown name is a reject."""
    named: dict[str, FilterConfig] = field(default_factory=dict)
    """Filters by their names."""
    by: str | None = None
    """Column of the label table: each of its values, such as a tenant, is the name of a filter that allows its labels."""
    default: str | None = None
    """Name of the filter of documents that name none, which are rejects otherwise."""
    table: storage.Source | None = None
    """Table (Parquet, CSV, TSV or JSON lines) with `label` and further columns of strings, integers or lists of them, in which
    a label may have several rows."""
    leave_out: bool = False
    """Leave labels, beginnings and values out that no label of the bundle has, those of `by` included, instead of failing."""

    @property
    def is_set(self) -> bool:
        """Whether there is any filter."""
        return self != FiltersConfig()

    @property
    def columns(self) -> set[str]:
        """The columns of the label table that filters go by."""
        parts = [self, *self.named.values()]
        where = {name for part in parts for name in (*(part.allow_where or {}), *part.deny_where)}
        return where if self.by is None else where | {self.by}

    def check(self) -> None:
        """Raises ConfigError for settings that lack another one."""
        parts = [self, *self.named.values()]
        needs_table = self.by is not None or any(part.allow_where is not None or part.deny_where for part in parts)
        if needs_table and self.table is None:
            raise ConfigError("filters by columns of labels need a table", way_out="set filters.table")
        if self.table is not None and not needs_table:
            raise ConfigError("no filter reads filters.table", way_out="set filters.by, allow_where or deny_where")
        if self.column is None and (self.named or self.by is not None or self.default is not None):
            raise ConfigError("filters with names need a column of the documents", way_out="set filters.column")
        if self.column is not None and not self.named and self.by is None:
            raise ConfigError("filters.column needs filters with names", way_out="set filters.named or filters.by")


@dataclass(frozen=True, eq=False)
class LabelFilters:
    """Filters over the labels of an index, sorted by name; those that allow few labels, or all but a few, take little memory.

    ``names``: string[F]. The exceptions of filter f are the label ids ``id_E`` (int32) from ``start_F1[f]`` to
    ``start_F1[f + 1]``: if ``denies_F[f]``, it allows all labels but these, else these alone. ``column`` is that of the
    documents, None if all have the only filter; ``default`` is the name for those that name none. ``of`` is the fingerprint of
    the bundles whose labels these are, where somebody else may have others.
    """

    names: pa.StringArray
    denies_F: Mask
    start_F1: IntArray
    id_E: npt.NDArray[np.int32]
    n_labels: int
    column: str | None = None
    default: str | None = None
    of: str | None = None

    @classmethod
    def over(
        cls, allowed: Mapping[str, IntArray], n_labels: int, column: str | None = None, default: str | None = None
    ) -> "LabelFilters":
        """From the distinct ids of the labels that each filter allows. ConfigError for one that allows none."""
        names = sorted(allowed)
        if empty := [name for name in names if not len(allowed[name])]:
            found = f"filters {_shown(empty)}" if column is not None else None
            raise ConfigError("a filter leaves no label at all", found=found, expected="a label of the bundle in each filter")
        denies_F = np.array([2 * len(allowed[name]) > n_labels for name in names], bool)
        exceptions = [
            np.flatnonzero(~_mask(n_labels, allowed[name])) if denies else np.sort(allowed[name])
            for name, denies in zip(names, denies_F, strict=True)
        ]
        start_F1 = np.cumsum([0, *map(len, exceptions)])
        id_E = np.concatenate(exceptions).astype(np.int32)
        return cls(pa.array(names, pa.string()), denies_F, start_F1, id_E, n_labels, column, default)

    def __len__(self) -> int:
        return len(self.names)

    def exceptions(self, number: int) -> npt.NDArray[np.int32]:
        """The ids of a filter's exceptions, rising."""
        return self.id_E[self.start_F1[number] : self.start_F1[number + 1]]

    def allowed(self, number: int) -> Mask:
        """bool[L]: the labels that a filter allows."""
        allowed: Mask = _mask(self.n_labels, self.exceptions(number)) ^ self.denies_F[number]
        return allowed

    def of_documents(self, names: pa.Array | pa.ChunkedArray | None, n_documents: int) -> "DocumentFilters":
        """The filters of documents by their column, None if there is none. DataError for a name that no filter has."""
        if names is None:
            return DocumentFilters(self, np.zeros(n_documents, np.int64))
        names = names if self.default is None else names.fill_null(self.default)
        number_D = pc.index_in(names, value_set=self.names)
        if number_D.null_count:
            raise DataError("documents without a known filter", found=f"{number_D.null_count:,} of {n_documents:,}")
        return DocumentFilters(self, np.asarray(number_D, np.int64))

    @property
    def documents_column(self) -> FilterColumn | None:
        """What readers of documents have to know."""
        if self.column is None:
            return None
        return FilterColumn(self.column, tuple(self.names.to_pylist()), self.default is not None)

    @cached_property
    def digest(self) -> str:
        """32 hex digits that change with the names, the labels that are allowed, the column and the default."""
        digest = hashlib.sha256(repr((self.names.to_pylist(), self.n_labels, self.column, self.default)).encode())
        for part in (self.denies_F, self.start_F1, self.id_E):
            digest.update(part.tobytes())
        return digest.hexdigest()[:32]


class DocumentFilters(NamedTuple):
    """The filters of documents: ``number_D`` (int64) says which of ``filters`` each has."""

    filters: LabelFilters
    number_D: IntArray

    def admit(self, row_P: IntArray, label_P: IntArray) -> Mask:
        """bool[P]: whether each document may get each label; labels that the index does not have it may."""
        filters, number_P = self.filters, self.number_D[row_P]
        filter_E = np.repeat(np.arange(len(filters)), np.diff(filters.start_F1))
        key_E, key_P = filter_E * filters.n_labels + filters.id_E, number_P * filters.n_labels + label_P
        place_P = np.searchsorted(key_E, key_P)  # keys rise: filters come one after the other, and so do a filter's labels
        is_exception_P = np.append(key_E, -1)[place_P] == key_P
        may_P: Mask = (is_exception_P ^ filters.denies_F[number_P]) | (label_P >= filters.n_labels)
        return may_P


def resolve(config: FiltersConfig, labels: pa.StringArray) -> LabelFilters:
    """The filters of a config over the labels of an index (string[L]); reads the table of labels, if there is one.

    Raises ConfigError for what no label has, unless it is to be left out, for a filter that allows no label, for a name that
    two filters have, and for a default that none has; DataError for a table that lacks a column or has one of a wrong type.
    """
    table = None if config.table is None else _LabelTable(config.table, labels, config.columns)
    choices = _Choices(labels, table, config.leave_out)
    every_L = choices.allowed(config, "filters")
    if config.column is None:
        return LabelFilters.over({"": np.flatnonzero(every_L)}, len(labels))
    allowed: dict[str, IntArray] = {}
    for given, part in config.named.items():
        if (name := given.strip()) in allowed:  # as the names in documents are trimmed
            raise ConfigError("two filters have one name", found=name, way_out=f"rename filters.named.{name}")
        allowed[name] = np.flatnonzero(every_L & choices.allowed(part, f"filters.named.{name}"))
    if table is not None and config.by is not None:
        for name, ids in table.groups(config.by).items():
            if name in allowed:
                raise ConfigError("two filters have one name", found=name, way_out=f"rename filters.named.{name}")
            if len(ids) or not config.leave_out:
                allowed[name] = ids[every_L[ids]]
    default = None if config.default is None else config.default.strip()
    if default is not None and default not in allowed:
        raise ConfigError("filters.default is no filter", found=default, expected=f"one of {_shown(sorted(allowed))}")
    if not allowed:
        raise ConfigError("no filter has a label of the bundle", where=config.table, found=f"column {config.by!r}")
    return LabelFilters.over(allowed, len(labels), config.column, default)


class _LabelTable:
    """Further columns of labels; N rows, in which a label may come several times."""

    def __init__(self, uri: str, labels: pa.StringArray, columns: Collection[str]) -> None:
        self.uri, self._table = uri, read_table(uri, {"label", *columns})
        if "label" in self._table.column_names and is_list(self._table["label"].type):
            found, expected = self._table["label"].type, "strings or integers, one a row"
            raise DataError("column 'label' of the label table has a wrong type", where=uri, found=found, expected=expected)
        row_N, texts = self._values("label")
        self._id_R = np.full(len(self._table), -1)  # of all rows; -1 for labels that the index lacks
        self._id_R[row_N] = pc.index_in(texts, value_set=labels).fill_null(-1)
        self._groups: dict[str, dict[str, IntArray]] = {}

    def groups(self, column: str) -> dict[str, IntArray]:
        """The distinct ids of the labels that have each value of a column; none for one that only unknown labels have."""
        if column not in self._groups:
            row_N, values = self._values(column)
            id_N, codes = self._id_R[row_N], values.dictionary_encode()
            value_N, id_N = codes.indices.to_numpy()[id_N >= 0].astype(np.int64), id_N[id_N >= 0]
            value_N, id_N = np.divmod(np.unique(value_N << 32 | id_N), 1 << 32)
            ends = np.searchsorted(value_N, np.arange(1, len(codes.dictionary)))
            self._groups[column] = dict(zip(codes.dictionary.to_pylist(), np.split(id_N, ends), strict=False))
        return self._groups[column]

    def _values(self, column: str) -> tuple[IntArray, pa.StringArray]:
        """Rows and trimmed values of a column, without null and blank ones; a list has as many of both as it has values."""
        if self._table.column_names.count(column) != 1:
            found = ", ".join(self._table.column_names)
            raise DataError(f"the label table needs one column {column!r}", where=self.uri, found=found or "no column")
        values = plain(self._table[column])
        row_N = np.arange(len(values))
        if is_list(values.type):
            row_N, values = pc.list_parent_indices(values).to_numpy(), pc.list_flatten(values)
        texts, is_wrong = as_strings(values, integers=True)
        if pc.any(is_wrong).as_py():
            what, expected = f"column {column!r} of the label table has a wrong type", "strings, integers or lists of them"
            raise DataError(what, where=self.uri, found=values.type, expected=expected)
        texts = trimmed(keep_utf8(texts)[0])
        return row_N[texts.is_valid().to_numpy(zero_copy_only=False)], texts.drop_null()


@dataclass(frozen=True)
class _Choices:
    """Turns settings into masks of labels."""

    labels: pa.StringArray
    table: _LabelTable | None
    is_lenient: bool

    def allowed(self, config: FilterConfig, name: str) -> Mask:
        """bool[L]: what a filter allows; ``name`` is that of its settings."""
        given = config.allow is not None or config.allow_prefixes is not None or config.allow_where is not None
        allow, deny = (
            self._listed(f"{name}.{kind}", labels or [])
            | self._beginning(f"{name}.{kind}_prefixes", prefixes or [])
            | self._where(f"{name}.{kind}_where", where or {})
            for kind, labels, prefixes, where in (
                ("allow", config.allow, config.allow_prefixes, config.allow_where),
                ("deny", config.deny, config.deny_prefixes, config.deny_where),
            )
        )
        return (allow | (not given)) & ~deny

    def _listed(self, setting: str, labels: list[str]) -> Mask:
        if not labels:  # else a table of all labels is made to find none of them
            return self._none()
        ids = pc.index_in(trimmed(pa.array(labels, pa.string())), value_set=self.labels)
        self._check(setting, "labels", labels, np.asarray(ids.is_valid()))
        return _mask(len(self.labels), ids.drop_null().to_numpy())

    def _beginning(self, setting: str, prefixes: list[str]) -> Mask:
        masks = [np.asarray(pc.starts_with(self.labels, prefix)) for prefix in prefixes]
        self._check(setting, "beginnings", prefixes, np.array([mask.any() for mask in masks], bool))
        return np.asarray(np.any([self._none(), *masks], axis=0))

    def _where(self, setting: str, where: Mapping[str, list[str]]) -> Mask:
        """Labels that have one of the values in each of the columns; none without a column."""
        masks = []
        for column, wanted in where.items():
            assert self.table is not None
            groups = self.table.groups(column)
            ids = [groups.get(value.strip(), _NONE) for value in wanted]
            self._check(f"{setting}.{column}", "values", wanted, np.array([len(part) > 0 for part in ids], bool))
            masks.append(_mask(len(self.labels), np.concatenate([_NONE, *ids])))
        return np.asarray(np.all(masks, axis=0)) if masks else self._none()

    def _none(self) -> Mask:
        return _mask(len(self.labels), _NONE)

    def _check(self, setting: str, kind: str, wanted: list[str], is_known: Mask) -> None:
        if not is_known.all() and not self.is_lenient:
            unknown = [value for value, known in zip(wanted, is_known.tolist(), strict=True) if not known]
            found = f"{len(unknown):,} of {len(wanted):,}, such as {_shown(unknown)}"
            way_out = "correct them, or set filters.leave_out"
            raise ConfigError(f"{setting} has {kind} that no label of the bundle has", found=found, way_out=way_out)


def _mask(size: int, ids: npt.NDArray[np.integer[Any]]) -> Mask:
    mask = np.zeros(size, bool)
    mask[ids] = True
    return mask


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + rest
