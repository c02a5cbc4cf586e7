"""The plan of a night: which rows are tagged in which piece, and which rows of the night before are taken over.

It is made once, of what the census has found, and kept: whoever goes on with a night does the same pieces.

Letters: S segments, F files of the input, T files of tags of the night before.

----
The census of a night: one pass over all documents, before the model sees any of them.

It counts the rows and notes where to find them again, rejects what cannot be read, finds ids that come twice, and rows that
the night before has tagged already. What is left to do is cut into pieces, each of which is done as a whole or not at all.

Rows are compared by a 16-byte hash of their ids in tasks that each take the ids of one share of all hashes (a hash join):
neither night has to fit in memory, and no text is kept. A row of either night costs 40 bytes of Ray's object store, which
spills to disk; the driver keeps a byte a row.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from xmc_ray import storage
from xmc_ray.data.documents import Rules, text_digest
from xmc_ray.data.labels import IntArray
from xmc_ray.data.reader import CHUNK, from_row, parts, read_all
from xmc_ray.storage.files import FileInfo

Mask = npt.NDArray[np.bool_]
_READ_PER_PIECE = 32  # rows read for one that is tagged, at most: bounds the rows that a piece passes over
_SEGMENT = pa.struct(
    [
        *(("uri", pa.string()), ("size", pa.int64()), ("version", pa.string())),
        *(("start", pa.int64()), ("row", pa.int64()), ("rows", pa.int64()), ("reason", pa.string())),
    ]
)
_DUPLICATE = pa.struct([("place", pa.int64()), ("file", pa.string()), ("row", pa.int64())])
PIECES = pa.schema(
    [
        *(("number", pa.int64()), ("rows", pa.int64()), ("segments", pa.list_(_SEGMENT))),
        *(("skip", pa.binary()), ("duplicates", pa.list_(_DUPLICATE))),
    ]
)
REUSED = pa.schema([("number", pa.int64()), ("uri", pa.string()), ("rows", pa.int64()), ("keep", pa.binary())])
_TASK_BYTES, _TASK_FILES = 64 << 20, 256  # of input that one task looks at
_SHARE_BYTES = 2 << 30  # of input for one share of the hash join
_RECORD = np.dtype([("id", "<u8", 2), ("text", "<u8", 2), ("file", "<i4"), ("row", "<i8")])


@dataclass(frozen=True)
class Plan:
    """What a night has to do.

    ``pieces`` (`PIECES`): rows to read and tag, in the order of the input. ``skip`` has a bit for each row of the segments, set
    where the night before is good for it (empty: nowhere); ``duplicates`` are places among these rows, with the first row of
    the same id. ``rows`` counts those that are not skipped.

    ``reused`` (`REUSED`): files of the night before and a bit for each of their rows, set where it is taken over.

    ``rows`` is the number of all documents; of files that hold nobody knows how many, one row stands for those not read, and
    ``lost_bytes`` is their size. ``previous`` is the folder of the night that tags are taken from.
    """

    pieces: pa.Table
    reused: pa.Table
    rows: int
    lost_bytes: int
    previous: str | None = None

    @property
    def names(self) -> set[str]:
        """The names of all pieces."""
        tables = {"t": self.pieces, "r": self.reused}
        return {piece_name(kind, number) for kind, table in tables.items() for number in table["number"].to_pylist()}


def piece_name(kind: str, number: int) -> str:
    """Of a piece: ``t`` for rows to tag or ``r`` for reused ones, and its number, such as t000017."""
    return f"{kind}{number:06}"


def unpacked(bits: bytes, rows: int) -> Mask:
    """bool[rows] of a column ``skip`` or ``keep``; all False if it is empty."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=rows).view(bool) if bits else np.zeros(rows, bool)


@dataclass(frozen=True)
class Duplicates:
    """Rows that repeat an id, rising, and the first row of each such id; both count through all files."""

    row: IntArray
    first: IntArray

    @classmethod
    def sort(cls, row: IntArray, first: IntArray) -> "Duplicates":
        """Of rows in any order."""
        order = np.argsort(row)
        return cls(row[order], first[order])


def pack(
    segments: pa.Table, files: Sequence[FileInfo], base_F: IntArray, kept: Mask, doubles: Duplicates, piece_rows: int
) -> pa.Table:
    """`PIECES`: consecutive segments; those of which nothing is left to do are left out.

    ``segments``: file, row, rows, start and reason of each, in order and without a gap; ``base_F``: rows before each file;
    ``kept``: bool, of all rows, those that are taken over.
    """
    file_S, row_S, rows_S = (segments[name].to_numpy() for name in ("file", "row", "rows"))
    first_S = base_F[file_S] + row_S
    todo_S = rows_S - np.add.reduceat(kept, first_S, dtype=np.int64)  # segments follow each other without a gap
    rows = segments.to_pylist()
    pieces: list[dict[str, Any]] = []
    for group in _groups(todo_S.tolist(), rows_S.tolist(), piece_rows):
        where = np.concatenate([np.arange(first_S[s], first_S[s] + rows_S[s]) for s in group])
        skip = kept[where]
        pieces.append(
            {
                "number": len(pieces),
                "rows": int(todo_S[group].sum()),
                "segments": merged([rows[s] | vars(files[file_S[s]]) for s in group]),
                "skip": np.packbits(skip).tobytes() if skip.any() else b"",
                "duplicates": _duplicates(doubles, where, files, base_F),
            }
        )
    return pa.Table.from_pylist(pieces, PIECES)


def _groups(todo_S: list[int], rows_S: list[int], piece_rows: int) -> Iterator[list[int]]:
    """The segments of each piece."""
    group: list[int] = []
    todo = read = 0
    for segment, (more, rows) in enumerate(zip(todo_S, rows_S, strict=True)):
        if not more:
            continue
        if group and (todo + more > piece_rows or read + rows > _READ_PER_PIECE * piece_rows):
            yield group
            group, todo, read = [], 0, 0
        group.append(segment)
        todo, read = todo + more, read + rows
    if group:
        yield group


def merged(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segments of pieces, of which neighbours in one file are made one."""
    whole: list[dict[str, Any]] = []
    for segment in segments:
        last = whole[-1] if whole else None
        if (
            last
            and last["uri"] == segment["uri"]
            and last["row"] + last["rows"] == segment["row"]
            and not (last["reason"] or segment["reason"])
        ):
            last["rows"] += segment["rows"]
        else:
            whole.append(dict(segment))
    return whole


def _duplicates(doubles: Duplicates, where: IntArray, files: Sequence[FileInfo], base_F: IntArray) -> list[dict[str, Any]]:
    inside = slice(*np.searchsorted(doubles.row, [where[0], where[-1] + 1]))
    places, first = np.searchsorted(where, doubles.row[inside]), doubles.first[inside]
    file = np.searchsorted(base_F, first, side="right") - 1
    return [
        {"place": place, "file": files[number].uri, "row": row}
        for place, number, row in zip(places.tolist(), file.tolist(), (first - base_F[file]).tolist(), strict=True)
    ]


def reused(files: Sequence[str], base_T: IntArray, taken: Mask) -> pa.Table:
    """`REUSED`: the files of which rows are taken over; ``taken`` is of the rows of all, ``base_T`` says where each begins."""
    rows = [
        {"uri": uri, "rows": int(taken[first:last].sum()), "keep": np.packbits(taken[first:last]).tobytes()}
        for uri, first, last in zip(files, base_T[:-1].tolist(), base_T[1:].tolist(), strict=True)
    ]
    rows = [row for row in rows if row["rows"]]
    return pa.Table.from_pylist([{"number": number, **row} for number, row in enumerate(rows)], REUSED)


def take_census(files: Sequence[FileInfo], rules: Rules, before: Sequence[str], piece_rows: int, n_pieces: int) -> Plan:
    """Look at all ``files`` and plan the night, in pieces of at most ``piece_rows`` rows to tag, at least ``n_pieces`` if any.

    ``before``: the files of a night whose tags are good for documents that have not changed; none if there is no such night.
    """
    shares = 1 + sum(file.size for file in files) // _SHARE_BYTES
    options = {"num_returns": shares + 1}
    chunk = min(CHUNK, piece_rows)
    scans: list[Any] = [_scan.options(**options).remote(task, rules, shares, chunk, bool(before)) for task in _tasks(files)]
    tags: list[Any] = [_scan_tags.options(**options).remote(number, uri, shares) for number, uri in enumerate(before)]
    segments = pa.concat_tables(ray.get([scan[0] for scan in scans]))
    segments = segments.sort_by([("file", "ascending"), ("row", "ascending")])
    base_F = _bases(segments["file"].to_numpy(), segments["rows"].to_numpy(), len(files))
    base_T = np.concatenate([[0], np.cumsum(ray.get([scan[0] for scan in tags]), dtype=np.int64)])

    kept, taken = np.zeros(base_F[-1], bool), np.zeros(base_T[-1], bool)
    repeated, firsts = [], []
    bases = ray.put((base_F, base_T))
    joins = [_join.remote(bases, len(scans), *(scan[1 + share] for scan in (*scans, *tags))) for share in range(shares)]
    for join in joins:
        same, same_before, double, first = ray.get(join)
        kept |= _unpacked(same, len(kept))
        taken |= _unpacked(same_before, len(taken))
        repeated.append(double)
        firsts.append(first)
    doubles = Duplicates.sort(np.concatenate(repeated), np.concatenate(firsts))
    piece_rows = min(piece_rows, max(chunk, int(len(kept) - kept.sum()) // n_pieces))
    return Plan(
        pieces=pack(segments, files, base_F, kept, doubles, piece_rows),
        reused=reused(before, base_T, taken),
        rows=int(base_F[-1]),
        lost_bytes=_lost_bytes(segments, files),
    )


def _tasks(files: Sequence[FileInfo]) -> Iterator[list[dict[str, Any]]]:
    """The parts of the input, many small ones a task."""
    task: list[dict[str, Any]] = []
    for part in parts(list(files)).to_pylist():
        if task and (len(task) >= _TASK_FILES or sum(other["size"] for other in task) + part["size"] > _TASK_BYTES):
            yield task
            task = []
        task.append(part)
    yield task


@ray.remote
def _scan(task: list[dict[str, Any]], rules: Rules, shares: int, chunk: int, with_texts: bool) -> list[Any]:
    """Segments of the parts of a task, and the records of each share of the ids."""
    segments: list[list[Any]] = []
    records = [np.empty(0, _RECORD)]
    last = None
    for place, (start, end, table, reason) in read_all(map(from_row, task), rules, chunk):
        file, row = task[place]["file"], table["row"][0].as_py()
        if place != last or reason or segments[-1][4] or segments[-1][3] + len(table) > chunk:
            segments.append([file, start, row, 0, reason, start == end])
        segments[-1][3] += len(table)
        last = place
        records.append(_records(table.filter(pc.is_null(table["reason"])), file, with_texts))
    names = ["file", "start", "row", "rows"]
    columns = {name: pa.array([row[place] for row in segments], pa.int64()) for place, name in enumerate(names)}
    columns["reason"] = pa.array([row[4] for row in segments], pa.string())
    columns["uncounted"] = pa.array([row[5] for row in segments], pa.bool_())
    return [pa.table(columns), *_shared(np.concatenate(records), shares)]


@ray.remote
def _scan_tags(number: int, uri: str, shares: int) -> list[Any]:
    """The number of rows of a file of tags, and the records of each share of the ids."""
    table = storage.read_parquet(uri, ["id", "text_digest"])
    record = np.empty(len(table), _RECORD)
    record["id"] = _hashes(table["id"])
    record["text"] = _from_hex(table["text_digest"])
    record["file"], record["row"] = number, np.arange(len(table))
    return [len(table), *_shared(record, shares)]


@ray.remote
def _join(bases: tuple[IntArray, IntArray], n_now: int, *records: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Bits of rows with the same id and text in both nights, of this and of the night before; repeated rows, their firsts."""
    now, before = np.concatenate(records[:n_now]), np.concatenate([np.empty(0, _RECORD), *records[n_now:]])
    row_N, row_B = (base[part["file"]] + part["row"] for base, part in zip(bases, (now, before), strict=True))
    order = np.lexsort((row_N, *now["id"].T))
    now, row_N = now[order], row_N[order]
    is_first = np.ones(len(now), bool)
    is_first[1:] = (now["id"][1:] != now["id"][:-1]).any(1)
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(now)), 0))
    double, first_row = row_N[~is_first], row_N[first[~is_first]]

    now, row_N = now[is_first], row_N[is_first]
    both = np.concatenate([now, before])
    order = np.lexsort(both["id"].T)
    pair = np.flatnonzero((both["id"][order[1:]] == both["id"][order[:-1]]).all(1))
    here, there = np.sort(np.stack([order[pair], order[pair + 1]]), axis=0)
    same = (both["text"][here] == both["text"][there]).all(1)
    return (
        _bits(row_N[here[same]], bases[0][-1]),
        _bits(row_B[there[same] - len(now)], bases[1][-1]),
        double,
        first_row,
    )


def _records(good: pa.Table, file: int, with_texts: bool) -> npt.NDArray[Any]:
    record = np.zeros(len(good), _RECORD)
    record["id"] = _hashes(good["id"])
    if with_texts:
        record["text"] = _from_hex(text_digest(good["text"].combine_chunks()))
    record["file"], record["row"] = file, good["row"].to_numpy()
    return record


def _shared(record: npt.NDArray[Any], shares: int) -> list[npt.NDArray[Any]]:
    share = record["id"][:, 0] % np.uint64(shares)
    order = np.argsort(share, kind="stable")
    return np.split(record[order], np.searchsorted(share[order], np.arange(1, shares)))


def _hashes(texts: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    raw = texts.cast(pa.binary()).to_pylist()
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in raw), "<u8").reshape(-1, 2)


def _from_hex(digests: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(digests.to_pylist())), "<u8").reshape(-1, 2)


def _bits(rows: IntArray, n_rows: int) -> npt.NDArray[np.uint8]:
    mask = np.zeros(n_rows, bool)
    mask[rows] = True
    return np.packbits(mask)


def _unpacked(bits: npt.NDArray[np.uint8], rows: int) -> Mask:
    return np.unpackbits(bits, count=rows).view(bool)


def _bases(file_S: IntArray, rows_S: IntArray, n_files: int) -> IntArray:
    """Where the rows of each file begin, counted through all files; the last entry is their number."""
    return np.concatenate([[0], np.cumsum(np.bincount(file_S, rows_S, minlength=n_files).astype(np.int64))])


def _lost_bytes(segments: pa.Table, files: Sequence[FileInfo]) -> int:
    lost = pc.unique(segments.filter(segments["uncounted"])["file"]).to_pylist()
    return sum(files[file].size for file in lost)
