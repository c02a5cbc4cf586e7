"""Records of CSV and TSV, quoted as RFC 4180 has it: cut out of a stream as whole records, then their cells as columns.

A quoted cell may hold newlines. So where a record begins is only known to who has read all before it, and a file is read by
one task. A record that is quoted wrongly is one line, a reject, and reading goes on with the next line: none is lost.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from xmc_ray.data.inputs import mark_length, open_text
from xmc_ray.data.labels import IntArray
from xmc_ray.data.rejects import Damaged, Reject
from xmc_ray.errors import DataError

DELIMITERS = {"csv": ",", "tsv": "\t"}

_BYTES, _HEAD = 4 << 20, 1 << 16  # read at a time; and for the header, which every segment of a file reads
_RECORD = 16 << 20  # longest record; a quote that is still open then is taken for one that is never closed
_QUOTE, _NEWLINE, _RETURN = b'"\n\r'
_BAD_QUOTES = Reject("invalid quotes", "a quote that is not closed, or text behind one that is")


class Records(NamedTuple):
    """Consecutive records: ``data``, from byte ``start`` of the file on; where each ends in it; whether it is damaged."""

    start: int
    data: bytes
    ends: IntArray
    is_damaged: Sequence[bool]


class Header(NamedTuple):
    """The names of a file's columns, and the byte at which its first record starts."""

    names: list[str]
    end: int


@dataclass(frozen=True)
class Delimited:
    """How records of one delimiter, a character of ASCII, are read."""

    delimiter: str

    def open(self, stream: Any, start: int) -> tuple[Header, Iterator[tuple[int, bytes]]]:
        """The header of a file, and blocks of its bytes from byte ``start`` on, or from the first record, with their places.

        ``stream`` is at its beginning. `Damaged` for a header that is too long or not UTF-8.
        """
        head, ends, first = b"", np.zeros(0, np.int64), 0
        while not len(ends) and len(head) <= _RECORD:
            data = stream.read(min(_HEAD, _BYTES))
            head += data
            first = _mark(head)
            ends, _ = self.ends(head[first:], is_last=not data)
            if not data:
                break
        if head[first:] and not len(ends):
            raise Damaged("no header", f"a first record of more than {_RECORD >> 20} MiB")
        header = self._header(head, first, int(ends[0]) if len(ends) else 0)
        start = max(start, header.end)
        return header, _blocks(stream, head, start)

    def _header(self, head: bytes, first: int, length: int) -> Header:
        record = _without_newline(head[first : first + length])
        cells = self._cells(record) if length else []
        if cells is None:
            raise Damaged("invalid quotes in the header", f"{record[:40]!r}")
        if any(_lone_return(cell) for cell in cells):  # else all of the file would be its header
            raise Damaged("lines end in carriage returns", "expected line feeds, or both")
        try:
            return Header([cell.decode() for cell in cells], first + length)
        except UnicodeDecodeError:
            raise Damaged("the header is not UTF-8", f"{record[:40]!r}") from None

    def records(self, blocks: Iterator[tuple[int, bytes]], count: int) -> Iterator[Records]:
        """All records of ``blocks``, up to ``count`` at a time, blank lines included."""
        rest = b""
        for start, data in blocks:
            rest, at = rest + data, start - len(rest)
            ends, is_damaged = self.ends(rest, is_last=not data)
            done = 0
            for first in range(0, len(ends), count):
                part = slice(first, first + count)
                end = int(ends[part][-1])
                yield Records(at + done, rest[done:end], ends[part] - done, is_damaged[part])
                done = end
            rest = rest[done:]
            if len(rest) > _RECORD + _BYTES:
                raise Damaged(f"a record of more than {_RECORD >> 20} MiB")

    def ends(self, data: bytes, *, is_last: bool) -> tuple[IntArray, Sequence[bool]]:
        """Where each whole record of ``data`` ends, newline included, and whether it is damaged; nothing follows the last."""
        fast = self._ends_at_once(data, is_last)
        return self._ends_one_by_one(data, is_last) if fast is None else (fast, [False] * len(fast))

    def _ends_at_once(self, data: bytes, is_last: bool) -> IntArray | None:
        """None if a quote stands where RFC 4180 has none, or if one may never be closed."""
        bytes_ = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(bytes_ == _NEWLINE) + 1
        quotes = np.flatnonzero(bytes_ == _QUOTE)
        if len(quotes):
            around = np.concatenate([[_NEWLINE], bytes_, [_NEWLINE]])
            before, after = around[quotes[::2]], around[quotes[1::2] + 2]
            delimiter = ord(self.delimiter)
            if not (np.isin(before, [delimiter, _NEWLINE, _QUOTE]).all()):
                return None
            if not np.isin(after, [delimiter, _NEWLINE, _RETURN, _QUOTE]).all() or _lone_return(data):
                return None
            ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
            is_open = len(quotes) % 2 == 1
            if is_open and (is_last or len(data) - (ends[-1] if len(ends) else 0) > _RECORD):
                return None
        if is_last and len(data) > (ends[-1] if len(ends) else 0):
            ends = np.append(ends, len(data))
        return ends

    def _ends_one_by_one(self, data: bytes, is_last: bool) -> tuple[IntArray, list[bool]]:
        """The slow twin of `_ends_at_once`, for quotes of any kind."""
        if not is_last:
            data = data.removesuffix(b"\r")  # of which it is not known yet whether it ends a record
        ends: list[int] = []
        is_damaged: list[bool] = []
        place = 0
        while place < len(data):
            found = self._record.match(data, place)
            if not is_last and self._may_go_on(data, place, found):
                break
            place = found.end() if found else data.find(b"\n", place) + 1 or len(data)
            ends.append(place)
            is_damaged.append(not found)
        return np.array(ends, np.int64), is_damaged

    def _may_go_on(self, data: bytes, place: int, found: re.Match[bytes] | None) -> bool:
        """Whether what begins at ``place`` is no whole record yet, but may become one."""
        if found:
            return not found[0].endswith(b"\n")
        is_open = self._open.match(data, place) is not None or data.find(b"\n", place) < 0
        return is_open and len(data) - place <= _RECORD

    def columns(self, records: Records, header: Header, wanted: Sequence[str]) -> tuple[pa.Table, list[Reject | None] | None]:
        """The columns ``wanted``, as far as the header has them, as bytes, null in rejects; and the rejects, None for none.

        A row a record, without blank lines; a doubled column comes as often as it is there, and the first if none is wanted.
        """
        places = [place for place, name in enumerate(header.names) if name in wanted] or [0]
        fast = self._table_at_once(records, header, places)
        table, rejects = fast or self._table_one_by_one(records, header, places)
        return table.rename_columns([header.names[place] for place in places]), rejects

    def _table_at_once(
        self, records: Records, header: Header, places: Sequence[int]
    ) -> tuple[pa.Table, list[Reject | None] | None] | None:
        """None if a record is damaged, or would be read otherwise by Arrow, to which a lone carriage return ends a line."""
        if any(records.is_damaged) or _lone_return(records.data):
            return None
        wrong: dict[int, Reject] = {}

        def skip(row: pyarrow.csv.InvalidRow) -> str:
            wrong[row.number - 1] = _wrong_width(row.actual_columns, row.expected_columns)
            return "skip"

        names = [str(place) for place in range(len(header.names))]
        reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=len(records.data) + 1, column_names=names)
        parsing = pyarrow.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=skip)
        converting = pyarrow.csv.ConvertOptions(
            include_columns=[str(place) for place in places],
            column_types=dict.fromkeys(names, pa.binary()),
            strings_can_be_null=False,
        )
        table = pyarrow.csv.read_csv(pa.BufferReader(records.data), reading, parsing, converting).combine_chunks()
        if not wrong:
            return table, None
        n_rows = len(table) + len(wrong)
        is_good = np.ones(n_rows, bool)
        is_good[[*wrong]] = False
        taken = pc.if_else(pa.array(is_good), pa.array(np.cumsum(is_good) - 1), pa.scalar(None, pa.int64()))
        return table.take(taken), [wrong.get(row) for row in range(n_rows)]

    def _table_one_by_one(
        self, records: Records, header: Header, places: Sequence[int]
    ) -> tuple[pa.Table, list[Reject | None] | None]:
        """The slow twin of `_table_at_once`, for records of any kind."""
        rows: list[list[bytes | None]] = []
        rejects: list[Reject | None] = []
        first = 0
        for end, is_damaged in zip(records.ends.tolist(), records.is_damaged, strict=True):
            record, first = _without_newline(records.data[first:end]), end
            if not record:
                continue
            cells = None if is_damaged else self._cells(record)
            if cells is None:
                rejects.append(_BAD_QUOTES)
            else:
                is_wrong = len(cells) != len(header.names)
                rejects.append(_wrong_width(len(cells), len(header.names)) if is_wrong else None)
            rows.append([None] * len(places) if rejects[-1] or cells is None else [cells[place] for place in places])
        columns = zip(*rows, strict=True) if rows else ([] for _ in places)
        table = pa.table([pa.array(column, pa.binary()) for column in columns], [str(place) for place in places])
        return table, rejects if any(rejects) else None

    def _cells(self, record: bytes) -> list[bytes] | None:
        """The cells of a record without its newline; None if it is damaged."""
        if not self._record.fullmatch(record):
            return None
        cells = [match[1] for match in self._cell.finditer(self.delimiter.encode() + record)]
        return [cell[1:-1].replace(b'""', b'"') if cell.startswith(b'"') else cell for cell in cells]

    @cached_property
    def _record(self) -> re.Pattern[bytes]:
        cell = self._any_cell
        return re.compile(b"(?:%s)(?:%s(?:%s))*(?:\r?\n|\\Z)" % (cell, self._escaped, cell))

    @cached_property
    def _open(self) -> re.Pattern[bytes]:
        """A record that ends with the data inside quotes, or with a quote that may be the first of two."""
        return re.compile(b'(?:(?:%s)%s)*"[^"]*(?:""[^"]*)*"?\\Z' % (self._any_cell, self._escaped))

    @cached_property
    def _cell(self) -> re.Pattern[bytes]:
        return re.compile(b"%s(%s)" % (self._escaped, self._any_cell))

    @property
    def _any_cell(self) -> bytes:
        return b'"[^"]*(?:""[^"]*)*"|(?!")(?:[^%s\r\n]|\r(?!\n))*' % self._escaped

    @property
    def _escaped(self) -> bytes:
        return re.escape(self.delimiter.encode())


def delimited_columns(uri: str, kind: str) -> list[str]:
    """The columns of a file of ``kind`` "csv" or "tsv", none if it has no rows; `Damaged` if it has no header."""
    known = Delimited(DELIMITERS[kind])
    with open_text(uri) as stream:
        header, blocks = known.open(stream, 0)
        has_rows = any(records.data.strip(b"\r\n") for records in known.records(blocks, 1 << 16))
    return header.names if has_rows else []


def _blocks(stream: Any, head: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Bytes from ``start`` on of a stream of which ``head`` has been read, with their places; the last block is empty."""
    place = start
    if start >= len(head) and stream.seekable():
        stream.seek(start)
    else:
        left = start - len(head)
        while left > 0 and (passed := stream.read(min(left, _BYTES))):
            left -= len(passed)
        if data := head[start:]:
            yield place, data
            place += len(data)
    while data := stream.read(_BYTES):
        yield place, data
        place += len(data)
    yield place, b""


def _mark(data: bytes) -> int:
    try:
        return mark_length(data)
    except DataError as error:
        raise Damaged(error.what, str(error.found)) from None


def _lone_return(data: bytes) -> bool:
    return data.count(b"\r") != data.count(b"\r\n")


def _without_newline(record: bytes) -> bytes:
    return record.removesuffix(b"\n").removesuffix(b"\r") if record.endswith(b"\n") else record


def _wrong_width(found: int, expected: int) -> Reject:
    return Reject("wrong number of columns", f"{found}, and {expected} in the header")
