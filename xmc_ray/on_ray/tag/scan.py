"""Scans the input before the model sees any of it, and plans the night.

One pass over all documents counts the rows and notes where each segment begins, rejects what cannot be read, and finds ids that
come twice and rows that the night before has tagged already. A task counts the rows of each part of a file from 0, since nobody
knows how many there are before a byte range; once all are counted, the driver knows the number of each row in its file.

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
from xmc_ray.data.line_ranges import LARGE
from xmc_ray.data.reader import CHUNK, Segment, check_unchanged, file_parts, read_all
from xmc_ray.errors import DataError
from xmc_ray.on_ray.tag.plan import Plan, pack, reused, row_at
from xmc_ray.on_ray.tag.runner import Runner
from xmc_ray.storage.listing import FileInfo

_TASK_PARTS = 256  # parts of files, of `LARGE` bytes together, that one task scans
_SHARE_ROWS = 2 << 20  # of both nights in one share of the hash join, whose task takes some 150 bytes for each
_OBJECT_ROWS = 4096  # records in an object of Ray, on average: 180 KB. Ray keeps those of up to 100 KB in the driver's memory
_RECORD = np.dtype([("id", "<u8", 2), ("text", "<u8", 2), ("part", "<i4"), ("row", "<i8")])
_POSITION = dict.fromkeys(("part", "start", "row", "rows"), pa.int64())
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
    chunk, parts = min(CHUNK, piece_rows), file_parts(files)
    scans = [runner.submit(_scan, task, rules, chunk, bool(before), returns=2) for task in _tasks(parts)]
    has_filter = rules.filters is not None
    tags = [runner.submit(_scan_tags, number, file, has_filter, returns=2) for number, file in enumerate(before)]
    segments = pa.concat_tables(runner.get([part[0] for part in scans]))
    segments = segments.sort_by([("part", "ascending"), ("row", "ascending")])
    base_P = _bases(segments["part"].to_numpy(), segments["rows"].to_numpy(), len(parts))
    base_F = base_P[np.searchsorted(parts["file"].to_numpy(), np.arange(len(files) + 1))]
    base_T = np.concatenate([[0], np.cumsum(runner.get([part[0] for part in tags]), dtype=np.int64)])

    shares = 1 + int(base_F[-1] + base_T[-1]) // _SHARE_ROWS
    now, earlier = ([part[1] for part in given] for given in (scans, tags))
    if rules.makes_ids and parts["stop"].null_count < len(parts):
        numbering = runner.put((parts, base_P, base_F))
        now = [runner.submit(_with_made_ids, record, rules, numbering) for record in now]
    now = _split(now, int(base_F[-1]), shares, runner)
    earlier = _split(earlier, int(base_T[-1]), shares, runner)
    kept, taken = np.zeros(base_F[-1], bool), np.zeros(base_T[-1], bool)
    repeats, to_tag = [], 0
    bases = runner.put((base_P, base_T))
    joins = [runner.submit(_join, bases, len(now), *(part[share] for part in (*now, *earlier))) for share in range(shares)]
    del scans, tags, now, earlier
    while joins:
        same, same_before, repeated, new = runner.get(joins.pop(0))
        kept[same] = taken[same_before] = True
        to_tag += new
        repeats.append(repeated)
    repeat = np.concatenate(repeats, axis=1)
    repeat = repeat[:, repeat[0].argsort()]
    _check_repeats(repeat, files, base_F, max_reject_share)
    uncounted = parts.take(pc.unique(segments.filter(segments["uncounted"])["part"]))
    piece_rows = min(piece_rows, max(chunk, int(len(kept) - kept.sum()) // n_pieces))
    return Plan(
        pieces=pack(_in_files(segments, parts, base_P, base_F), files, base_F, kept, repeat, piece_rows, n_pieces),
        reused=reused(before, base_T, taken),
        rows=int(base_F[-1]),
        lost_bytes=sum(Segment.from_row(part).size for part in uncounted.to_pylist()),
        to_tag=to_tag,
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


def _tasks(parts: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """The parts of the input for each task: many small ones, or a large one."""
    task: list[dict[str, Any]] = []
    size = 0
    for part in parts.to_pylist():
        more = LARGE if part["rows"] is not None else Segment.from_row(part).size  # row groups of that size, or a larger one
        if task and (len(task) >= _TASK_PARTS or size + more > LARGE):
            yield task
            task, size = [], 0
        task.append(part)
        size += more
    yield task


def _scan(task: list[dict[str, Any]], rules: Rules, chunk: int, with_texts: bool) -> tuple[pa.Table, npt.NDArray[Any]]:
    """Segments of the parts of a task, and the records of their rows; ``row`` counts from the beginning of the part."""
    segments: list[dict[str, Any]] = []
    records = [np.empty(0, _RECORD)]
    last = None
    for number, (start, end, table, reject) in read_all(map(Segment.from_row, task), rules, chunk):
        part, row = task[number]["part"], table["row"][0].as_py() - task[number]["row"]
        if number != last or reject or segments[-1]["reason"] or segments[-1]["rows"] + len(table) > chunk:
            reason, detail = reject or (None, None)
            segment = {"part": part, "start": start, "row": row, "rows": 0, "reason": reason, "detail": detail}
            segments.append(segment | {"uncounted": start == end})
        segments[-1]["rows"] += len(table)
        last = number
        rows = np.arange(row, row + len(table))
        is_good = pc.is_null(table["reason"]).to_numpy()
        records.append(_records(table.filter(is_good), part, rows[is_good], with_texts))
    return pa.Table.from_pylist(segments, _SEGMENTS), np.concatenate(records)


def _scan_tags(number: int, file: FileInfo, has_filter: bool) -> tuple[int, npt.NDArray[Any]]:
    """The number of rows of a file of tags, and their records."""
    table = storage.read_parquet(file.uri, ["id", "text_digest", *(["filter"] if has_filter else [])])
    check_unchanged(file)
    record = np.empty(len(table), _RECORD)
    record["id"] = _hashes(table["id"])
    record["text"] = _with_filters(_from_hex(table["text_digest"]), table)
    record["part"], record["row"] = number, np.arange(len(table))
    return len(table), record


def _with_made_ids(record: npt.NDArray[Any], rules: Rules, numbering: tuple[pa.Table, IntArray, IntArray]) -> npt.NDArray[Any]:
    """Records of rows whose ids are made of their files and their numbers in them, which are known by now."""
    parts, base_P, base_F = numbering
    record = record.copy()
    for part in np.unique(record["part"]).tolist():
        is_here = record["part"] == part
        rows = record["row"][is_here] + base_P[part] - base_F[parts["file"][part].as_py()]
        record["id"][is_here] = _hashes(pa.chunked_array([rules.made_ids(parts["uri"][part].as_py(), pa.array(rows))]))
    return record


def _in_files(segments: pa.Table, parts: pa.Table, base_P: IntArray, base_F: IntArray) -> pa.Table:
    """The segments with their ``file`` and the number of their first ``row`` in it, in place of that in their part."""
    part_S = segments["part"].to_numpy()
    file_S = parts["file"].to_numpy()[part_S]
    row_S = segments["row"].to_numpy() + base_P[part_S] - base_F[file_S]
    return segments.drop_columns(["row"]).append_column("file", pa.array(file_S)).append_column("row", pa.array(row_S))


def _join(bases: tuple[IntArray, IntArray], n_now: int, *records: npt.NDArray[Any]) -> tuple[Any, ...]:
    """Rows with the same id and text in both nights, by their number in this one and in the night before; int64[2, n], the rows
    of this night that repeat an id and the first row of each of these ids; and the number of rows that are neither."""
    now, before = np.concatenate(records[:n_now]), np.concatenate([np.empty(0, _RECORD), *records[n_now:]])
    row_N, row_B = (base[part["part"]] + part["row"] for base, part in zip(bases, (now, before), strict=True))
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
    return row_N[here[same]], row_B[there[same] - len(now)], repeats, len(now) - int(same.sum())


def _records(good: pa.Table, part: int, rows: IntArray, with_texts: bool) -> npt.NDArray[Any]:
    record = np.zeros(len(good), _RECORD)
    record["id"] = _hashes(good["id"])
    if with_texts:
        record["text"] = _with_filters(_from_hex(text_digest(good["text"].combine_chunks())), good)
    record["part"], record["row"] = part, rows
    return record


def _split(records: Sequence[Any], rows: int, shares: int, runner: Runner) -> list[Sequence[Any]]:
    """Handles of the records of each share of the ids, a sequence of them for each group of tasks, from a handle a task.

    What a task returns is kept by the driver if it is small. So tasks are grouped until their shares are not.
    """
    if shares == 1:
        return [[record] for record in records]
    size = max(1, -(-len(records) * shares * _OBJECT_ROWS // max(rows, 1)))
    groups = [records[first : first + size] for first in range(0, len(records), size)]
    return [runner.submit(_shared, shares, *group, returns=shares) for group in groups]


def _shared(shares: int, *records: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    record = np.concatenate(records)
    share = record["id"][:, 0] % np.uint64(shares)
    order = np.argsort(share, kind="stable")
    return np.split(record[order], np.searchsorted(share[order], np.arange(1, shares)))


def share_of(ids: pa.ChunkedArray, shares: int) -> npt.NDArray[np.uint64]:
    """The number of the share, of so many, that each id belongs to, in any night."""
    share: npt.NDArray[np.uint64] = _hashes(ids)[:, 0] % np.uint64(shares)
    return share


def _hashes(texts: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    raw = texts.cast(pa.binary()).to_pylist()
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in raw), "<u8").reshape(-1, 2)


def _with_filters(texts: npt.NDArray[np.uint64], table: pa.Table) -> npt.NDArray[np.uint64]:
    """Hashes of texts, and of the filters of their documents if these name any: tags are good for both together."""
    return texts ^ _hashes(table["filter"].fill_null("")) if "filter" in table.column_names else texts


def _from_hex(digests: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex("".join(digests.to_pylist())), "<u8").reshape(-1, 2)


def _bases(part_S: IntArray, rows_S: IntArray, n_parts: int) -> IntArray:
    """Where the rows of each part begin, counted through all parts; the last entry is their number."""
    return np.concatenate([[0], np.cumsum(np.bincount(part_S, rows_S, minlength=n_parts).astype(np.int64))])
