"""Hierarchies of labels: which labels are broader than which, from a table or from SKOS (`skos`).

A label may have several parents, so a hierarchy is a directed graph without cycles.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.labels import IntArray, label_names, tidy
from xmc_ray.data.skos import FORMATS, Key, read_skos
from xmc_ray.data.strings import as_strings, is_list, is_text, keep_utf8, list_values, plain, trimmed
from xmc_ray.data.tables import read_table
from xmc_ray.errors import DataError

_MOST_LEVELS, _MOST_PAIRS = 1000, 1 << 26  # of a hierarchy, and of all (label, ancestor) of a bundle: half a GiB
_SHOWN = 6  # labels of a cycle
_READ = ("label", "parent", "name")


class Lists(NamedTuple):
    """A list of ids for each id, one after the other: ``starts`` int64[N + 1], ``values`` int64."""

    starts: IntArray
    values: IntArray

    @classmethod
    def of(cls, owners: IntArray, values: IntArray, size: int) -> "Lists":
        """From pairs in any order."""
        order = np.argsort(owners, kind="stable")
        return cls(np.searchsorted(owners[order], np.arange(size + 1)), values[order])

    def take(self, ids: IntArray) -> tuple[IntArray, IntArray]:
        """The values of ``ids``, and the place in ``ids`` that each belongs to."""
        sizes = self.starts[ids + 1] - self.starts[ids]
        owners = np.repeat(np.arange(len(ids)), sizes)
        return owners, self.values[np.arange(len(owners)) + np.repeat(self.starts[ids] - sizes.cumsum() + sizes, sizes)]


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """All labels of a table, sorted; ``level`` is the length of the longest way up, so that a label's is above its parents'."""

    labels: pa.StringArray
    names: pa.StringArray
    parents: Lists
    level: IntArray
    orphans: pa.StringArray
    """Parents without a row of their own."""

    @classmethod
    def from_table(cls, table: pa.Table, where: str | None = None) -> "Hierarchy":
        """From ``label``, ``parent`` (string or list, integers as decimal text, null for none) and, optionally, ``name``.

        DataError for another table, an empty one, a cycle, more than 1,000 levels, and a label with several names.
        """
        label, parents = _columns(table, where)
        if not len(label):
            raise DataError(
                "the hierarchy is empty", where=where, expected="columns label and parent, and a row for each label"
            )
        known = label.unique()
        labels = pa.concat_arrays([known, parents.flatten()]).unique()
        labels = labels.take(pc.sort_indices(labels))
        child = pc.index_in(label, value_set=labels).to_numpy().astype(np.int64)
        parent = pc.index_in(parents.flatten(), value_set=labels).to_numpy().astype(np.int64)
        child, parent = np.unique(np.stack([child[pc.list_parent_indices(parents).to_numpy()], parent]), axis=1)
        names = pa.nulls(len(labels), pa.string())
        if "name" in table.column_names:
            named = label_names(table.select(["label", "name"]), where)
            names = named["name"].combine_chunks().take(pc.index_in(labels, value_set=named["label"].combine_chunks()))
        level = _levels(child, parent, labels, where)
        orphans = labels.filter(pc.invert(pc.is_in(labels, value_set=known)))
        return cls(labels, names, Lists.of(child, parent, len(labels)), level, orphans)

    @classmethod
    def read(cls, uri: storage.Uri, key: Key = "iri", language: str = "en") -> "Hierarchy":
        """From RDF, as `read_skos`, if the name ends like that, else a table; DataError as `read_table` and `from_table`."""
        uri = str(uri)
        return cls.from_table(read_skos(uri, key, language) if uri.endswith(tuple(FORMATS)) else read_table(uri, _READ), uri)

    @property
    def digest(self) -> str:
        """16 hex digits of labels, names and parents: the same for the same hierarchy, wherever it is read from."""
        digest = hashlib.sha256(np.concatenate(self.parents).astype("<i8").tobytes())
        for text in (*self.labels.to_pylist(), *self.names.to_pylist()):
            digest.update(b"\1" if text is None else text.encode() + b"\0")
        return digest.hexdigest()[:16]

    def ancestors(self, nodes: IntArray) -> Lists:
        """The labels above each of ``nodes``, found one step after the other. DataError if they are too many to keep."""
        owner, above = self.parents.take(nodes)
        size, found = len(self.labels), [np.unique(owner * len(self.labels) + above)]
        while len(found[-1]):
            owner, node = np.divmod(found[-1], size)
            through, above = self.parents.take(node)
            found.append(np.unique(owner[through] * size + above))
            if sum(map(len, found)) > _MOST_PAIRS:
                raise DataError("the labels have too many ancestors", expected=f"at most {_MOST_PAIRS:,} in all")
        owner, above = np.divmod(np.unique(np.concatenate(found)), size)
        return Lists.of(owner, above, len(nodes))


def _columns(table: pa.Table, where: str | None) -> tuple[pa.StringArray, pa.ListArray]:
    """string[n] and list<string>[n] of ``label`` and ``parent``."""
    for name in ("label", "parent"):
        if table.column_names.count(name) != 1:
            found = ", ".join(table.column_names) or "no column"
            raise DataError("a hierarchy needs one column 'label' and one 'parent'", where=where, found=found)
    label, parent = plain(table["label"]), plain(table["parent"])
    of_lists = is_list(parent.type)
    parent_type = list_values(parent.type) if of_lists else parent.type
    for name, kind in (("label", label.type), ("parent", parent_type)):
        if not is_text(kind, integers=True):
            what = f"column {name!r} of the hierarchy has a wrong type"
            raise DataError(what, where=where, found=table[name].type, expected="strings or integers")
    if of_lists:
        lists = parent.cast(pa.list_(parent_type))
    else:
        present = parent.is_valid().to_numpy(zero_copy_only=False)
        lists = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], present.cumsum()]), pa.int32()), parent.drop_null())
    texts, is_utf8 = zip(*(keep_utf8(as_strings(values, integers=True)[0]) for values in (label, lists.flatten())), strict=True)
    label = trimmed(texts[0])
    if label.null_count or not all(pc.all(good).as_py() in (True, None) for good in is_utf8):
        found = f"row {pc.index(label.is_null(), True).as_py()}" if label.null_count else "a parent"
        raise DataError("a label of the hierarchy is null, blank or not UTF-8", where=where, found=found)
    offsets = np.concatenate([[0], pc.list_value_length(lists).fill_null(0).to_numpy().cumsum()])
    return label, tidy(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts[1]))


def _levels(child: IntArray, parent: IntArray, labels: pa.StringArray, where: str | None) -> IntArray:
    """int64[n]: of each label the length of the longest way up, from the top downwards. DataError for a cycle."""
    level, left = np.zeros(len(labels), np.int64), np.bincount(child, minlength=len(labels))
    children = Lists.of(parent, child, len(labels))
    ready = np.flatnonzero(left == 0)
    for depth in range(_MOST_LEVELS):
        if not len(ready):
            break
        level[ready] = depth
        below, counts = np.unique(children.take(ready)[1], return_counts=True)
        left[below] -= counts
        ready = below[left[below] == 0]
    if len(ready):
        raise DataError("the hierarchy is too deep", where=where, expected=f"at most {_MOST_LEVELS:,} levels")
    if left.any():
        inside = left[child] * left[parent] > 0
        cycle = _cycle(dict(zip(child[inside].tolist(), parent[inside].tolist(), strict=True)))
        shown = " below ".join(repr(labels[label].as_py()) for label in cycle[:_SHOWN])
        found = shown + f" and so on, {len(cycle) - 1:,} labels" * (len(cycle) > _SHOWN)
        raise DataError("the hierarchy has a cycle", where=where, found=found, way_out="remove one of these parents")
    return level


def _cycle(parent: dict[int, int]) -> Sequence[int]:
    """A cycle, its first label once more at its end, where every way up goes on for ever."""
    label, seen = next(iter(parent)), dict[int, None]()
    while label not in seen:
        seen[label] = None
        label = parent[label]
    walked = list(seen)
    return [*walked[walked.index(label) :], label]
