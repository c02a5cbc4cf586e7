"""Input files: which there are, whether their columns fit, and their rows, chunk by chunk.

Rows that cannot be read are given all the same, with the reason. A chunk says where it starts, so that its rows can be read
again without those before it: at a row of a Parquet file, at a byte of (unpacked) JSON lines. While storage is unavailable,
reading waits, in the middle of a file as well.
"""

import posixpath
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig, Reject, Rules, load_object
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage.files import PATIENCE, FileInfo

PARQUET, JSON_LINES = (".parquet",), (".jsonl", ".jsonl.gz", ".json")
CHUNK = 1024  # most rows of a chunk
_BYTES = 4 << 20  # of JSON lines, read at a time; one bad line takes its chunk from the fast parser to the slow one
_LINE = 256 << 20  # longest line; a longer one is no JSON line but a file of another kind
_SMALL, _AHEAD = 1 << 20, 16  # bytes of a file that is read ahead, and how many are
_PAUSE, _ATTEMPTS = 2.0, 3  # a file on S3 is missing or damaged if it is so several times, some seconds apart
_SAMPLED_FILES, _SAMPLED_LINES = 10, 100  # files, and lines of each, whose columns are looked at before anything runs
_LARGE = 64 << 20  # bytes of a Parquet file that several tasks read
_ALL = 1 << 62  # rows
_FILE = {"uri": pa.string(), "size": pa.int64(), "version": pa.string()}
_SEGMENTS = pa.schema(_FILE | dict.fromkeys(("file", "row", "rows"), pa.int64()))


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
    not read at all.
    """

    file: FileInfo
    start: int = 0
    row: int = 0
    rows: int = _ALL
    reject: Reject | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Segment":
        """From a row of `file_segments`, or from a segment of a piece."""
        file = FileInfo(uri=row["uri"], size=row["size"], version=row["version"])
        reject = None if row.get("reason") is None else Reject(row["reason"], row["detail"])
        return cls(file, row.get("start", row["row"]), row["row"], _ALL if row["rows"] is None else row["rows"], reject)


class _Damaged(Exception):
    """The file holds something that cannot be read."""


def list_inputs(config: DocumentsConfig) -> list[FileInfo]:
    """The files to read, sorted by address; DataError if there are none, or of both kinds."""
    files = storage.list_files(config.uri, (*PARQUET, *JSON_LINES))
    if any(all(file.uri.endswith(suffixes) for file in files) for suffixes in (PARQUET, JSON_LINES)):
        return files
    found = " and ".join(sorted({f"*{posixpath.splitext(file.uri)[1]}" for file in files}))
    expected = f"either *{PARQUET[0]} or *{', *'.join(JSON_LINES)}"
    raise DataError("documents of unknown or different kinds", where=config.uri, found=found, expected=expected)


def check_columns(files: list[FileInfo], rules: Rules) -> None:
    """DataError unless one of the first files that have rows has the columns that are asked for.

    So a wrong setting is reported before anything runs, while one odd file among many passes.
    """
    first: DataError | None = None
    for number, file in enumerate(files):
        if number >= _SAMPLED_FILES and first is not None:
            break
        try:
            found = columns(file)
            problem = rules.problem(file.uri, found) if found else None
            if found and problem is None:
                return
        except (OSError, pa.ArrowException) as error:
            problem = DataError("cannot be read", where=file.uri, found=error)
        first = first or problem
    found_files = f"{len(files)} files without rows"
    raise first or DataError("no documents", where=rules.root, found=found_files, expected="at least one row")


def columns(file: FileInfo) -> dict[str, pa.DataType | None]:
    """The columns of a file and their types, None where each row has its own; empty if it has no rows.

    Raises pyarrow's errors for a file that cannot be read, and for lines without any JSON object among the first.
    """
    filesystem, path = storage.arrow_filesystem(file.uri)
    if file.uri.endswith(PARQUET):
        footer = pq.read_metadata(path, filesystem=filesystem)
        schema = footer.schema.to_arrow_schema()
        return dict(zip(schema.names, schema.types, strict=True)) if footer.num_rows else {}
    with filesystem.open_input_stream(path) as stream:
        _, chunk = next(_whole_lines(stream, 0, CHUNK), (0, b""))
    lines = chunk.strip().split(b"\n")[:_SAMPLED_LINES]
    objects = [value for value in map(load_object, lines) if isinstance(value, dict)]
    if lines != [b""] and not objects:
        found = repr(lines[0][:40].decode(errors="replace"))
        raise pa.ArrowInvalid(f"not JSON lines; found {found}; expected an object on each line")
    return dict.fromkeys(name for value in objects for name in value)


def file_segments(files: list[FileInfo]) -> pa.Table:
    """What one task reads, a row for `Segment.from_row` each: a file, or a row group of a large Parquet file."""
    rows = [
        {**vars(file), "file": number, "row": row, "rows": rows}
        for number, file in enumerate(files)
        for row, rows in (_row_groups(file) if file.uri.endswith(PARQUET) and file.size > _LARGE else [(0, None)])
    ]
    return pa.Table.from_pylist(rows, _SEGMENTS)


def _row_groups(file: FileInfo) -> list[tuple[int, int | None]]:
    """First row and number of rows of each row group; the whole of a file that cannot be read."""
    filesystem, path = storage.arrow_filesystem(file.uri)
    try:
        footer = pq.read_metadata(path, filesystem=filesystem)
    except (OSError, pa.ArrowException):
        return [(0, None)]
    sizes = np.array([footer.row_group(group).num_rows for group in range(footer.num_row_groups)], np.int64)
    return [*zip((sizes.cumsum() - sizes).tolist(), sizes.tolist(), strict=True)]


def read_file(segment: Segment, rules: Rules, chunk: int = CHUNK) -> Iterator[Chunk]:
    """The rows of a segment, at most ``chunk`` at a time: exactly as many as it has, readable or not.

    The file is compared with the listed one before the first row, where a difference makes all of them rejects, and after the
    last one, where it is an error. Raises DataError (`check_unchanged`) for a file that has changed while it was read,
    UnavailableError when its storage does not answer for `PATIENCE` seconds, and ConfigError when it refuses.
    """
    if segment.reject is not None:
        yield _lost(segment, segment.rows, segment.reject, rules)
        return
    reader = _parquet if segment.file.uri.endswith(PARQUET) else _json_lines
    left, is_whole = segment, segment.rows == _ALL
    deadline, failures = time.monotonic() + PATIENCE, 0
    reject = None
    while left.rows:
        try:
            if left == segment and not _is_unchanged(left.file):
                raise _Damaged("the file has changed since it was listed")
            for part in reader(left, rules, chunk):
                if len(part.table):
                    yield part
                left = replace(left, start=part.end, row=left.row + len(part.table), rows=left.rows - len(part.table))
                deadline, failures = time.monotonic() + PATIENCE, 0
            reject = None if is_whole or not left.rows else Reject("the file has fewer rows than before")
            break
        except (OSError, pa.ArrowException, ConfigError, _Damaged) as error:
            failures += 1
            is_unavailable = storage.is_unavailable(error)
            if is_unavailable and time.monotonic() > deadline:
                with storage.explained(left.file.uri):
                    raise
            if isinstance(error, ConfigError) and not is_unavailable:
                raise  # credentials, which is no fault of this file
            may_recover = failures < _ATTEMPTS and not isinstance(error, _Damaged) and not storage.is_local(left.file.uri)
            if is_unavailable or may_recover:
                time.sleep(_PAUSE)
                continue
            reject = _reject(error)
            break
    if left.row > segment.row:
        check_unchanged(segment.file)
    if reject is not None:  # an unknown number of rows counts as one, lest it be overlooked
        yield _lost(left, 1 if is_whole else left.rows, reject, rules)


def check_unchanged(file: FileInfo) -> None:
    """DataError unless a file, some of whose rows have been read, is still as it was listed: they may be of two versions.

    pyarrow's requests to S3 name no version, so this is what holds the parts of a file together there.
    """
    try:
        is_unchanged = storage.patiently(_is_unchanged, file)
    except FileNotFoundError:
        is_unchanged = False
    if not is_unchanged:
        raise DataError(
            "a file has changed while it was read",
            where=file.uri,
            way_out="run again once its writers are done; a night needs --overwrite then",
        )


def _is_unchanged(file: FileInfo) -> bool:
    now = storage.stat(file.uri)
    return (now.size, now.version) == (file.size, file.version)


def read_all(segments: Iterable[Segment], rules: Rules, chunk: int = CHUNK) -> Iterator[tuple[int, Chunk]]:
    """The chunks of segments, one after the other, each with the number of its segment.

    Small files are read ahead, several at a time, since on object storage most of their time is waiting.
    """
    waiting: deque[tuple[int, Iterator[Chunk] | Future[list[Chunk]]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        for number, segment in enumerate(segments):
            chunks = read_file(segment, rules, chunk)
            waiting.append((number, pool.submit(list, chunks) if segment.file.size <= _SMALL else chunks))
            while len(waiting) > _AHEAD:
                yield from _next(waiting)
        while waiting:
            yield from _next(waiting)


def _next(waiting: "deque[tuple[int, Iterator[Chunk] | Future[list[Chunk]]]]") -> Iterator[tuple[int, Chunk]]:
    number, chunks = waiting.popleft()
    for part in chunks.result() if isinstance(chunks, Future) else chunks:
        yield number, part


def read_rows(config: DocumentsConfig, *, labelled: bool) -> Iterator[pa.Table]:
    """The usable rows of all files, chunk by chunk, in this process; those with a reason are left out.

    DataError as in `list_inputs` and `check_columns`, and for a file that cannot be read.
    """
    files, rules = list_inputs(config), Rules.of(config, labelled=labelled)
    check_columns(files, rules)
    for file in files:
        for chunk in read_file(Segment(file), rules):
            if chunk.reject is not None:
                raise DataError("cannot read documents", where=file.uri, found=chunk.reject)
            yield chunk.table.filter(pc.is_null(chunk.table["reason"]))


def _parquet(left: Segment, rules: Rules, chunk: int) -> Iterator[Chunk]:
    """After a row group that cannot be read the next one is tried."""
    filesystem, path = storage.arrow_filesystem(left.file.uri)
    with filesystem.open_input_file(path) as stream:
        file = pq.ParquetFile(stream, pre_buffer=True)
        schema, total = file.schema_arrow, file.metadata.num_rows
        problem = rules.problem(left.file.uri, dict(zip(schema.names, schema.types, strict=True)))
        stop = min(total, left.start + left.rows)
        if problem is not None:
            yield _lost(left, stop - left.start, Reject(problem.what, f"found {problem.found}"), rules)._replace(end=stop)
            return
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for group, end in enumerate(np.cumsum(sizes, dtype=np.int64).tolist()):
            at, last = end - sizes[group], min(end, stop)
            if at >= stop or end <= left.start:
                continue
            done = max(at, left.start)
            try:
                for batch in file.iter_batches(chunk, row_groups=[group], columns=rules.names, use_threads=False):
                    first, at = at, at + len(batch)
                    if at <= done or done >= last:
                        continue
                    rows = pa.Table.from_batches([batch]).slice(done - first, min(at, last) - done)
                    yield Chunk(done, done + len(rows), rules.from_parquet(rows, left.file.uri, done))
                    done += len(rows)
            except (OSError, pa.ArrowException) as error:
                if storage.is_unavailable(error):
                    raise
                yield _lost(replace(left, start=done, row=done), last - done, _reject(error), rules)._replace(end=last)


def _lost(left: Segment, rows: int, reject: Reject, rules: Rules) -> Chunk:
    """The first ``rows`` rows of ``left``, unread; ``end`` is ``start``, since it is unknown where the next ones are."""
    return Chunk(left.start, left.start, rules.unreadable(rows, reject, left.file.uri, left.row), reject)


def _json_lines(left: Segment, rules: Rules, chunk: int) -> Iterator[Chunk]:
    filesystem, path = storage.arrow_filesystem(left.file.uri)
    rows, row = left.rows, left.row
    packed = left.file.uri.endswith(".gz")
    with filesystem.open_input_stream(path) if packed else filesystem.open_input_file(path) as stream:
        if packed:
            for start in range(0, left.start, _BYTES):
                stream.read(min(_BYTES, left.start - start))
        else:
            stream.seek(left.start)
        for start, lines in _whole_lines(stream, left.start, chunk):
            if rows <= 0:
                return
            end = start + len(lines)
            if lines := lines.strip():
                table = rules.from_json(lines, left.file.uri, row).slice(0, rows)
                yield Chunk(start, end, table)
                rows, row = rows - len(table), row + len(table)


def _whole_lines(stream: Any, start: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Up to ``count`` lines at a time, newlines included (the last may lack its own), and the byte at which they start."""
    rest = b""
    while data := stream.read(_BYTES):
        head, newline, rest = (rest + data).rpartition(b"\n")
        for lines in _cut(head + newline, count):
            yield start, lines
            start += len(lines)
        if len(rest) > _LINE:
            raise _Damaged(f"a line of more than {_LINE >> 20} MiB")
    if rest:
        yield start, rest


def _cut(lines: bytes, count: int) -> Iterator[bytes]:
    """``lines`` in pieces of ``count`` lines."""
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))[count - 1 :: count] + 1
    starts = [0, *ends.tolist()]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if start < end:
            yield lines[start:end]


def _reject(error: BaseException) -> Reject:
    if isinstance(error, FileNotFoundError):
        return Reject("the file has disappeared")
    if isinstance(error, _Damaged):
        return Reject(str(error))
    return Reject("cannot be read", " ".join(str(error).split())[:300])
