"""Input files: their rows, chunk by chunk.

Rows that cannot be read are given all the same, with the reason. A chunk says where it starts, so that its rows can be read
again without those before it: at a row of a Parquet file, at a byte of (unpacked) JSON lines. Large files are read in parts,
by several tasks. While storage is unavailable, reading waits, in the middle of a file as well.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.arrow_files import arrow_rows
from xmc_ray.data.delimited import DELIMITERS, Delimited
from xmc_ray.data.documents import DocumentsConfig, Rules
from xmc_ray.data.input_columns import check_columns
from xmc_ray.data.inputs import format_of, kind_by_name, list_inputs, open_text
from xmc_ray.data.line_ranges import LARGE, check_first_line, line_ranges, whole_lines
from xmc_ray.data.rejects import MAX_REJECT_SHARE, Damaged, Reject, Rejects
from xmc_ray.data.row_groups import Opened, row_ranges
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage.files import PATIENCE
from xmc_ray.storage.listing import FileInfo

CHUNK = 1024  # most rows of a chunk
_SMALL, _AHEAD = 1 << 20, 16  # bytes of a file that is read ahead, and how many are
_PAUSE, _ATTEMPTS = 2.0, 3  # a file on S3 is missing or damaged if it is so several times, some seconds apart
_UNPACKED = 4 << 20  # bytes of a packed file that are passed over at a time
_ALL = 1 << 62  # rows
_FILE = {"uri": pa.string(), "size": pa.int64(), "version": pa.string()}
_PARTS = pa.schema(_FILE | dict.fromkeys(("part", "file", "row", "rows", "start", "stop"), pa.int64()))


class Chunk(NamedTuple):
    """Consecutive rows of a file, as `Rules` gives them; ``start`` is where they start and ``end`` where the next ones do.

    ``reject``: why its rows cannot be read, if so; rows whose number is unknown count as one.
    """

    start: int
    end: int
    table: pa.Table
    reject: Reject | None = None


@dataclass(frozen=True)
class Segment:
    """Rows of one file that are read together, by default all of them.

    ``row`` is the number of the first, ``start`` where it is in the file (see `Chunk`); ``reject``, if given, is why they are
    not read at all. With ``stop``, the rows are the lines of JSON that begin from byte ``start`` to before byte ``stop``, and
    are numbered from ``row`` all the same: how many there are before them is for others to count.
    """

    file: FileInfo
    start: int = 0
    row: int = 0
    rows: int = _ALL
    reject: Reject | None = None
    stop: int | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Segment":
        """From a row of `file_parts`, or from a segment of a piece."""
        file = FileInfo(uri=row["uri"], size=row["size"], version=row["version"])
        reject = None if row.get("reason") is None else Reject(row["reason"], row["detail"])
        rows = _ALL if row["rows"] is None else row["rows"]
        return cls(file, row["start"], row["row"], rows, reject, row.get("stop"))

    @property
    def size(self) -> int:
        """Bytes of the file, or of the range."""
        return self.file.size if self.stop is None else self.stop - self.start

    def lost_with(self, chunk: Chunk) -> int:
        """The bytes that are lost with a chunk of this segment: all, if it is rejected without a number of rows."""
        return self.size if self.rows == _ALL and chunk.reject is not None and chunk.start == chunk.end else 0


def file_parts(files: Sequence[FileInfo], size: int = LARGE) -> pa.Table:
    """What one task reads at least, numbered, a row for `Segment.from_row` each, in order.

    A part is a file, or of a large one row groups, of about ``size`` bytes, or a byte range of JSON lines, whose rows count
    from 0.
    """
    parts: list[dict[str, Any]] = []
    for number, file in enumerate(files):
        of_file = {**vars(file), "file": number}
        kind = kind_by_name(file.uri)
        if kind == "parquet":
            ranges = [{"row": row, "rows": rows, "start": row} for row, rows in row_ranges(file, size)]
        elif kind == "json":
            ranges = [{"row": 0, "start": start, "stop": stop} for start, stop in line_ranges(file)]
        else:
            ranges = [{"row": 0, "start": 0}]
        parts += [of_file | {"part": len(parts) + more} | part for more, part in enumerate(ranges)]
    return pa.Table.from_pylist(parts, _PARTS)


def read_file(segment: Segment, rules: Rules, chunk: int = CHUNK, opened: Opened | None = None) -> Iterator[Chunk]:
    """The rows of a segment, at most ``chunk`` at a time: exactly as many as it has, readable or not.

    ``opened``: a file that may be open, and is left open for the segments that follow.

    The file is compared with the listed one before the first row, where a difference makes all of them rejects, and after the
    last one, where it is an error. Raises DataError (`check_unchanged`) for a file that has changed while it was read,
    UnavailableError when its storage does not answer for `PATIENCE` seconds, and ConfigError when it refuses.
    """
    if segment.reject is not None:
        yield from _lost(segment, segment.rows, segment.reject, rules, chunk)
        return
    left, is_whole = segment, segment.rows == _ALL
    deadline, failures = time.monotonic() + PATIENCE, 0
    reject = None
    while left.rows:
        try:
            if left == segment and not _is_as_listed(left.file):
                raise Damaged("the file has changed since it was listed")
            for part in _chunks(left, rules, chunk, opened):
                if len(part.table):
                    yield part
                left = replace(left, start=part.end, row=left.row + len(part.table), rows=left.rows - len(part.table))
                deadline, failures = time.monotonic() + PATIENCE, 0
            reject = None if is_whole or not left.rows else Reject("the file has fewer rows than before")
            break
        except (OSError, pa.ArrowException, UnicodeError, ConfigError, Damaged) as error:
            is_unavailable = storage.is_unavailable(error)
            failures += not is_unavailable
            if is_unavailable and time.monotonic() > deadline:
                with storage.explained(left.file.uri):
                    raise
            if isinstance(error, ConfigError) and not is_unavailable:
                raise  # credentials, which is no fault of this file
            may_recover = failures < _ATTEMPTS and not isinstance(error, Damaged) and not storage.is_local(left.file.uri)
            if is_unavailable or may_recover:
                time.sleep(_PAUSE)
                continue
            reject = _reject(error)
            break
    if left.row > segment.row:
        check_unchanged(segment.file)
    if reject is not None:  # an unknown number of rows counts as one, lest it be overlooked
        yield from _lost(left, 1 if is_whole else left.rows, reject, rules, chunk)


def check_unchanged(file: FileInfo) -> None:
    """DataError unless a file, some of whose rows have been read, `is_unchanged`: they may be of two versions.

    pyarrow's requests to S3 name no version, so this is what holds the parts of a file together there.
    """
    if not is_unchanged(file):
        raise DataError(
            "a file has changed while it was read",
            where=file.uri,
            way_out="run again once its writers are done; a night needs --overwrite then",
        )


def is_unchanged(file: FileInfo) -> bool:
    """Whether a file is still there with the size and the version with which it was listed."""
    try:
        return storage.patiently(_is_as_listed, file)
    except FileNotFoundError:
        return False


def _is_as_listed(file: FileInfo) -> bool:
    now = storage.stat(file.uri)
    return (now.size, now.version) == (file.size, file.version)


def read_all(segments: Iterable[Segment], rules: Rules, chunk: int = CHUNK) -> Iterator[tuple[int, Chunk]]:
    """The chunks of segments, one after the other, each with the number of its segment.

    Small files are read ahead, several at a time, since on object storage most of their time is waiting. A row group of a
    larger one is read once, however many segments follow each other in it.
    """
    waiting: deque[tuple[int, Iterator[Chunk] | Future[list[Chunk]]]] = deque()
    pool, opened = ThreadPoolExecutor(_AHEAD), Opened()
    try:
        for number, segment in enumerate(segments):
            is_small = segment.file.size <= _SMALL
            chunks = read_file(segment, rules, chunk, None if is_small else opened)
            waiting.append((number, pool.submit(list, chunks) if is_small else chunks))
            while len(waiting) > _AHEAD:
                yield from _next(waiting)
        while waiting:
            yield from _next(waiting)
    finally:  # without waiting: a thread that happens to collect what somebody has left early might wait for itself
        pool.shutdown(wait=False, cancel_futures=True)
        opened.close()


def _next(waiting: "deque[tuple[int, Iterator[Chunk] | Future[list[Chunk]]]]") -> Iterator[tuple[int, Chunk]]:
    number, chunks = waiting.popleft()
    for part in chunks.result() if isinstance(chunks, Future) else chunks:
        yield number, part


def read_rows(config: DocumentsConfig, *, labelled: bool, max_reject_share: float = MAX_REJECT_SHARE) -> Iterator[pa.Table]:
    """The usable rows of all files, chunk by chunk, in this process; those with a reason are left out.

    Prints to stderr what is left out of the folder and, after the last row, what was rejected. DataError as in `list_inputs`
    and `check_columns`, and if more than ``max_reject_share`` is rejected.
    """
    inputs, rules = list_inputs(config), Rules.of(config, labelled=labelled)
    if inputs.left_out:
        print(inputs, file=sys.stderr, flush=True)
    check_columns(inputs.files, rules)
    rejects = Rejects(sum(file.size for file in inputs.files))
    for segment in map(Segment, inputs.files):
        for chunk in read_file(segment, rules):
            rejects.add(chunk.table["reason"], segment.lost_with(chunk))
            yield chunk.table.filter(pc.is_null(chunk.table["reason"]))
    way_out = "fix the documents, or run again with a higher max_reject_share"
    rejects.check(max_reject_share, where=config.uri, way_out=way_out)
    if rejects.reasons:
        line = f"rejected {rejects.reasons.total():,} of {rejects.rows:,} documents: {rejects}"
        print(line, file=sys.stderr, flush=True)


def _chunks(left: Segment, rules: Rules, chunk: int, opened: Opened | None) -> Iterator[Chunk]:
    kind = format_of(left.file.uri).kind
    if kind == "parquet":
        return _parquet(left, rules, chunk, opened)
    if kind == "arrow":
        return _arrow(left, rules, chunk)
    return _json_lines(left, rules, chunk) if kind == "json" else _delimited(left, rules, chunk, kind)


def _parquet(left: Segment, rules: Rules, chunk: int, opened: Opened | None) -> Iterator[Chunk]:
    """After a row group that cannot be read the next one is tried."""
    files, stays_open = opened or Opened(), False
    try:
        file = files.row_groups(left.file.uri, rules.names, chunk)
        stop = left.start + left.rows
        for group, (at, end) in enumerate(pairwise([0, *file.ends])):
            done, last = max(at, left.start), min(end, stop)
            if done >= last:
                continue
            try:
                for rows in file.rows(group, done, last):
                    yield Chunk(done, done + len(rows), rules.from_parquet(rows, left.file.uri, done))
                    done += len(rows)
            except (OSError, pa.ArrowException, UnicodeError) as error:
                if storage.is_unavailable(error):
                    raise
                reject = _reject(error)
                for first in range(done, last, chunk):
                    rows = min(chunk, last - first)
                    yield Chunk(first, first + rows, rules.unreadable(rows, reject, left.file.uri, first), reject)
        stays_open = opened is not None
    finally:
        if not stays_open:
            files.close()


def _lost(left: Segment, rows: int, reject: Reject, rules: Rules, chunk: int) -> Iterator[Chunk]:
    """The first ``rows`` rows of ``left``, unread; ``end`` is ``start``, since it is unknown where the next ones are."""
    for first in range(0, rows, chunk):
        table = rules.unreadable(min(chunk, rows - first), reject, left.file.uri, left.row + first)
        yield Chunk(left.start, left.start, table, reject)


def _arrow(left: Segment, rules: Rules, chunk: int) -> Iterator[Chunk]:
    rows = left.rows
    for first, table in arrow_rows(left.file.uri, left.start, chunk):
        if rows <= 0:
            return
        table = table.slice(0, rows)
        yield Chunk(first, first + len(table), rules.from_parquet(table, left.file.uri, first))
        rows -= len(table)


def _delimited(left: Segment, rules: Rules, chunk: int, kind: str) -> Iterator[Chunk]:
    rows, row = left.rows, left.row
    known = Delimited(DELIMITERS[kind])
    with open_text(left.file.uri) as stream:
        header, blocks = known.open(stream, left.start)
        for records in known.records(blocks, chunk):
            if rows <= 0:
                return
            table, rejects = known.columns(records, header, rules.names)
            documents = rules.from_parquet(rules.without_blanks(table), left.file.uri, row, rejects).slice(0, rows)
            yield Chunk(records.start, records.start + len(records.data), documents)
            rows, row = rows - len(documents), row + len(documents)


def _json_lines(left: Segment, rules: Rules, chunk: int) -> Iterator[Chunk]:
    rows, row = left.rows, left.row
    compression = format_of(left.file.uri).compression
    with open_text(left.file.uri, compression) as stream:
        if stream.seekable():
            stream.seek(left.start)
        else:
            for start in range(0, left.start, _UNPACKED):
                stream.read(min(_UNPACKED, left.start - start))
        for start, lines in whole_lines(stream, left.start, chunk, left.stop):
            if rows <= 0:
                return
            end = start + len(lines)
            if lines := lines.strip():
                if row == 0 and left.start == 0:  # not at the beginning of a byte range, whose rows count from 0, too
                    check_first_line(lines.partition(b"\n")[0])
                table = rules.from_json(lines, left.file.uri, row).slice(0, rows)
                yield Chunk(start, end, table)
                rows, row = rows - len(table), row + len(table)


def _reject(error: BaseException) -> Reject:
    if isinstance(error, FileNotFoundError):
        return Reject("the file has disappeared")
    if isinstance(error, Damaged):
        return error.reject
    return Reject("cannot be read", " ".join(str(error).split())[:300])
