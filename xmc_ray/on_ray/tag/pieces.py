"""A piece of a night: read and tokenised by one task, tagged by an actor, written by another task. Done is what is written.

A piece leaves one file, ``<work>/pieces/t000017.parquet``, which appears when it is complete, says in its metadata what was
counted, and is the proof that the piece is done. Its rejects are written before. Both have names and contents that follow
from the plan alone: whoever does a piece again, after a kill or beside a straggler, replaces them with the same.
"""

import json
import re
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
from xmc_ray.data.reader import read_all, segment_of
from xmc_ray.metrics.calibration import SCORE_BINS
from xmc_ray.model.text import Tokenizer
from xmc_ray.on_ray.meters import count_piece
from xmc_ray.on_ray.predictor import PoolConfig, Predictor, ScoringConfig, matrix
from xmc_ray.on_ray.stream import tokenise_table
from xmc_ray.on_ray.tag.plan import merged, piece_name, unpacked
from xmc_ray.storage.files import FileInfo, write_parquet

OUTCOMES = ("tagged", "reused", "rejected", "truncated", "untagged")


_SUMMARY = b"xmc_ray"  # key of a piece's metadata


_SAMPLES, _EXCERPT = 2, 240  # documents of a piece, and letters of them, that the report may show


_READERS = 16  # threads that look at what is done


_STRINGS = pa.list_(pa.string())


_REJECTS = pa.schema([("file", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string())])


_PLACE = re.compile(", first at |: |; ")  # what follows is of this row only


_NO_TEXT = pa.scalar(None, pa.string())


Summary = dict[str, Any]


"""Of a piece: `OUTCOMES` in rows; ``reasons`` {reason: rows}, without places; ``labels`` [ids, rows, sums of scores];
``scores``, counts in 20 equal bins of [0, 1]; ``samples``, some of its documents with their tags."""


@dataclass(frozen=True)
class ReadPieces:
    """A task that reads and tokenises pieces, one after the other.

    Takes rows of `plan.PIECES`, gives ``piece`` (its number) and ``data``: a table, as bytes, of ``id``, ``file``, ``row``,
    ``reason``, ``text_digest``, ``excerpt``, ``truncated`` and the tokens. One row a piece: so no stage cuts a piece in two.
    """

    rules: Rules
    tokenizers: Sequence[Tokenizer]

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        """Neighbouring pieces are read in one go; texts are gone as soon as their chunk is tokenised."""
        rows = pieces.to_pylist()
        stream = _Stream(merged([segment for piece in rows for segment in piece["segments"]]), self.rules)
        for piece in rows:
            yield _row(piece["number"], pa.concat_tables(map(self._tokenised, left_to_do(piece, stream))))

    def _tokenised(self, table: pa.Table) -> pa.Table:
        texts = table["text"].combine_chunks()
        is_shown = pa.array(np.arange(len(table)) < _SAMPLES)
        excerpts = pc.if_else(is_shown, pc.utf8_slice_codeunits(texts, 0, _EXCERPT), _NO_TEXT)
        table = table.append_column("text_digest", text_digest(texts)).append_column("excerpt", excerpts)
        return tokenise_table(table, self.tokenizers)


class _Stream:
    """The rows of segments, one after the other."""

    def __init__(self, segments: list[dict[str, Any]], rules: Rules) -> None:
        self._tables = (chunk.table for _, chunk in read_all(map(segment_of, segments), rules))
        self._rest = rules.unreadable(0, "", "", 0)

    def take(self, rows: int) -> Iterator[pa.Table]:
        """The next ``rows`` rows."""
        while rows:
            table = self._rest if len(self._rest) else next(self._tables)
            self._rest = table.slice(rows)
            table = table.slice(0, rows)
            rows -= len(table)
            yield table


def left_to_do(piece: Mapping[str, Any], stream: _Stream) -> Iterator[pa.Table]:
    """The rows of a piece, chunk by chunk, without those that are taken over; repeated ids have that for a reason."""
    rows = sum(segment["rows"] for segment in piece["segments"])
    skip = unpacked(piece["skip"], rows)
    repeated = {
        double["place"]: f"duplicate id, first at {double['file']} row {double['row']}" for double in piece["duplicates"]
    }
    places = np.array(sorted(repeated), np.int64)
    place = 0
    for table in stream.take(rows):
        inside = places[slice(*np.searchsorted(places, [place, place + len(table)]))]
        if len(inside):
            reasons = np.full(len(table), None, object)
            reasons[inside - place] = [repeated[number] for number in inside.tolist()]
            column = pc.coalesce(table["reason"].combine_chunks(), pa.array(reasons, pa.string()))
            table = table.set_column(table.column_names.index("reason"), "reason", column)
        yield table.filter(pa.array(~skip[place : place + len(table)]))
        place += len(table)


def some_texts(pieces: pa.Table, rules: Rules, limit: int) -> list[str]:
    """Texts of the first rows that can be tagged."""
    tables = chain.from_iterable(left_to_do(piece, _Stream(piece["segments"], rules)) for piece in pieces.to_pylist())
    texts = chain.from_iterable(table.filter(pc.is_null(table["reason"]))["text"].to_pylist() for table in tables)
    return list(islice(texts, limit))


class TagPieces:
    """An actor that tags pieces as `ReadPieces` gives them: tokens become ``ids`` and ``probabilities``."""

    def __init__(self, bundles: list[str], k: int, pool: PoolConfig, scoring: ScoringConfig) -> None:
        self.predict = Predictor(bundles, k, pool, scoring)

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        """One piece after the other, sorted by length as a whole."""
        for number, table in _tables(pieces):
            yield _row(number, self.predict(table))


class TagColumns:
    """From predicted ids to the columns of the contract: labels, scores, names, model."""

    def __init__(
        self, labels: pa.Table, fingerprint: str, min_score: float, thresholds_L: npt.NDArray[np.float32] | None = None
    ) -> None:
        """``thresholds_L``: the least score of each label, besides the minimum of all."""
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
        """Tags without pads and without scores below the minimum or the label's threshold, and what they add up to."""
        ids, scores = matrix(table, "ids"), matrix(table, "probabilities")
        kept = (ids >= 0) & (scores >= self.min_score)
        if self.thresholds_L is not None:
            kept &= scores >= self.thresholds_L[ids]
        rows, places = np.nonzero(kept)[0], pa.array(ids[kept])
        columns = {"labels": self.labels.take(places), "scores": pa.array(scores[kept])}
        if self.names is not None:
            columns["names"] = self.names.take(places)
        lists = {name: lists_from_rows(rows, values, len(table)) for name, values in columns.items()}
        model = pa.repeat(pa.scalar(self.fingerprint), len(table))
        columns = {"id": table["id"], **lists, "model": model, "text_digest": table["text_digest"]}
        tags = pa.table({name: columns[name] for name in self.schema.names}).cast(self.schema)
        return tags, summarise(ids[kept], scores[kept], int((~kept.any(1)).sum()))


def summarise(label_ids: Any, scores: Any, untagged: int) -> Summary:
    """The part of a summary that tags add up to: label ids and scores of all tags of a piece."""
    labels, place, rows = np.unique(label_ids, return_inverse=True, return_counts=True)
    sums = np.bincount(place, scores, len(labels)).round(4)
    histogram = np.histogram(scores, SCORE_BINS, (0, 1))[0]
    return {"labels": [labels.tolist(), rows.tolist(), sums.tolist()], "scores": histogram.tolist(), "untagged": untagged}


class WritePieces:
    """A task that writes tagged pieces to ``work`` and gives the ``summary`` of each, as JSON."""

    def __init__(self, work: str, columns: TagColumns) -> None:
        self.work, self.columns = work, columns

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        """Rejects first; the file of tags completes the piece."""
        for number, table in _tables(pieces):
            name = piece_name("t", number)
            is_good = pc.is_null(table["reason"])
            good, bad = table.filter(is_good), table.filter(pc.invert(is_good))
            tags, summary = self.columns(good)
            reasons = Counter(_PLACE.split(reason, 1)[0] for reason in bad["reason"].to_pylist())
            summary |= {"tagged": len(good), "reused": 0, "rejected": len(bad), "reasons": dict(reasons)}
            summary |= {"truncated": pc.sum(good["truncated"]).as_py() or 0, "samples": _samples(good, tags)}
            if len(bad):
                write_parquet(_uri(self.work, "rejects", name), bad.select(_REJECTS.names).cast(_REJECTS))
            _finish(self.work, name, tags, summary)
            yield pa.table({"summary": [json.dumps(summary)]})


class CopyPieces:
    """A task that takes over tags of the night before: rows of `plan.REUSED` in, summaries out."""

    def __init__(self, work: str, columns: TagColumns) -> None:
        self.work, self.columns = work, columns

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        """Whole columns are filtered; no row is looked at."""
        labels = self.columns.labels
        for piece in pieces.to_pylist():
            table = storage.read_parquet(piece["uri"])
            tags = table.filter(pa.array(unpacked(piece["keep"], len(table)))).select(self.columns.schema.names)
            tags = tags.cast(self.columns.schema)
            ids = pc.index_in(pc.list_flatten(tags["labels"]), value_set=labels).drop_null().to_numpy()
            untagged = pc.sum(pc.equal(pc.list_value_length(tags["labels"]), 0)).as_py() or 0
            summary = summarise(ids, pc.list_flatten(tags["scores"]).to_numpy(), untagged)
            summary |= {"tagged": 0, "reused": len(tags), "rejected": 0, "reasons": {}, "truncated": 0, "samples": []}
            _finish(self.work, piece_name("r", piece["number"]), tags, summary)
            yield pa.table({"summary": [json.dumps(summary)]})


def finished(work: str) -> dict[str, Summary]:
    """The summaries of the pieces that are done, by name; one that a power failure has left in part is not done."""
    files = written(work)
    with ThreadPoolExecutor(_READERS) as pool:
        summaries = pool.map(_read_summary, [file.uri for file in files.values()])
        return {name: summary for name, summary in zip(files, summaries, strict=True) if summary is not None}


def written(work: str, what: str = "pieces") -> dict[str, FileInfo]:
    """The files of ``pieces`` or ``rejects``, by the names of their pieces: tagged ones first, each in order."""
    files = [file for file in storage.all_files(storage.join(work, what)) if "/." not in file.uri]
    named = {file.uri.rpartition("/")[2].removesuffix(".parquet"): file for file in files}
    return dict(sorted(named.items(), key=lambda one: (one[0][0] != "t", one[0])))


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


def _row(number: int, table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, sink.tell()])), sink.getvalue()])
    return pa.table({"piece": [number], "data": data})


def _tables(pieces: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    for number, data in zip(pieces["piece"].to_pylist(), pieces["data"], strict=True):
        yield number, pa.ipc.open_stream(data.as_buffer()).read_all()
