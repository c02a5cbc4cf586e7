"""The census of a night: one pass over all documents, before the model sees any of them.

It counts the rows and notes where to find them again, rejects what cannot be read, finds ids that come twice, and rows that
the night before has tagged already. What is left to do is cut into pieces, each of which is done as a whole or not at all.

Rows are compared by a 16-byte hash of their ids in tasks that each take the ids of one share of all hashes (a hash join):
neither night has to fit in memory, and no text is kept. A row of either night costs 40 bytes of Ray's object store, which
spills to disk; the driver keeps a byte a row.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from xmc_ray import storage
from xmc_ray.corpus import from_row, parts
from xmc_ray.documents import Rules, text_digest
from xmc_ray.labels import IntArray
from xmc_ray.plan import Duplicates, Mask, Plan, pack, reused
from xmc_ray.reading import CHUNK, read_all
from xmc_ray.storage import FileInfo

_TASK_BYTES, _TASK_FILES = 64 << 20, 256  # of input that one task looks at
_SHARE_BYTES = 2 << 30  # of input for one share of the hash join
_RECORD = np.dtype([("id", "<u8", 2), ("text", "<u8", 2), ("file", "<i4"), ("row", "<i8")])


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
