"""The steps of a piece: it is read and tokenised, tagged, and written, each step by another process.

A piece leaves one file, ``<work>/pieces/t000017.parquet``, which appears atomically and is the proof that the piece is done. It
has its tags, their label ids in a column that is not published, and a few counts as metadata. Its rejects are written before
it. Names and contents of both follow from the plan alone: a task that does a piece again, after a crash or beside a straggler,
replaces them with the same.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.documents import Rules, text_digest
from xmc_ray.data.fields import readable
from xmc_ray.data.filters import LabelFilters
from xmc_ray.data.labels import IntArray, list_lengths, lists_from_rows
from xmc_ray.data.reader import Segment, check_unchanged, is_unchanged, read_all
from xmc_ray.data.tag_hierarchy import TagHierarchy
from xmc_ray.errors import DataError, ModelError
from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.on_ray.predicted import made_by_of, matrix
from xmc_ray.on_ray.stream import tokenise_table
from xmc_ray.on_ray.tag.plan import merged, piece_name, unpacked
from xmc_ray.storage.files import write_parquet
from xmc_ray.storage.listing import FileInfo

Summary = dict[str, Any]
"""Of a piece: `OUTCOMES` in rows; ``reasons`` {reason of a reject: rows}; ``labels`` [ids, rows, sums of scores]; ``scores``,
counts in 20 equal bins of [0, 1]; ``samples``, some of its documents with their tags; ``made_by``, what computed it; where
documents name filters, ``filters`` {name: [documents, those without a tag]}."""

OUTCOMES = ("tagged", "reused", "rejected", "truncated", "untagged")
REJECTS = pa.schema([("file", pa.string()), ("row", pa.int64()), *((name, pa.string()) for name in ("id", "reason", "detail"))])

IDS = "label_ids"  # the column of a piece's file that is not published
_SUMMARY = b"xmc_ray"  # key of a piece's metadata: its summary, without the labels, which follow from its tags
_SAMPLES, _EXCERPT = 2, 240  # documents of a piece, and characters of each, that the report may show
_READERS = 16  # threads that read summaries
_STRINGS = pa.list_(pa.string())
_NO_TEXT = pa.scalar(None, pa.string())


@dataclass(frozen=True)
class PieceReader:
    """Reads and tokenises pieces: rows of `plan.PIECES` in, number and table of each out.

    Tables have ``id``, ``file``, ``row``, ``reason``, ``detail``, ``text_digest``, ``excerpt``, ``truncated`` and the tokens.
    """

    rules: Rules
    tokenizers: Sequence[Tokenizer]
    keeps_text: bool = False  # in a column ``text``, for a hook

    def __call__(self, pieces: list[dict[str, Any]]) -> Iterator[tuple[int, pa.Table]]:
        """Neighbouring pieces are read in one go; unless kept, texts are dropped as soon as their chunk is tokenised.

        Raises DataError for a file that changes meanwhile, before a piece with rows of it is handed on.
        """
        stream = _Stream(merged([segment for piece in pieces for segment in piece["segments"]]), self.rules)
        for piece in pieces:
            table = pa.concat_tables(map(self._tokenised, rows_to_tag(piece, stream)))
            stream.check_unchanged()
            yield piece["number"], table

    def _tokenised(self, table: pa.Table) -> pa.Table:
        texts = table["text"].combine_chunks()
        is_shown = pa.array(np.arange(len(table)) < _SAMPLES)
        excerpts = pc.if_else(is_shown, pc.utf8_slice_codeunits(readable(texts), 0, _EXCERPT), _NO_TEXT)
        table = table.append_column("text_digest", text_digest(texts)).append_column("excerpt", excerpts)
        tokenised = tokenise_table(table, self.tokenizers)
        return tokenised.append_column("text", readable(texts)) if self.keeps_text else tokenised


class _Stream:
    """The rows of segments, one after the other."""

    def __init__(self, segments: list[dict[str, Any]], rules: Rules) -> None:
        self._segments = [Segment.from_row(segment) for segment in segments]
        self._chunks = read_all(self._segments, rules)
        self._rest = rules.empty()
        self._number = -1  # of the segment of the last rows
        self._file: FileInfo | None = None  # the one of the last rows, if any of its rows were readable

    def _next(self) -> pa.Table:
        """A method and no generator: one that knows the stream would be a cycle, which any thread may collect and wait for."""
        number, chunk = next(self._chunks)
        if number != self._number:
            self._number, self._file = number, None
        if chunk.reject is None:
            self._file = self._segments[number].file
        return chunk.table

    def check_unchanged(self) -> None:
        """DataError if the file of the last rows has changed; those before it were compared at their ends."""
        if self._file is not None:
            check_unchanged(self._file)

    def take(self, rows: int) -> Iterator[pa.Table]:
        """The next ``rows`` rows."""
        while rows:
            table = self._rest if len(self._rest) else self._next()
            self._rest = table.slice(rows)
            table = table.slice(0, rows)
            rows -= len(table)
            yield table


def rows_to_tag(piece: Mapping[str, Any], stream: _Stream) -> Iterator[pa.Table]:
    """The rows of a piece, chunk by chunk, without those that are reused; rows that repeat an id are rejected."""
    rows = sum(segment["rows"] for segment in piece["segments"])
    skip = unpacked(piece["skip"], rows)
    repeats = piece["repeats"]
    place, first_row = np.array(repeats["place"], np.int64), pa.array(repeats["row"], pa.int64()).cast(pa.string())
    first_file = pa.array(repeats["files"], pa.string()).take(pa.array(repeats["file"], pa.int64()))
    firsts = pc.binary_join_element_wise("first at ", first_file, " row ", first_row, "")
    start = 0
    for table in stream.take(rows):
        here = slice(*np.searchsorted(place, [start, start + len(table)]))
        if here.start < here.stop:
            table = _without_repeats(table, place[here] - start, firsts[here])
        yield table.filter(pa.array(~skip[start : start + len(table)]))
        start += len(table)


def _without_repeats(table: pa.Table, rows: IntArray, firsts: pa.Array) -> pa.Table:
    """The table with those of ``rows`` that are good made rejects; ``firsts`` says of each where its id came first."""
    number = np.full(len(table), -1)
    number[rows] = np.arange(len(rows))
    details = firsts.take(pa.array(number, mask=number < 0))
    is_repeat = pc.and_(pc.is_null(table["reason"]), pc.is_valid(details))
    for name, values in (("reason", "duplicate id"), ("detail", details)):
        column = pc.if_else(is_repeat, values, table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def some_texts(pieces: pa.Table, rules: Rules, limit: int) -> list[str]:
    """Texts of the first rows that can be tagged."""
    tables = chain.from_iterable(rows_to_tag(piece, _Stream(piece["segments"], rules)) for piece in pieces.to_pylist())
    texts = chain.from_iterable(table.filter(pc.is_null(table["reason"]))["text"].to_pylist() for table in tables)
    return list(islice(texts, limit))


class TagColumns:
    """Turns predicted ids into the columns of a file of tags: labels, scores, names, model, filter if documents name one."""

    def __init__(
        self,
        labels: pa.Table,
        fingerprint: str,
        min_score: float,
        thresholds_L: npt.NDArray[np.float32] | None = None,
        filters: LabelFilters | None = None,
        hierarchy: TagHierarchy | None = None,
    ) -> None:
        """``labels``: those of the ``hierarchy``, if there is one; ``thresholds_L``: the least score of each label, beside the
        minimum for all; ``filters``: those of the documents.
        """
        self.labels = labels["label"].combine_chunks()
        self.names = labels["name"].combine_chunks() if labels["name"].null_count < len(labels) else None
        self.fingerprint = fingerprint
        self.min_score, self.thresholds_L, self.hierarchy = min_score, thresholds_L, hierarchy
        self.filters, self.has_filter = filters, filters is not None and filters.column is not None
        self.default = None if filters is None else filters.default

    @property
    def schema(self) -> pa.Schema:
        """The columns of a file of tags."""
        names = [("names", _STRINGS)] if self.names is not None else []
        lists = [("labels", _STRINGS), ("scores", pa.list_(pa.float32())), *names]
        filters = [("filter", pa.string())] if self.has_filter else []
        return pa.schema([("id", pa.string()), *lists, ("model", pa.string()), ("text_digest", pa.string()), *filters])

    def __call__(self, table: pa.Table) -> tuple[pa.Table, Summary]:
        """The tags and their summary. Beside the columns of ``schema`` there are the labels' `IDS`."""
        lists = self.lists(table)
        label_ids = lists.pop(IDS)
        model = pa.repeat(pa.scalar(self.fingerprint), len(table))
        columns = {"id": table["id"], **lists, "model": model, "text_digest": table["text_digest"]}
        columns |= {"filter": table["filter"]} if self.has_filter else {}
        tags = pa.table({name: columns[name] for name in self.schema.names}).cast(self.schema).append_column(IDS, label_ids)
        untagged = int((list_lengths(label_ids) == 0).sum())
        summary = summarise(label_ids.flatten().to_numpy(), lists["scores"].flatten().to_numpy(), untagged)
        return tags, summary | self.by_filter(tags)

    def lists(self, table: pa.Table) -> dict[str, pa.ListArray]:
        """Labels, scores and names of a predicted table, and the labels' `IDS`.

        There are no pads, nor scores below the minimum or the label's threshold. What is left is handed to the hierarchy, which
        adds no label of the bundle that the document's filter leaves out.
        """
        ids, scores = matrix(table, "ids"), matrix(table, "probabilities")
        kept = (ids >= 0) & (scores >= self.min_score)
        if self.thresholds_L is not None:
            kept &= scores >= self.thresholds_L[ids]
        rows, label_ids, tag_scores = np.nonzero(kept)[0], ids[kept], scores[kept]
        if self.hierarchy is not None:
            rows, label_ids, tag_scores = self.hierarchy(rows, label_ids, tag_scores)
            if self.filters is not None:
                documents = self.filters.of_documents(table["filter"] if self.has_filter else None, len(table))
                may = documents.admit(rows, label_ids)
                rows, label_ids, tag_scores = rows[may], label_ids[may], tag_scores[may]
        kept_ids = pa.array(label_ids)
        columns = {"labels": self.labels.take(kept_ids), "scores": pa.array(tag_scores), IDS: kept_ids.cast(pa.int32())}
        if self.names is not None:
            columns["names"] = self.names.take(kept_ids)
        return {name: lists_from_rows(rows, values, len(table)) for name, values in columns.items()}

    def by_filter(self, tags: pa.Table) -> Summary:
        """The part of a summary that counts documents by their filters; empty unless they name one."""
        if not self.has_filter:
            return {}
        names = tags["filter"] if self.default is None else tags["filter"].fill_null(self.default)
        is_untagged = pc.equal(pc.list_value_length(tags["labels"]), 0).cast(pa.int64())
        counts = pa.table({"name": names, "untagged": is_untagged}).group_by("name")
        counts = counts.aggregate([("untagged", "count"), ("untagged", "sum")]).sort_by("name").to_pylist()
        return {"filters": {row["name"]: [row["untagged_count"], row["untagged_sum"]] for row in counts}}


def summarise(label_ids: Any, scores: Any, untagged: int) -> Summary:
    """The part of a summary that depends on the tags, given label ids and scores of all tags of a piece."""
    histogram = np.histogram(scores, SCORE_BINS, (0, 1))[0]
    return {"labels": _label_sums(label_ids, scores), "scores": histogram.tolist(), "untagged": untagged}


def _label_sums(label_ids: Any, scores: Any) -> list[list[Any]]:
    labels, group, rows = np.unique(label_ids, return_inverse=True, return_counts=True)
    return [labels.tolist(), rows.tolist(), np.bincount(group, scores, len(labels)).round(4).tolist()]


@dataclass(frozen=True)
class PieceWriter:
    """Writes tagged pieces to ``work``; ``made_by`` is what all of the night's pieces have to be computed by."""

    work: str
    columns: TagColumns
    made_by: Mapping[str, str]

    def __call__(self, number: int, table: pa.Table) -> Summary:
        """Rejects first: the file of tags completes the piece. ModelError, and no file, if something else computed it."""
        name, made_by = piece_name("t", number), made_by_of(table)
        check_made_by(made_by, self.made_by, name)
        is_good = pc.is_null(table["reason"])
        good, bad = table.filter(is_good), table.filter(pc.invert(is_good))
        tags, summary = self.columns(good)
        summary |= {"tagged": len(good), "reused": 0, "rejected": len(bad), "reasons": Counter(bad["reason"].to_pylist())}
        summary |= {"truncated": pc.sum(good["truncated"]).as_py() or 0, "samples": _samples(good, tags), "made_by": made_by}
        rejects = _uri(self.work, "rejects", name)
        if len(bad):
            write_parquet(rejects, bad.select(REJECTS.names).cast(REJECTS))
        else:  # an attempt that was killed may have written some: the file was away for a while, say
            storage.patiently(storage.remove, rejects)
        _finish(self.work, name, tags, summary)
        return summary


def check_made_by(found: Mapping[str, str], expected: Mapping[str, str], name: str) -> None:
    """ModelError unless a piece was computed by what the night was begun with."""
    if found != expected:
        raise ModelError(
            "a piece was computed in another way than its night",
            where=name,
            found=" ".join(found.values()) or "nothing about it",
            expected=" ".join(expected.values()),
            way_out="let all nodes have the same release and devices, then run again",
        )


@dataclass(frozen=True)
class PieceCopier:
    """Copies tags of the night before: a row of `plan.REUSED` in, the summary out."""

    work: str
    columns: TagColumns
    made_by: Mapping[str, str]  # the night before was computed so as well, or nothing of it is reused

    def __call__(self, piece: Mapping[str, Any]) -> Summary:
        """Whole columns are filtered; no row is looked at. DataError if the file is not the one that was planned with."""
        file = FileInfo(uri=piece["uri"], size=piece["size"], version=piece["version"])
        self._check_unchanged(file)
        table = storage.read_parquet(file.uri)
        self._check_unchanged(file)
        tags = table.filter(pa.array(unpacked(piece["keep"], len(table)))).select(self.columns.schema.names)
        tags = tags.cast(self.columns.schema)
        labels = tags["labels"].combine_chunks()
        ids = pc.index_in(labels.flatten(), value_set=self.columns.labels)
        if ids.null_count:
            raise DataError("a reused tag is no label of the bundle", where=file.uri, way_out="tag without previous")
        rows = np.repeat(np.arange(len(labels)), list_lengths(labels))
        tags = tags.append_column(IDS, lists_from_rows(rows, ids, len(labels)))
        untagged = pc.sum(pc.equal(pc.list_value_length(labels), 0)).as_py() or 0
        summary = summarise(ids.to_numpy(), pc.list_flatten(tags["scores"]).to_numpy(), untagged)
        summary |= {"tagged": 0, "reused": len(tags), "rejected": 0, "reasons": {}, "truncated": 0, "samples": []}
        summary |= {"made_by": dict(self.made_by)} | self.columns.by_filter(tags)
        _finish(self.work, piece_name("r", piece["number"]), tags, summary)
        return summary

    def _check_unchanged(self, file: FileInfo) -> None:
        if not is_unchanged(file):
            what = "the night before has changed since this one was planned"
            raise DataError(what, where=file.uri, way_out=f"remove {self.work} and run again")


def finished(work: str) -> Iterator[tuple[str, Summary]]:
    """Name and summary of each piece that is done, a few at a time; a file that a power failure has cut short is not done."""
    pieces = written(work)
    names, files = list(pieces), list(pieces.values())
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(files), _READERS):
            here = slice(first, first + _READERS)
            summaries = pool.map(_read_summary, [file.uri for file in files[here]])
            yield from ((name, summary) for name, summary in zip(names[here], summaries, strict=True) if summary is not None)


def written(work: str, what: str = "pieces") -> dict[str, FileInfo]:
    """The files of ``pieces`` or ``rejects``, by the names of their pieces: tagged ones first, each in order."""
    files = [file for file in storage.all_files(storage.join(work, what)) if not storage.is_temporary(file.uri)]
    named = {file.uri.rpartition("/")[2].removesuffix(".parquet"): file for file in files}
    return dict(sorted(named.items(), key=lambda item: (item[0][0] != "t", item[0])))


def _uri(work: str, what: str, name: str) -> str:
    return storage.join(work, what, f"{name}.parquet")


def _finish(work: str, name: str, tags: pa.Table, summary: Summary) -> None:
    counts = {name: value for name, value in summary.items() if name != "labels"}
    metadata = {**(tags.schema.metadata or {}), _SUMMARY: json.dumps(counts).encode()}
    write_parquet(_uri(work, "pieces", name), tags.replace_schema_metadata(metadata))


def _read_summary(uri: str) -> Summary | None:
    filesystem, path = storage.arrow_filesystem(uri)
    with storage.explained(uri):
        try:
            tags = pq.read_table(path, columns=[IDS, "scores"], filesystem=filesystem, partitioning=None)
        except pa.ArrowInvalid:
            return None
    labels = _label_sums(*(pc.list_flatten(tags[name]).to_numpy() for name in (IDS, "scores")))
    return {**json.loads(tags.schema.metadata[_SUMMARY]), "labels": labels}


def _samples(good: pa.Table, tags: pa.Table) -> list[dict[str, Any]]:
    rows = np.flatnonzero(pc.is_valid(good["excerpt"]).to_numpy())[:_SAMPLES]
    shown = tags.take(pa.array(rows)).append_column("text", good["excerpt"].take(pa.array(rows)))
    names = ("id", "text", "labels", "names", "scores")
    return [{"digest": row["text_digest"], **{name: row.get(name) for name in names}} for row in shown.to_pylist()]
