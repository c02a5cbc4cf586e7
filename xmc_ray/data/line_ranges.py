"""Lines of files of JSON lines: whole, however the file is read, and by byte ranges, so that several tasks share a large file.

A range has the lines that begin in it: ranges that follow each other have every line once, wherever they are cut.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from xmc_ray.data.inputs import format_by_name, format_of, mark_length, open_text
from xmc_ray.data.rejects import Damaged
from xmc_ray.errors import DataError
from xmc_ray.storage.listing import FileInfo

LARGE = 64 << 20  # bytes of a file that several tasks read, and about as many that one task reads of it
_BYTES, _TAIL = 4 << 20, 1 << 16  # read at a time; and first of all of what lies beyond a range
_LINE = 256 << 20  # longest line; a longer one is no JSON line but a file of another kind
_HEAD = 4096  # bytes that show how a file begins


def line_ranges(file: FileInfo) -> list[tuple[int, int | None]]:
    """Start and stop of the byte ranges of a file, each of about `LARGE` bytes; (0, None), all of it, if it is not split.

    A smaller file is not, nor is a packed one, nor one that is rejected as a whole because of how it begins.
    """
    count = -(-file.size // LARGE)
    if count < 2 or not _can_be_split(file):
        return [(0, None)]
    bounds = [file.size * number // count for number in range(count + 1)]
    return [*itertools.pairwise(bounds)]


def _can_be_split(file: FileInfo) -> bool:
    try:
        if format_of(file.uri) != ("json", None):
            return False
        with open_text(file.uri) as stream:
            head = stream.read(_HEAD)
        return head[mark_length(head) :].lstrip()[:1] not in (b"", b"[")
    except (OSError, DataError):  # whoever reads it says why
        return False


def packed_notice(files: Sequence[FileInfo]) -> str | None:
    """A line on the large files that cannot be split because they are packed, if there are any, and one on those of CSV."""
    large = [(file, known) for file in files if file.size > LARGE and (known := format_by_name(file.uri))]
    packed = [file for file, known in large if known.compression]
    whole = [file for file, known in large if known.kind in ("csv", "tsv") and not known.compression]
    unpacking = (
        "every task that needs rows of one unpacks it from its start, so unpack them, or pack them as more and smaller files"
    )
    lines = [_notice("packed", packed, unpacking)] if packed else []
    if whole:
        way_out = "one task reads each from its start, so cut them into smaller files, or write Parquet"
        lines.append(_notice("a record of CSV or TSV may have newlines", whole, way_out))
    return "\n".join(lines) or None


def _notice(reason: str, files: Sequence[FileInfo], consequence: str) -> str:
    largest = max(files, key=lambda file: file.size)
    count = f"{len(files):,} files of more than {LARGE >> 20} MiB, the largest {largest.uri} ({largest.size:,} bytes)"
    return f"cannot be split, since {reason}: {count}; {consequence}"


def check_first_line(line: bytes) -> None:
    """Damaged if a file's first line has more than one object: its one row would hide how many documents there are.

    It may begin an array of them, or carriage returns may stand where newlines should.
    """
    if line.startswith(b"["):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # the array goes on in further lines
            value = [{}]
        if isinstance(value, list) and any(isinstance(part, dict) for part in value):
            raise Damaged("not JSON lines", "one array; expected an object on each line")
    elif any(next_.lstrip().startswith(b"{") for next_ in line.split(b"\r")[1:]) and not _is_object(line):
        raise Damaged("lines end in carriage returns", "expected line feeds, or both")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def whole_lines(stream: Any, start: int, count: int, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Up to ``count`` lines at a time, newlines included (the last may lack its own), and the byte at which they start.

    ``stream`` is at byte ``start``. With ``stop``, the lines that begin before it are given; the stream has to be seekable
    then, since the first one is that which begins at ``start`` or after it. A byte order mark of UTF-8 is passed over;
    `Damaged` for one of another encoding.
    """
    if stop is not None and start:
        start = _next_line(stream, start, stop)
    rest, is_first = b"", start == 0
    while (stop is None or start < stop) and (data := stream.read(_size(start + len(rest), stop, rest))):
        if is_first:
            try:
                start = mark_length(data)
            except DataError as error:
                raise Damaged(error.what, str(error.found)) from None
            data, is_first = data[start:], False
        head, newline, rest = (rest + data).rpartition(b"\n")
        for lines in _cut(_until(head + newline, start, stop), count):
            yield start, lines
            start += len(lines)
        if len(rest) > _LINE:
            raise Damaged(f"a line of more than {_LINE >> 20} MiB")
    if rest and (stop is None or start < stop):
        yield start, rest


def _size(position: int, stop: int | None, rest: bytes) -> int:
    """Bytes to read: no more than the range has, and then a little at first, since all that is wanted is the end of a line."""
    if stop is None:
        return _BYTES
    return min(_BYTES, stop - position if position < stop else max(_TAIL, len(rest)))


def _next_line(stream: Any, start: int, stop: int) -> int:
    """Where the first line begins that begins at ``start`` or after it; not before ``stop`` if none does before it."""
    position, size = start - 1, _TAIL
    stream.seek(position)
    while position < stop and (data := stream.read(min(size, stop - position))):
        before, newline, _ = data.partition(b"\n")
        position += len(before) + len(newline)
        if newline:
            stream.seek(position)
            return position
        size = min(2 * size, _BYTES)
    return max(position, stop)


def _until(lines: bytes, start: int, stop: int | None) -> bytes:
    """Those of ``lines``, the first of which starts at ``start``, that begin before ``stop``."""
    if stop is None or start + len(lines) <= stop:
        return lines
    return lines[: lines.index(b"\n", max(stop - 1 - start, 0)) + 1]


def _cut(lines: bytes, count: int) -> Iterator[bytes]:
    """``lines`` in pieces of ``count`` lines."""
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))[count - 1 :: count] + 1
    starts = [0, *ends.tolist()]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if start < end:
            yield lines[start:end]
