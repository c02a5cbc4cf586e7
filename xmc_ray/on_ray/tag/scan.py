"""Scans the input before the model sees any of it, and plans the night.

One pass over all documents counts the rows and notes where each segment begins, rejects what cannot be read, and finds ids that
come twice and rows that the night before has tagged already.

Rows are compared by a 16-byte hash of their ids in tasks that each take one share of all hashes (a hash join): neither night
has to fit in memory, and no text is kept. A row of either night costs 44 bytes of Ray's object store, which spills to disk; the
driver keeps a byte a row.
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
from xmc_ray.data.reader import CHUNK, Segment, file_segments, read_all
from xmc_ray.on_ray.tag.plan import Plan, pack, reused, unpacked
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.storage.files import FileInfo

_TASK_BYTES, _TASK_FILES = 64 << 20, 256  # of input that one task scans
_SHARE_BYTES = 2 << 30  # of input for one share of the hash join
_RECORD = np.dtype([("id", "<u8", 2), ("text", "<u8", 2), ("file", "<i4"), ("row", "<i8")])
_POSITION = dict.fromkeys(("file", "start", "row", "rows"), pa.int64())
_SEGMENTS = pa.schema(_POSITION | {"reason": pa.string(), "detail": pa.string(), "uncounted": pa.bool_()})


def scan(
    files: Sequence[FileInfo], rules: Rules, before: Sequence[str], piece_rows: int, n_pieces: int, runner: Runner
) -> Plan:
    """Scan all ``files`` and plan the night, in pieces of at most ``piece_rows`` rows to tag, and at least ``n_pieces`` if any.

    ``before``: the files of a night whose tags are good for documents that have not changed; empty if there is no such night.
    """
    shares = 1 + sum(file.size for file in files) // _SHARE_BYTES
    chunk = min(CHUNK, piece_rows)
    scans = [runner.submit(_scan, task, rules, shares, chunk, bool(before), returns=shares + 1) for task in _tasks(files)]
    tags = [runner.submit(_scan_tags, number, uri, shares, returns=shares + 1) for number, uri in enumerate(before)]
    segments = pa.concat_tables(runner.get([part[0] for part in scans]))
    segments = segments.sort_by([("file", "ascending"), ("row", "ascending")])
    base_F = _bases(segments["file"].to_numpy(), segments["rows"].to_numpy(), len(files))
    base_T = np.concatenate([[0], np.cumsum(runner.get([part[0] for part in tags]), dtype=np.int64)])

    kept, taken = np.zeros(base_F[-1], bool), np.zeros(base_T[-1], bool)
    repeats = []
    bases = runner.put((base_F, base_T))
    joins = [runner.submit(_join, bases, len(scans), *(part[1 + share] for part in (*scans, *tags))) for share in range(shares)]
    for join in joins:
        same, same_before, repeated = runner.get(join)
        kept |= unpacked(same, len(kept))
        taken |= unpacked(same_before, len(taken))
        repeats.append(repeated)
    repeat = np.concatenate(repeats, axis=1)
    uncounted = pc.unique(segments.filter(segments["uncounted"])["file"]).to_pylist()
    piece_rows = min(piece_rows, max(chunk, int(len(kept) - kept.sum()) // n_pieces))
    return Plan(
        pieces=pack(segments, files, base_F, kept, repeat[:, repeat[0].argsort()], piece_rows),
        reused=reused(before, base_T, taken),
        rows=int(base_F[-1]),
        lost_bytes=sum(files[file].size for file in uncounted),
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


def _scan(task: list[dict[str, Any]], rules: Rules, shares: int, chunk: int, with_texts: bool) -> list[Any]:
    """Segments of the parts of a task, and the records of each share of the ids."""
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
    return [pa.Table.from_pylist(segments, _SEGMENTS), *_shared(np.concatenate(records), shares)]


def _scan_tags(number: int, uri: str, shares: int) -> list[Any]:
    """The number of rows of a file of tags, and the records of each share of the ids."""
    table = storage.read_parquet(uri, ["id", "text_digest"])
    record = np.empty(len(table), _RECORD)
    record["id"] = _hashes(table["id"])
    record["text"] = _from_hex(table["text_digest"])
    record["file"], record["row"] = number, np.arange(len(table))
    return [len(table), *_shared(record, shares)]


def _join(bases: tuple[IntArray, IntArray], n_now: int, *records: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Rows with the same id and text in both nights, as bits of all rows of this one and of the night before; and int64[2, n],
    the rows of this night that repeat an id and the first row of each of these ids."""
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
    return _bits(row_N[here[same]], bases[0][-1]), _bits(row_B[there[same] - len(now)], bases[1][-1]), repeats


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


def _bits(rows: IntArray, n_rows: int) -> bytes:
    mask = np.zeros(n_rows, bool)
    mask[rows] = True
    return np.packbits(mask).tobytes()


def _bases(file_S: IntArray, rows_S: IntArray, n_files: int) -> IntArray:
    """Where the rows of each file begin, counted through all files; the last entry is their number."""
    return np.concatenate([[0], np.cumsum(np.bincount(file_S, rows_S, minlength=n_files).astype(np.int64))])
