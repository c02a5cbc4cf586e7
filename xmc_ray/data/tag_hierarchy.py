"""What a hierarchy of labels does to tags: it adds broader labels, drops them or puts them last, and limits branches.

Letters: T tags, N labels of the bundle and, after them, those above them that it does not have.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.hierarchy import Hierarchy, Lists
from xmc_ray.data.labels import IntArray
from xmc_ray.data.skos import Key
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.settings import MAY_CHANGE_ON_RESUME, NonNegativeInt, PositiveInt, Settings

Scores = npt.NDArray[np.float32]


class Tags(NamedTuple):
    """Row, label id and score of each tag; rows rise."""

    row_T: IntArray
    label_T: IntArray
    score_T: Scores


@dataclass(frozen=True, kw_only=True)
class HierarchyConfig(Settings):
    """Broader and narrower labels, and what they do to tags: the `k` best of the model are taken first."""

    table: storage.Source = field(metadata=MAY_CHANGE_ON_RESUME)  # its digest may not
    """Table (Parquet, CSV, TSV or JSON lines) with `label`, `parent` (a string or, but in CSV, a list; null at the top) and
    perhaps `name`; or SKOS: .ttl, .nt, .rdf."""
    key: Key = "iri"
    """What of a SKOS concept is the label: its iri, its notation, or its name (prefLabel)."""
    language: str = "en"
    """Language of the names in SKOS; names without a language stand in."""
    close: bool = False
    """Add all labels above a tag, with the highest score of those below them that are tagged."""
    specific: Literal["off", "first", "only"] = "off"
    """first: a tag comes before the broader ones, so scores need not fall; only: drop tags that are above another."""
    per_branch: PositiveInt | None = None
    """Maximum number of tags of a document in a branch; tags above others are not counted, and stay with those below them."""
    branch_level: NonNegativeInt = 0
    """A branch is what lies below a label of this level; 0 are the labels without a parent."""

    def read(self) -> Hierarchy:
        """The hierarchy in ``table``; raises what `Hierarchy.read` raises."""
        return Hierarchy.read(self.table, self.key, self.language)

    def check(self) -> None:
        """Raises ConfigError for settings that contradict each other, or change nothing."""
        if self.close and self.specific == "only":
            raise ConfigError("hierarchy.close adds what hierarchy.specific = only drops", way_out="give one of them")
        if not self.close and self.specific == "off" and self.per_branch is None:
            way_out = "set hierarchy.close, hierarchy.specific or hierarchy.per_branch"
            raise ConfigError("a hierarchy that changes no tag", way_out=way_out)


class TagHierarchy:
    """A hierarchy over the labels of a bundle, ready for its tags.

    ``labels``: a table of ``label``, ``name`` and ``count``, a row for each of N ids: the bundle's, then those above them that
    it does not have, of count 0. ``is_narrowest``: bool[N], labels with none of the bundle's below them. ``notes``: what is
    odd about the two.
    """

    def __init__(self, hierarchy: Hierarchy, labels: pa.Table, config: HierarchyConfig) -> None:
        """``labels``: ``label``, ``name`` and ``count`` of the bundle. DataError if the hierarchy has none of them."""
        self.config, own = config, labels["label"].combine_chunks()
        place = pc.index_in(own, value_set=hierarchy.labels)
        if place.null_count == len(own):
            found = f"such as {hierarchy.labels[0].as_py()!r}, while the bundle has {own[0].as_py()!r}"
            what, way_out = "the hierarchy has none of the bundle's labels", "of SKOS, hierarchy.key says what the labels are"
            raise DataError(what, where=config.table, found=found, way_out=way_out)
        self.notes = _notes(hierarchy, own.filter(place.is_null()), len(own))
        known = place.is_valid().to_numpy(zero_copy_only=False)
        nodes = place.drop_null().to_numpy().astype(np.int64)
        ancestors = hierarchy.ancestors(nodes)
        id_of = np.full(len(hierarchy.labels), -1)
        id_of[nodes] = np.flatnonzero(known)
        further = np.unique(ancestors.values[id_of[ancestors.values] < 0])
        id_of[further] = np.arange(len(own), len(own) + len(further))
        size = len(own) + len(further)
        child, parent = np.repeat(id_of[nodes], np.diff(ancestors.starts)), id_of[ancestors.values]
        self.ancestors = Lists.of(child, parent, size)
        self.level = np.zeros(size, np.int64)
        self.level[id_of[id_of >= 0]] = hierarchy.level[id_of >= 0]
        is_branch = self.level[parent] == config.branch_level
        self.branches = Lists.of(child[is_branch], parent[is_branch], size)
        self.is_narrowest = np.bincount(parent, minlength=size) == 0
        self.labels = _extended(labels, hierarchy, place, further)

    @property
    def most_ancestors(self) -> int:
        """The most that a label has."""
        return int(np.diff(self.ancestors.starts).max(initial=0))

    def __call__(self, row_T: IntArray, label_T: IntArray, score_T: Scores) -> Tags:
        """What the settings make of the tags of documents, each document's from the best to the worst.

        A closed label has the largest of its own score and those of the tags below it: the least change after which no label
        is less likely than what implies it (the true path rule; "Max" in Obozinski et al. 2008, Genome Biology 9:S6).
        """
        if self.config.specific == "only" or self.config.per_branch is not None:
            keep_T = self._kept(row_T, label_T)
            row_T, label_T, score_T = row_T[keep_T], label_T[keep_T], score_T[keep_T]
        if not len(label_T):
            return Tags(row_T, label_T, score_T)
        tag, above = self.ancestors.take(label_T)
        source = np.concatenate([np.arange(len(label_T)), tag])
        key = 2 * self._keys(row_T[source], np.concatenate([label_T, above]))
        key[len(label_T) :] += 1  # so that a document's own tag comes before what others add to it
        order = np.argsort(key)
        key, source = key[order], source[order]
        starts = np.flatnonzero(np.diff(key >> 1, prepend=-1))
        if not self.config.close:
            last = np.maximum.reduceat(source, starts)[key[starts] % 2 == 0]
            starts = starts[key[starts] % 2 == 0]
            best = source[starts]
        else:  # the first of a document's tags is the best
            best, last = np.minimum.reduceat(source, starts), np.maximum.reduceat(source, starts)
        label = (key[starts] >> 1) % len(self.level)
        order = self._order(row_T, score_T, best, last, self.level[label])
        best = best[order]
        return Tags(row_T[best], label[order], score_T[best])

    def _order(self, row_T: IntArray, score_T: Scores, best: IntArray, last: IntArray, level: IntArray) -> IntArray:
        """By document, by score or not, by the ``last`` tag at or below a label, and the lowest first.

        ``best``: the tag that gives each label its score.
        """
        is_new_T = np.diff(row_T, prepend=-1) != 0
        place_T = np.arange(len(row_T)) - np.flatnonzero(is_new_T)[is_new_T.cumsum() - 1]
        if self.config.specific != "first":
            is_new_T |= np.diff(score_T, prepend=-1) != 0
        major = is_new_T.cumsum()[best] * (place_T.max() + 1) + place_T[last]
        return np.argsort((major + 1) * (self.level.max() + 1) - level, kind="stable")

    def _kept(self, row_T: IntArray, label_T: IntArray) -> npt.NDArray[np.bool_]:
        """bool[T]: without tags above others, and at most `per_branch` of a branch, as the settings say.

        A tag of several branches has to be among the best in each of them.
        """
        key_T = self._keys(row_T, label_T)
        keep_T: npt.NDArray[np.bool_] = ~np.isin(key_T, self._above(row_T, label_T))
        if self.config.per_branch is not None:
            narrow = np.flatnonzero(keep_T)
            tag, branch = self.branches.take(label_T[narrow])
            rank = _ranks(self._keys(row_T[narrow[tag]], branch))
            keep_T[narrow[tag[rank >= self.config.per_branch]]] = False
        if self.config.specific != "only":
            keep_T |= np.isin(key_T, self._above(row_T[keep_T], label_T[keep_T]))
        return keep_T

    def _above(self, row_T: IntArray, label_T: IntArray) -> IntArray:
        """The keys of all labels above the tags."""
        tag, above = self.ancestors.take(label_T)
        return self._keys(row_T[tag], above)

    def _keys(self, row: IntArray, label: IntArray) -> IntArray:
        return row * len(self.level) + label


def _notes(hierarchy: Hierarchy, lacking: pa.StringArray, n_labels: int) -> list[str]:
    notes = []
    if len(hierarchy.orphans):
        of = f"{len(hierarchy.orphans):,} parents have no row of their own, such as {hierarchy.orphans[0].as_py()!r}"
        notes.append(f"{of}: they are taken for labels without a parent")
    if len(lacking):
        of = f"{len(lacking):,} of the bundle's {n_labels:,} labels are not in it, such as {lacking[0].as_py()!r}"
        notes.append(f"{of}: they have neither broader nor narrower ones")
    return notes


def _extended(labels: pa.Table, hierarchy: Hierarchy, place: pa.Int32Array, further: IntArray) -> pa.Table:
    """The bundle's labels, with names of the hierarchy where they have none, and ``further`` ones of it."""
    own, more = labels["label"].combine_chunks(), pa.array(further)
    names = pc.coalesce(labels["name"].combine_chunks(), hierarchy.names.take(place))
    columns = {
        "label": pa.concat_arrays([own, hierarchy.labels.take(more)]),
        "name": pa.concat_arrays([names, hierarchy.names.take(more)]),
        "count": np.concatenate([labels["count"].to_numpy(), np.zeros(len(further), np.int64)]),
    }
    return pa.table(columns)


def _ranks(keys: IntArray) -> IntArray:
    """int64[n]: how many earlier ones have the same key."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return ranks
