"""The plan of a night: which rows are tagged in which piece, and which rows of the night before are reused.

It is made once, from what `scan` knows of the input, and kept in the night's folder, so that a resumed night does the same
pieces, even if the input has changed.

Letters: S segments, F files of the input, T files of tags of the night before.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from xmc_ray import storage
from xmc_ray.data.labels import IntArray
from xmc_ray.errors import DataError
from xmc_ray.storage.files import write_parquet
from xmc_ray.storage.listing import FileInfo

Mask = npt.NDArray[np.bool_]

_READ_PER_PIECE = 32  # rows read for one that is tagged, at most: bounds the rows that a piece passes over
_TASK = 8  # neighbouring pieces that one task reads, if they are of several parts
_SHARE = 6  # of the least number of pieces that keeps actors busy, as many as one task reads: two tasks an actor at least
_INT, _STRING, _BITS, _INTS = pa.int64(), pa.string(), pa.binary(), pa.list_(pa.int64())
_FILE_VERSION = {"uri": _STRING, "size": _INT, "version": _STRING}
_SEGMENT = pa.struct(_FILE_VERSION | {"start": _INT, "row": _INT, "rows": _INT, "reason": _STRING, "detail": _STRING})
_REPEATS = pa.struct({"place": _INTS, "row": _INTS, "file": _INTS, "files": pa.list_(_STRING)})
PIECES = pa.schema(
    {"number": _INT, "task": _INT, "rows": _INT, "segments": pa.list_(_SEGMENT), "skip": _BITS, "repeats": _REPEATS}
)
REUSED = pa.schema({"number": _INT} | _FILE_VERSION | {"rows": _INT, "keep": _BITS})
_FILE, _PIECES, _REUSED = "plan.json", "pieces-to-do.parquet", "reused.parquet"


@dataclass(frozen=True)
class Plan:
    """The work of a night.

    ``pieces`` (`PIECES`): rows to read and tag, in the order of the input; those of a ``task`` are read in one go. ``skip`` has
    a bit for each row of the segments, set where the tags of the night before are reused (empty: nowhere); ``repeats`` are the
    rows that repeat an id: the ``place`` of each among these rows, rising, and the ``row`` and ``file`` (a number in ``files``)
    of the first row with its id. ``rows`` counts those that are not skipped.

    ``reused`` (`REUSED`): files of the night before and a bit for each of their rows, set where it is reused.

    ``rows`` is the number of all documents, ``to_tag`` of those that are neither reused nor known to be rejects. A file whose
    row count is unknown counts as one row, and ``lost_bytes`` is the size of such files. ``previous`` is the folder of the
    night whose tags are reused, ``not_reused`` why those that were asked for are not.
    """

    pieces: pa.Table
    reused: pa.Table
    rows: int
    lost_bytes: int
    to_tag: int
    previous: str | None = None
    not_reused: str | None = None

    @property
    def names(self) -> set[str]:
        """The names of all pieces."""
        tables = {"t": self.pieces, "r": self.reused}
        return {piece_name(kind, number) for kind, table in tables.items() for number in table["number"].to_pylist()}

    def tasks(self, done: Container[str]) -> list[pa.Table]:
        """The pieces to tag without those whose names are in ``done``, a table for each task."""
        is_left = [piece_name("t", number) not in done for number in self.pieces["number"].to_pylist()]
        left = self.pieces.filter(pa.array(is_left, pa.bool_()))
        tasks = np.split(np.arange(len(left)), np.flatnonzero(np.diff(left["task"])) + 1)
        return [left.take(pa.array(task)) for task in tasks if len(task)]

    def save(self, work: str) -> None:
        """Write the plan to a folder; ``plan.json`` is the last of its files."""
        for name, table in ((_PIECES, self.pieces), (_REUSED, self.reused)):
            write_parquet(storage.join(work, name), table)
        counts = {name: getattr(self, name) for name in ("rows", "lost_bytes", "to_tag", "previous", "not_reused")}
        storage.patiently(storage.write_json, storage.join(work, _FILE), counts)

    @classmethod
    def load(cls, work: str) -> "Plan | None":
        """The plan in a folder, if there is one; DataError for one of another layout, that is of another version."""
        if not storage.exists(storage.join(work, _FILE)):
            return None
        tables = [storage.read_parquet(storage.join(work, name)) for name in (_PIECES, _REUSED)]
        if [table.schema for table in tables] != [PIECES, REUSED]:
            what = "an unfinished night was begun by another version"
            raise DataError(what, where=work, way_out="give --overwrite to begin anew")
        counts = storage.read_json(storage.join(work, _FILE))
        return cls(*tables, **{"to_tag": sum(tables[0]["rows"].to_pylist()), **counts})  # plans of before did not say it


def piece_name(kind: str, number: int) -> str:
    """Such as t000017: ``kind`` is ``t`` for rows to tag and ``r`` for reused ones."""
    return f"{kind}{number:06}"


def unpacked(bits: bytes, rows: int) -> Mask:
    """bool[rows] of a column ``skip`` or ``keep``; all False if it is empty."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=rows).view(bool) if bits else np.zeros(rows, bool)


def pack(
    segments: pa.Table,
    files: Sequence[FileInfo],
    base_F: IntArray,
    kept: Mask,
    repeats: IntArray,
    piece_rows: int,
    n_pieces: int,
) -> pa.Table:
    """`PIECES` of consecutive segments, without segments that are reused as a whole.

    ``segments``: part, file, row, rows, start, reason and detail of each, in order and without a gap; ``base_F``: rows before
    each file; ``kept``: of all rows, those that are reused; ``repeats``: int64[2, n], the rows that repeat an id, ascending,
    and the first row of each of these ids. ``n_pieces`` is the number of pieces that keeps all actors busy.
    """
    part_S, file_S, row_S, rows_S = (segments[name].to_numpy() for name in ("part", "file", "row", "rows"))
    first_S = base_F[file_S] + row_S
    todo_S = rows_S - np.add.reduceat(kept, first_S, dtype=np.int64)  # segments follow each other without a gap
    rows = segments.drop_columns(["part"]).to_pylist()
    pieces: list[dict[str, Any]] = []
    for task, group in _groups(todo_S, rows_S, part_S, piece_rows, n_pieces):
        where = np.concatenate([np.arange(first_S[s], first_S[s] + rows_S[s]) for s in group])
        skip = kept[where]
        pieces.append(
            {
                "number": len(pieces),
                "task": task,
                "rows": int(todo_S[group].sum()),
                "segments": merged([rows[s] | vars(files[file_S[s]]) for s in group]),
                "skip": np.packbits(skip).tobytes() if skip.any() else b"",
                "repeats": _repeats(repeats, where, files, base_F),
            }
        )
    return pa.Table.from_pylist(pieces, PIECES)


def _groups(
    todo_S: IntArray, rows_S: IntArray, part_S: IntArray, piece_rows: int, n_pieces: int
) -> Iterator[tuple[int, list[int]]]:
    """The task and the segments of each piece: those of a task are of about equal size."""
    for number, task in enumerate(_tasks(todo_S, part_S, piece_rows, n_pieces)):
        rows_to_do = int(todo_S[task].sum())
        enough = -(-rows_to_do // -(-rows_to_do // piece_rows))
        group: list[int] = []
        todo = read = 0
        for segment, more, rows in zip(task.tolist(), todo_S[task].tolist(), rows_S[task].tolist(), strict=True):
            is_full = todo + more > piece_rows or read + rows > _READ_PER_PIECE * piece_rows
            if group and (is_full or todo >= enough):
                yield number, group
                group, todo, read = [], 0, 0
            group.append(segment)
            todo, read = todo + more, read + rows
        yield number, group


def _tasks(todo_S: IntArray, part_S: IntArray, piece_rows: int, n_pieces: int) -> Iterator[IntArray]:
    """The segments that each task reads, without those that are reused as a whole.

    A row group that several tasks read is read several times, so a task has parts as a whole. Only a part that would keep a
    task busy for too long is cut.
    """
    few, most = _TASK * piece_rows, max(_TASK * piece_rows, _SHARE * int(todo_S.sum()) // n_pieces)
    segments = np.flatnonzero(todo_S)
    task: list[IntArray] = []
    size = 0
    for part in np.split(segments, np.flatnonzero(np.diff(part_S[segments])) + 1):
        rows = int(todo_S[part].sum())
        if task and size + rows > few:
            yield np.concatenate(task)
            task, size = [], 0
        if rows > most:
            cuts = -(-rows // most)
            yield from np.split(part, np.searchsorted(todo_S[part].cumsum(), np.arange(1, cuts) * rows // cuts))
        elif rows:
            task.append(part)
            size += rows
    if task:
        yield np.concatenate(task)


def merged(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segments of pieces, with neighbours in one file joined."""
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


def _repeats(repeats: IntArray, where: IntArray, files: Sequence[FileInfo], base_F: IntArray) -> dict[str, Any]:
    """Column ``repeats`` of a piece with the rows ``where``: arrays, as there may be as many as rows."""
    row, first = repeats[:, slice(*np.searchsorted(repeats[0], [where[0], where[-1] + 1]))]
    file = np.searchsorted(base_F, first, side="right") - 1
    names, number = np.unique(file, return_inverse=True)
    named = [files[name].uri for name in names.tolist()]
    return {"place": np.searchsorted(where, row), "row": first - base_F[file], "file": number, "files": named}


def row_at(position: int, files: Sequence[FileInfo], base_F: IntArray) -> tuple[str, int]:
    """The file, and the row in it, of a row that is counted through all files."""
    file = int(np.searchsorted(base_F, position, side="right")) - 1
    return files[file].uri, position - int(base_F[file])


def reused(files: Sequence[FileInfo], base_T: IntArray, taken: Mask) -> pa.Table:
    """`REUSED`: the files with rows that are reused; ``taken`` says which of all their rows, ``base_T`` where a file begins."""
    rows = [
        {**vars(file), "rows": int(taken[first:last].sum()), "keep": np.packbits(taken[first:last]).tobytes()}
        for file, first, last in zip(files, base_T[:-1].tolist(), base_T[1:].tolist(), strict=True)
    ]
    rows = [row for row in rows if row["rows"]]
    return pa.Table.from_pylist([{"number": number, **row} for number, row in enumerate(rows)], REUSED)
