"""Documents of a night, page by page and by filters: read by row groups, never a night as a whole.

A filter on ids skips row groups by their statistics; any other is a scan that ends at a page of hits or when its time is over,
and says how far it came. It goes on where it ended: a position is the number of a file and of a row in it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from xmc_ray import storage
from xmc_ray.errors import DataError
from xmc_ray.storage.listing import FileInfo

PAGE, SECONDS = 25, 2.0  # documents of a page, and how long a scan for them may take
_ROWS = 4096  # of a batch
_NEEDED, _WELCOME = ("id", "labels", "scores"), ("names", "text_digest")


class Query(NamedTuple):
    """Which documents: with this id, with this label, whose label (or best one) has at least this score, without a tag."""

    id: str = ""
    label: str = ""
    least: float = 0.0
    untagged: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it takes every document."""
        return self == Query()


class Position(NamedTuple):
    """Where a scan goes on."""

    file: int = 0
    row: int = 0


START = Position()


@dataclass(frozen=True)
class Hits:
    """Documents as rows of the night; ``rest``: where to go on, None at the end; ``read``: rows that were looked at.

    ``late``: the time was over before the page was full.
    """

    rows: list[dict[str, Any]]
    rest: Position | None
    read: int
    late: bool = False


class Scored(NamedTuple):
    """A document and the score that it got for a label."""

    id: str
    score: float


@dataclass(frozen=True)
class Extremes:
    """The documents with the highest and the lowest scores of a label, of ``documents`` that were found in ``read`` rows."""

    best: list[Scored]
    worst: list[Scored]
    documents: int
    read: int
    late: bool


def search(
    files: Sequence[FileInfo], query: Query, start: Position = START, limit: int = PAGE, seconds: float = SECONDS
) -> Hits:
    """The next ``limit`` documents that a query takes. DataError for files that cannot be read."""
    deadline, rows, read = time.monotonic() + seconds, list[dict[str, Any]](), 0
    wanted = ds.field("id") == query.id if query.id else None
    for position, batch in _batches(files, (*_NEEDED, *_WELCOME), wanted, start):
        taken = np.flatnonzero(_taken(batch, query))
        shown = taken[: limit - len(rows)]
        rows += batch.take(pa.array(shown)).to_pylist()
        if len(rows) == limit:
            last = int(shown[-1]) + 1
            return Hits(rows, Position(position.file, position.row + last), read + last)
        read += len(batch)
        if time.monotonic() > deadline:
            return Hits(rows, Position(position.file, position.row + len(batch)), read, late=True)
    return Hits(rows, None, read)


def document(files: Sequence[FileInfo], id: str, seconds: float = 10.0) -> dict[str, Any] | None:
    """The row of the document with an id; None if the night has none. Only row groups that may hold it are read.

    DataError if that takes longer.
    """
    hits = search(files, Query(id=id), limit=1, seconds=seconds)
    if hits.late and not hits.rows:
        way_out = "look for the id among the documents of the night, where a search goes on"
        raise DataError("the document was not found in time", found=f"{hits.read:,} rows read", way_out=way_out)
    return hits.rows[0] if hits.rows else None


def extremes(files: Sequence[FileInfo], label: str, n: int = 10, seconds: float = SECONDS) -> Extremes:
    """The ``n`` best and worst documents with a label, in a running order."""
    deadline, read, documents, late = time.monotonic() + seconds, 0, 0, False
    best, worst = list[Scored](), list[Scored]()
    for _, batch in _batches(files, _NEEDED):
        row, score = _of_label(batch, label)
        order = np.argsort(-score, kind="stable")
        for kept, some, sign in ((best, order[:n], -1), (worst, order[::-1][:n], 1)):
            ids = batch["id"].take(pa.array(row[some])).to_pylist()
            kept += map(Scored, ids, score[some].tolist())
            kept.sort(key=lambda each: sign * each.score)
            del kept[n:]
        read, documents = read + len(batch), documents + len(row)
        if late := time.monotonic() > deadline:
            break
    return Extremes(best, [each for each in worst if each not in best], documents, read, late)


def _taken(batch: pa.RecordBatch, query: Query) -> NDArray[Any]:
    """bool[rows]."""
    taken = np.ones(len(batch), bool)
    if query.id:
        taken &= np.asarray(pc.equal(batch["id"], query.id).fill_null(False))
    if query.untagged:
        taken &= np.asarray(pc.equal(pc.list_value_length(batch["labels"]), 0).fill_null(True))
    if query.label:
        row, score = _of_label(batch, query.label)
        has = np.zeros(len(batch), bool)
        has[row[score >= query.least]] = True
        taken &= has
    elif query.least:
        taken &= _best(batch["scores"]) >= query.least
    return taken


def _best(scores: pa.Array) -> NDArray[Any]:
    """float[rows]: the highest score of each document, minus infinity without one."""
    best = np.full(len(scores), -np.inf)
    np.maximum.at(best, np.asarray(pc.list_parent_indices(scores)), np.asarray(pc.list_flatten(scores)))
    return best


def _of_label(batch: pa.RecordBatch, label: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows that have the label, and its scores."""
    has = pc.equal(pc.list_flatten(batch["labels"]), label).fill_null(False)
    return (
        np.asarray(pc.list_parent_indices(batch["labels"]).filter(has)),
        np.asarray(pc.list_flatten(batch["scores"]).filter(has)),
    )


def _batches(
    files: Sequence[FileInfo], columns: Sequence[str], wanted: ds.Expression | None = None, start: Position = START
) -> Iterator[tuple[Position, pa.RecordBatch]]:
    """Batches with the position of their first row, from ``start`` on; row groups that ``wanted`` rules out are not read."""
    for number, file in enumerate(files):
        if number < start.file:
            continue
        filesystem, path = storage.arrow_filesystem(file.uri)
        with storage.explained(file.uri):
            try:
                fragment = ds.ParquetFileFormat().make_fragment(path, filesystem)
                schema = fragment.physical_schema
                if missing := [name for name in _NEEDED if name not in schema.names]:
                    raise DataError("not a file of tags", where=file.uri, found=f"no column {missing[0]!r}")
                present = [name for name in columns if name in schema.names]
                ends = np.cumsum([group.num_rows for group in fragment.row_groups]).tolist()
                firsts = [0, *ends]
                for part in fragment.split_by_row_group(filter=wanted, schema=schema):
                    group = part.row_groups[0].id
                    row, skip = firsts[group], start.row if number == start.file else 0
                    if ends[group] <= skip:
                        continue
                    for batch in part.to_batches(schema=schema, columns=present, batch_size=_ROWS, use_threads=False):
                        if row + len(batch) > skip:
                            before = max(0, skip - row)
                            yield Position(number, row + before), batch.slice(before)
                        row += len(batch)
            except pa.ArrowException as error:
                raise DataError("a file of tags cannot be read", where=file.uri, found=error) from None
