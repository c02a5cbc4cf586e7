"""Scans the input before the model sees any of it, and plans the night.

One pass over all documents counts the rows and notes where each segment begins, rejects what cannot be read, and finds ids that
come twice and rows that the night before has tagged already.

Rows are compared by a 16-byte hash of their ids in tasks that each take one share of all hashes (a hash join): neither night
has to fit in memory, and no text is kept. A row of either night costs 44 bytes of Ray's object store, which spills to disk,
twice that while the shares are made; the driver keeps a byte a row, and 16 for one that repeats an id.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from xmc_ray import storage
from xmc_ray.data.documents import Rules, text_digest
from xmc_ray.data.labels import IntArray
from xmc_ray.data.reader import CHUNK, Segment, check_unchanged, file_segments, read_all
from xmc_ray.errors import DataError
from xmc_ray.on_ray.tag.plan import Plan, pack, reused, row_at
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.storage.files import FileInfo

_TASK_BYTES, _TASK_FILES = 64 << 20, 256  # of input that one task scans
_SHARE_ROWS = 2 << 20  # of both nights in one share of the hash join, whose task takes some 150 bytes for each
_RECORD = np.dtype([("id", "<u8", 2), ("text", "<u8", 2), ("file", "<i4"), ("row", "<i8")])
_POSITION = dict.fromkeys(("file", "start", "row", "rows"), pa.int64())
_SEGMENTS = pa.schema(_POSITION | {"reason": pa.string(), "detail": pa.string(), "uncounted": pa.bool_()})


def scan(
    files: Sequence[FileInfo],
    rules: Rules,
    before: Sequence[FileInfo],
    piece_rows: int,
    n_pieces: int,
    max_reject_share: float,
    runner: Runner,
) -> Plan:
    """Scan all ``files`` and plan the night, in pieces of at most ``piece_rows`` rows to tag, and at least ``n_pieces`` if any.

    ``before``: the files of a night whose tags are good for documents that have not changed; empty if there is no such night.
    Raises DataError if the share of rows that repeat an id is above ``max_reject_share``, and for files that change meanwhile.
    """
    chunk = min(CHUNK, piece_rows)
    scans = [runner.submit(_scan, task, rules, chunk, bool(before), returns=2) for task in _tasks(files)]
    tags = [runner.submit(_scan_tags, number, file, returns=2) for number, file in enumerate(before)]
    segments = pa.concat_tables(runner.get([part[0] for part in scans]))
    segments = segments.sort_by([("file", "ascending"), ("row", "ascending")])
    base_F = _bases(segments["file"].to_numpy(), segments["rows"].to_numpy(), len(files))
    base_T = np.concatenate([[0], np.cumsum(runner.get([part[0] for part in tags]), dtype=np.int64)])

    shares = 1 + int(base_F[-1] + base_T[-1]) // _SHARE_ROWS
    records = [_split(part[1], shares, runner) for part in (*scans, *tags)]
    kept, taken = np.zeros(base_F[-1], bool), np.zeros(base_T[-1], bool)
    repeats = []
    bases = runner.put((base_F, base_T))
    joins = [runner.submit(_join, bases, len(scans), *(part[share] for part in records)) for share in range(shares)]
    del scans, tags, records
    while joins:
        same, same_before, repeated = runner.get(joins.pop(0))
        kept[same] = taken[same_before] = True
        repeats.append(repeated)
    repeat = np.concatenate(repeats, axis=1)
    repeat = repeat[:, repeat[0].argsort()]
    _check_repeats(repeat, files, base_F, max_reject_share)
    uncounted = pc.unique(segments.filter(segments["uncounted"])["file"]).to_pylist()
    piece_rows = min(piece_rows, max(chunk, int(len(kept) - kept.sum()) // n_pieces))
    return Plan(
        pieces=pack(segments, files, base_F, kept, repeat, piece_rows),
        reused=reused(before, base_T, taken),
        rows=int(base_F[-1]),
        lost_bytes=sum(files[file].size for file in uncounted),
    )


def _check_repeats(repeat: IntArray, files: Sequence[FileInfo], base_F: IntArray, max_reject_share: float) -> None:
    """DataError if so many rows repeat an id that the night would fail; before any of them is tagged."""
    share = repeat.shape[1] / max(base_F[-1], 1)
    if share > max_reject_share:
        (uri, row), (first_uri, first_row) = (row_at(position, files, base_F) for position in repeat[:, 0].tolist())
        example = f"such as that of row {row}, first at {first_uri} row {first_row}"
        raise DataError(
            "too many documents are rejected",
            where=uri,
            found=f"{share:.1%}: duplicate id ({repeat.shape[1]:,}), {example}",
            expected=f"at most {max_reject_share:.1%}",
            way_out="fix the input, or run again with a higher max_reject_share",
        )


def _tasks(files: Sequence[FileInfo]) -> Iterator[list[dict[str, Any]]]:
    """The parts of the input for each task: many small ones, or a large one."""
    task: list[dict[str, Any]] = []
    for part in file_segments(list(files)).to_pylist():
        if task and (len(task) >= _TASK_FILES or sum(other["size"] for other in task) + part["size"] > _TASK_BYTES):
            yield task
            task = []
        task.append(part)
    yield task


def _scan(task: list[dict[str, Any]], rules: Rules, chunk: int, with_texts: bool) -> tuple[pa.Table, npt.NDArray[Any]]:
    """Segments of the parts of a task, and the records of their rows."""
    segments: list[dict[str, Any]] = []
    records = [np.empty(0, _RECORD)]
    last = None
    for part, (start, end, table, reject) in read_all(map(Segment.from_row, task), rules, chunk):
        file, row = task[part]["file"], table["row"][0].as_py()
        if part != last or reject or segments[-1]["reason"] or segments[-1]["rows"] + len(table) > chunk:
            reason, detail = reject or (None, None)
            segment = {"file": file, "start": start, "row": row, "rows": 0, "reason": reason, "detail": detail}
            segments.append(segment | {"uncounted": start == end})
        segments[-1]["rows"] += len(table)
        last = part
        records.append(_records(table.filter(pc.is_null(table["reason"])), file, with_texts))
    return pa.Table.from_pylist(segments, _SEGMENTS), np.concatenate(records)


def _scan_tags(number: int, file: FileInfo) -> tuple[int, npt.NDArray[Any]]:
    """The number of rows of a file of tags, and their records."""
    table = storage.read_parquet(file.uri, ["id", "text_digest"])
    check_unchanged(file)
    record = np.empty(len(table), _RECORD)
    record["id"] = _hashes(table["id"])
    record["text"] = _from_hex(table["text_digest"])
    record["file"], record["row"] = number, np.arange(len(table))
    return len(table), record


def _join(bases: tuple[IntArray, IntArray], n_now: int, *records: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Rows with the same id and text in both nights, by their number in this one and in the night before; and int64[2, n], the
    rows of this night that repeat an id and the first row of each of these ids."""
    now, before = np.concatenate(records[:n_now]), np.concatenate([np.empty(0, _RECORD), *records[n_now:]])
    row_N, row_B = (base[part["file"]] + part["row"] for base, part in zip(bases, (now, before), strict=True))
    order = np.lexsort((row_N, *now["id"].T))
    now, row_N = now[order], row_N[order]
    is_first = np.ones(len(now), bool)
    is_first[1:] = (now["id"][1:] != now["id"][:-1]).any(1)
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(now)), 0))
    repeats = np.stack([row_N, row_N[first]])[:, ~is_first]

    now, row_N = now[is_first], row_N[is_first]
    both = np.concatenate([now, before])
    order = np.lexsort(both["id"].T)
    pair = np.flatnonzero((both["id"][order[1:]] == both["id"][order[:-1]]).all(1))
    here, there = np.sort(np.stack([order[pair], order[pair + 1]]), axis=0)
    same = (both["text"][here] == both["text"][there]).all(1)
    return row_N[here[same]], row_B[there[same] - len(now)], repeats


def _records(good: pa.Table, file: int, with_texts: bool) -> npt.NDArray[Any]:
    record = np.zeros(len(good), _RECORD)
    record["id"] = _hashes(good["id"])
    if with_texts:
        record["text"] = _from_hex(text_digest(good["text"].combine_chunks()))
    record["file"], record["row"] = file, good["row"].to_numpy()
    return record


def _split(record: Any, shares: int, runner: Runner) -> Sequence[Any]:
    """Handles of the records of each share of the ids, from a handle of all."""
    return [record] if shares == 1 else runner.submit(_shared, record, shares, returns=shares)


def _shared(record: npt.NDArray[Any], shares: int) -> list[npt.NDArray[Any]]:
    share = record["id"][:, 0] % np.uint64(shares)
    order = np.argsort(share, kind="stable")
    return np.split(record[order], np.searchsorted(share[order], np.arange(1, shares)))


def _hashes(texts: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    raw = texts.cast(pa.binary()).to_pylist()
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in raw), "<u8").reshape(-1, 2)


def _from_hex(digests: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(digests.to_pylist())), "<u8").reshape(-1, 2)


def _bases(file_S: IntArray, rows_S: IntArray, n_files: int) -> IntArray:
    """Where the rows of each file begin, counted through all files; the last entry is their number."""
    return np.concatenate([[0], np.cumsum(np.bincount(file_S, rows_S, minlength=n_files).astype(np.int64))])
