"""Input files: which there are, whether their columns fit, and their rows, chunk by chunk.

Rows that cannot be read are given all the same, with the reason. A chunk says where it starts, so that its rows can be read
again without those before it: at a row of a Parquet file, at a byte of (unpacked) JSON lines. While storage is unavailable,
reading waits, in the middle of a file as well.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig, Reject, Rules, load_object
from xmc_ray.data.inputs import format_by_name, format_of, list_inputs, mark_length, open_text
from xmc_ray.data.rejects import MAX_REJECT_SHARE, Rejects
from xmc_ray.errors import ConfigError, DataError
from xmc_ray.storage.files import PATIENCE, FileInfo

CHUNK = 1024  # most rows of a chunk
_BYTES = 4 << 20  # of JSON lines, read at a time; one bad line takes its chunk from the fast parser to the slow one
_LINE = 256 << 20  # longest line; a longer one is no JSON line but a file of another kind
_SMALL, _AHEAD = 1 << 20, 16  # bytes of a file that is read ahead, and how many are
_PAUSE, _ATTEMPTS = 2.0, 3  # a file on S3 is missing or damaged if it is so several times, some seconds apart
_SAMPLED_LINES = 100  # of a file, whose columns are looked at first
_LOOK_FILES, _LOOK_BYTES = 1000, 1 << 30  # files, and bytes of lines, that are searched for a column before anything runs
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

    def lost_with(self, chunk: Chunk) -> int:
        """The bytes that are lost with a chunk of this segment: the file's, if it is rejected without a number of rows."""
        return self.file.size if self.rows == _ALL and chunk.reject is not None and chunk.start == chunk.end else 0


class _Damaged(Exception):
    """The file holds something that cannot be read."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(str(Reject(reason, detail)))
        self.reject = Reject(reason, detail)


def check_columns(files: list[FileInfo], rules: Rules) -> None:
    """DataError unless each column that is asked for is in one of the files, with a type that fits.

    A file that has it otherwise is an odd file, and no proof of a wrong setting, so the others are searched as well, up to
    `_LOOK_FILES` files and `_LOOK_BYTES` of JSON lines. If more are left then, labels and series may still come.
    """
    left = dict.fromkeys(rules.columns)
    unreadable: DataError | None = None
    any_rows, is_whole, bytes_left = False, True, _LOOK_BYTES
    for number, file in enumerate(files):
        if number >= _LOOK_FILES or bytes_left < 0 or not is_whole:
            is_whole = False
            break
        try:
            found, is_whole = columns(file, rules.names)
        except (OSError, pa.ArrowException, _Damaged) as error:
            if storage.is_unavailable(error):
                with storage.explained(file.uri):
                    raise
            unreadable = unreadable or DataError("cannot be read", where=file.uri, found=error)
            continue
        any_rows = any_rows or bool(found)
        problems = rules.problems(file.uri, found) if found else left
        left = {column: error or problems[column] for column, error in left.items() if column in problems}
        if not left:
            return
        bytes_left -= 0 if _is_parquet(file) else file.size
    if not is_whole and not any(setting in ("id", "text") for setting, _ in left):
        return
    for problem in (*left.values(), unreadable):
        if problem is not None:
            raise problem
    if not any_rows:
        found_files = f"{len(files)} files without rows"
        raise DataError("no documents", where=rules.root, found=found_files, expected="at least one row")


def columns(file: FileInfo, wanted: Sequence[str]) -> tuple[list[tuple[str, pa.DataType | None]], bool]:
    """The columns of a file and their types, None where each row has its own; none if it has no rows.

    JSON lines are read until all ``wanted`` keys have come; false if they have not within `_LOOK_BYTES`. Raises pyarrow's
    errors and `_Damaged` for a file that cannot be read, such as one without any JSON object.
    """
    known = format_of(file.uri)
    if known.is_parquet:
        filesystem, path = storage.arrow_filesystem(file.uri)
        footer = pq.read_metadata(path, filesystem=filesystem)
        schema = footer.schema.to_arrow_schema()
        return [*zip(schema.names, schema.types, strict=True)] if footer.num_rows else [], True
    spelled = {name: {json.dumps(name, ensure_ascii=ascii).encode() for ascii in (True, False)} for name in wanted}
    found: dict[str, None] = {}
    first_line, start = b"", 0
    with open_text(file.uri, known.compression) as stream:
        for start, chunk in whole_lines(stream, 0, CHUNK):
            lines = chunk.split(b"\n")
            first_line = first_line or next(filter(None, map(bytes.strip, lines)), b"")
            if not found:
                found |= _keys(lines[:_SAMPLED_LINES])
            missing = [spelling for name in wanted if name not in found for spelling in spelled[name]]
            if not missing or start > _LOOK_BYTES:
                break
            if any(spelling in chunk for spelling in missing):
                found |= _keys(line for line in lines if any(spelling in line for spelling in missing))
    if first_line and not found:
        begins = f"{first_line[:40].decode(errors='replace')!r}, {load_object(first_line)}"
        raise _Damaged("not JSON lines", f"found {begins}; expected an object on each line")
    return [(name, None) for name in found], start <= _LOOK_BYTES or found.keys() >= {*wanted}


def _keys(lines: Iterable[bytes]) -> dict[str, None]:
    """The keys of the objects in lines, in order of appearance."""
    objects = (value for value in map(load_object, lines) if not isinstance(value, Reject))
    return dict.fromkeys(name for value in objects for name in value)


def file_segments(files: list[FileInfo]) -> pa.Table:
    """What one task reads, a row for `Segment.from_row` each: a file, or a row group of a large Parquet file."""
    rows = [
        {**vars(file), "file": number, "row": row, "rows": rows}
        for number, file in enumerate(files)
        for row, rows in (_row_groups(file) if file.size > _LARGE and _is_parquet(file) else [(0, None)])
    ]
    return pa.Table.from_pylist(rows, _SEGMENTS)


def _is_parquet(file: FileInfo) -> bool:
    known = format_by_name(file.uri)
    return known is not None and known.is_parquet


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
    left, is_whole = segment, segment.rows == _ALL
    deadline, failures = time.monotonic() + PATIENCE, 0
    reject = None
    while left.rows:
        try:
            if left == segment and not _is_as_listed(left.file):
                raise _Damaged("the file has changed since it was listed")
            known = format_of(left.file.uri)
            for part in (_parquet if known.is_parquet else _json_lines)(left, rules, chunk):
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

    Small files are read ahead, several at a time, since on object storage most of their time is waiting.
    """
    waiting: deque[tuple[int, Iterator[Chunk] | Future[list[Chunk]]]] = deque()
    pool = ThreadPoolExecutor(_AHEAD)
    try:
        for number, segment in enumerate(segments):
            chunks = read_file(segment, rules, chunk)
            waiting.append((number, pool.submit(list, chunks) if segment.file.size <= _SMALL else chunks))
            while len(waiting) > _AHEAD:
                yield from _next(waiting)
        while waiting:
            yield from _next(waiting)
    finally:  # without waiting: a thread that happens to collect what somebody has left early might wait for itself
        pool.shutdown(wait=False, cancel_futures=True)


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


def _parquet(left: Segment, rules: Rules, chunk: int) -> Iterator[Chunk]:
    """After a row group that cannot be read the next one is tried."""
    filesystem, path = storage.arrow_filesystem(left.file.uri)
    with filesystem.open_input_file(path) as stream:
        file = pq.ParquetFile(stream, pre_buffer=True)
        stop = min(file.metadata.num_rows, left.start + left.rows)
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
    rows, row = left.rows, left.row
    compression = format_of(left.file.uri).compression
    with open_text(left.file.uri, compression) as stream:
        if stream.seekable():
            stream.seek(left.start)
        else:
            for start in range(0, left.start, _BYTES):
                stream.read(min(_BYTES, left.start - start))
        for start, lines in whole_lines(stream, left.start, chunk):
            if rows <= 0:
                return
            end = start + len(lines)
            if lines := lines.strip():
                if row == 0 and lines.startswith(b"["):
                    _refuse_array(lines.partition(b"\n")[0])
                table = rules.from_json(lines, left.file.uri, row).slice(0, rows)
                yield Chunk(start, end, table)
                rows, row = rows - len(table), row + len(table)


def _refuse_array(line: bytes) -> None:
    """_Damaged if a file's first line begins an array of objects: its one row would hide how many documents there are."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # the array goes on in further lines
        value = [{}]
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        raise _Damaged("not JSON lines", "one array; expected an object on each line")


def whole_lines(stream: Any, start: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Up to ``count`` lines at a time, newlines included (the last may lack its own), and the byte at which they start.

    A byte order mark of UTF-8 is passed over; _Damaged for one of another encoding.
    """
    rest, is_first = b"", start == 0
    while data := stream.read(_BYTES):
        if is_first:
            try:
                start = mark_length(data)
            except DataError as error:
                raise _Damaged(error.what, str(error.found)) from None
            data, is_first = data[start:], False
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
        return error.reject
    return Reject("cannot be read", " ".join(str(error).split())[:300])
