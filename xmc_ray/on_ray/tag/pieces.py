"""The steps of a piece: it is read and tokenised, tagged, and written, each step by another process.

A piece leaves one file, ``<work>/pieces/t000017.parquet``, which appears atomically, has the counts of the piece in its
metadata, and is the proof that the piece is done. Its rejects are written before it. Names and contents of both follow from the
plan alone: a task that does a piece again, after a crash or beside a straggler, replaces them with the same.
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
from xmc_ray.data.labels import lists_from_rows
from xmc_ray.data.reader import Segment, check_unchanged, read_all
from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.model.text import Tokenizer
from xmc_ray.on_ray.meters import count_piece
from xmc_ray.on_ray.predictor import matrix
from xmc_ray.on_ray.stream import tokenise_table
from xmc_ray.on_ray.tag.plan import merged, piece_name, unpacked
from xmc_ray.storage.files import FileInfo, write_parquet

Summary = dict[str, Any]
"""Of a piece: `OUTCOMES` in rows; ``reasons`` {reason of a reject: rows}; ``labels`` [ids, rows, sums of scores]; ``scores``,
counts in 20 equal bins of [0, 1]; ``samples``, some of its documents with their tags."""

OUTCOMES = ("tagged", "reused", "rejected", "truncated", "untagged")
REJECTS = pa.schema([("file", pa.string()), ("row", pa.int64()), *((name, pa.string()) for name in ("id", "reason", "detail"))])

_SUMMARY = b"xmc_ray"  # key of a piece's metadata
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

    def __call__(self, pieces: list[dict[str, Any]]) -> Iterator[tuple[int, pa.Table]]:
        """Neighbouring pieces are read in one go; texts are dropped as soon as their chunk is tokenised.

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
        excerpts = pc.if_else(is_shown, pc.utf8_slice_codeunits(texts, 0, _EXCERPT), _NO_TEXT)
        table = table.append_column("text_digest", text_digest(texts)).append_column("excerpt", excerpts)
        return tokenise_table(table, self.tokenizers)


class _Stream:
    """The rows of segments, one after the other."""

    def __init__(self, segments: list[dict[str, Any]], rules: Rules) -> None:
        self._tables = self._read([Segment.from_row(segment) for segment in segments], rules)
        self._rest = rules.empty()
        self._file: FileInfo | None = None  # of the last rows, if any of its rows were readable

    def _read(self, segments: list[Segment], rules: Rules) -> Iterator[pa.Table]:
        last = None
        for number, chunk in read_all(segments, rules):
            if number != last:
                last, self._file = number, None
            if chunk.reject is None:
                self._file = segments[number].file
            yield chunk.table

    def check_unchanged(self) -> None:
        """DataError if the file of the last rows has changed; those before it were compared at their ends."""
        if self._file is not None:
            check_unchanged(self._file)

    def take(self, rows: int) -> Iterator[pa.Table]:
        """The next ``rows`` rows."""
        while rows:
            table = self._rest if len(self._rest) else next(self._tables)
            self._rest = table.slice(rows)
            table = table.slice(0, rows)
            rows -= len(table)
            yield table


def rows_to_tag(piece: Mapping[str, Any], stream: _Stream) -> Iterator[pa.Table]:
    """The rows of a piece, chunk by chunk, without those that are reused; rows that repeat an id are rejected."""
    rows = sum(segment["rows"] for segment in piece["segments"])
    skip = unpacked(piece["skip"], rows)
    repeats = {repeat["place"]: f"first at {repeat['file']} row {repeat['row']}" for repeat in piece["duplicates"]}
    start = 0
    for table in stream.take(rows):
        if repeats:
            firsts = pa.array([repeats.get(row) for row in range(start, start + len(table))], pa.string())
            is_repeat = pc.and_(pc.is_null(table["reason"]), pc.is_valid(firsts))
            for name, values in (("reason", "duplicate id"), ("detail", firsts)):
                column = pc.if_else(is_repeat, values, table[name])
                table = table.set_column(table.column_names.index(name), name, column)
        yield table.filter(pa.array(~skip[start : start + len(table)]))
        start += len(table)


def some_texts(pieces: pa.Table, rules: Rules, limit: int) -> list[str]:
    """Texts of the first rows that can be tagged."""
    tables = chain.from_iterable(rows_to_tag(piece, _Stream(piece["segments"], rules)) for piece in pieces.to_pylist())
    texts = chain.from_iterable(table.filter(pc.is_null(table["reason"]))["text"].to_pylist() for table in tables)
    return list(islice(texts, limit))


class TagColumns:
    """Turns predicted ids into the columns of a file of tags: labels, scores, names, model."""

    def __init__(
        self, labels: pa.Table, fingerprint: str, min_score: float, thresholds_L: npt.NDArray[np.float32] | None = None
    ) -> None:
        """``thresholds_L``: the least score of each label, beside the minimum for all."""
        self.labels = labels["label"].combine_chunks()
        self.names = labels["name"].combine_chunks() if labels["name"].null_count < len(labels) else None
        self.fingerprint = fingerprint
        self.min_score, self.thresholds_L = min_score, thresholds_L

    @property
    def schema(self) -> pa.Schema:
        """The columns of a file of tags."""
        names = [("names", _STRINGS)] if self.names is not None else []
        lists = [("labels", _STRINGS), ("scores", pa.list_(pa.float32())), *names]
        return pa.schema([("id", pa.string()), *lists, ("model", pa.string()), ("text_digest", pa.string())])

    def __call__(self, table: pa.Table) -> tuple[pa.Table, Summary]:
        """The tags, without pads and without scores below the minimum or the label's threshold, and their summary."""
        ids, scores = matrix(table, "ids"), matrix(table, "probabilities")
        kept = (ids >= 0) & (scores >= self.min_score)
        if self.thresholds_L is not None:
            kept &= scores >= self.thresholds_L[ids]
        rows, kept_ids = np.nonzero(kept)[0], pa.array(ids[kept])
        columns = {"labels": self.labels.take(kept_ids), "scores": pa.array(scores[kept])}
        if self.names is not None:
            columns["names"] = self.names.take(kept_ids)
        lists = {name: lists_from_rows(rows, values, len(table)) for name, values in columns.items()}
        model = pa.repeat(pa.scalar(self.fingerprint), len(table))
        columns = {"id": table["id"], **lists, "model": model, "text_digest": table["text_digest"]}
        tags = pa.table({name: columns[name] for name in self.schema.names}).cast(self.schema)
        return tags, summarise(ids[kept], scores[kept], int((~kept.any(1)).sum()))


def summarise(label_ids: Any, scores: Any, untagged: int) -> Summary:
    """The part of a summary that depends on the tags, given label ids and scores of all tags of a piece."""
    labels, group, rows = np.unique(label_ids, return_inverse=True, return_counts=True)
    sums = np.bincount(group, scores, len(labels)).round(4)
    histogram = np.histogram(scores, SCORE_BINS, (0, 1))[0]
    return {"labels": [labels.tolist(), rows.tolist(), sums.tolist()], "scores": histogram.tolist(), "untagged": untagged}


@dataclass(frozen=True)
class PieceWriter:
    """Writes tagged pieces to ``work``."""

    work: str
    columns: TagColumns

    def __call__(self, number: int, table: pa.Table) -> Summary:
        """Rejects first: the file of tags completes the piece."""
        name = piece_name("t", number)
        is_good = pc.is_null(table["reason"])
        good, bad = table.filter(is_good), table.filter(pc.invert(is_good))
        tags, summary = self.columns(good)
        summary |= {"tagged": len(good), "reused": 0, "rejected": len(bad), "reasons": Counter(bad["reason"].to_pylist())}
        summary |= {"truncated": pc.sum(good["truncated"]).as_py() or 0, "samples": _samples(good, tags)}
        rejects = _uri(self.work, "rejects", name)
        if len(bad):
            write_parquet(rejects, bad.select(REJECTS.names).cast(REJECTS))
        else:  # an attempt that was killed may have written some: the file was away for a while, say
            storage.patiently(storage.remove, rejects)
        _finish(self.work, name, tags, summary)
        return summary


@dataclass(frozen=True)
class PieceCopier:
    """Copies tags of the night before: a row of `plan.REUSED` in, the summary out."""

    work: str
    columns: TagColumns

    def __call__(self, piece: Mapping[str, Any]) -> Summary:
        """Whole columns are filtered; no row is looked at."""
        table = storage.read_parquet(piece["uri"])
        tags = table.filter(pa.array(unpacked(piece["keep"], len(table)))).select(self.columns.schema.names)
        tags = tags.cast(self.columns.schema)
        ids = pc.index_in(pc.list_flatten(tags["labels"]), value_set=self.columns.labels).drop_null().to_numpy()
        untagged = pc.sum(pc.equal(pc.list_value_length(tags["labels"]), 0)).as_py() or 0
        summary = summarise(ids, pc.list_flatten(tags["scores"]).to_numpy(), untagged)
        summary |= {"tagged": 0, "reused": len(tags), "rejected": 0, "reasons": {}, "truncated": 0, "samples": []}
        _finish(self.work, piece_name("r", piece["number"]), tags, summary)
        return summary


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
    metadata = {**(tags.schema.metadata or {}), _SUMMARY: json.dumps(summary).encode()}
    write_parquet(_uri(work, "pieces", name), tags.replace_schema_metadata(metadata))
    count_piece(summary)


def _read_summary(uri: str) -> Summary | None:
    filesystem, path = storage.arrow_filesystem(uri)
    with storage.explained(uri):
        try:
            return dict(json.loads(pq.read_metadata(path, filesystem=filesystem).metadata[_SUMMARY]))
        except pa.ArrowInvalid:
            return None


def _samples(good: pa.Table, tags: pa.Table) -> list[dict[str, Any]]:
    rows = np.flatnonzero(pc.is_valid(good["excerpt"]).to_numpy())[:_SAMPLES]
    shown = tags.take(pa.array(rows)).append_column("text", good["excerpt"].take(pa.array(rows)))
    names = ("id", "text", "labels", "names", "scores")
    return [{"digest": row["text_digest"], **{name: row.get(name) for name in names}} for row in shown.to_pylist()]
